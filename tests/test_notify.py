"""What systemd is told."""

import socket
from pathlib import Path

import pytest

from nestd.daemon.notify import Notifier


@pytest.fixture
def systemd(tmp_path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.bind(str(tmp_path / "notify"))
    sock.settimeout(5)
    return sock


def test_lines_reach_systemds_socket(systemd: socket.socket) -> None:
    with systemd:
        notifier = Notifier(systemd.getsockname())
        notifier.send("READY=1")
        notifier.status("ready")
        notifier.status("ready")
        notifier.status("draining")
        assert [systemd.recv(100) for _ in range(3)] == [
            b"READY=1",
            b"STATUS=ready",
            b"STATUS=draining",
        ]


def test_the_watchdog_is_fed_at_a_quarter_of_its_patience(
    systemd: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "20000000")
    with systemd:
        notifier = Notifier(systemd.getsockname())
        for now in (1.0, 2.0, 5.0, 6.5):
            notifier.alive(now)
        notifier.send("END=1")
        assert [systemd.recv(100) for _ in range(3)] == [b"WATCHDOG=1", b"WATCHDOG=1", b"END=1"]


def test_without_systemd_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    Notifier().send("READY=1")


def test_a_socket_that_is_gone_is_no_disaster(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Notifier(str(tmp_path / "gone")).send("READY=1")
    assert "cannot notify systemd" in caplog.text
