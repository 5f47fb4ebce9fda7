"""What the daemon tells systemd in the course of its life, and what it makes of SIGHUP."""

from __future__ import annotations

import select
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.clients import running_node
from support.mosquitto import Mosquitto
from support.node import Node

from nestd.bundle.errors import ConfigError
from nestd.bundle.manifest import Bundle
from nestd.daemon.notify import Notifier
from nestd.daemon.service import ReloadRequested, StopRequested
from nestd.daemon.supervisor import STALL_SECONDS


class Systemd:
    """The socket that systemd listens on."""

    def __init__(self, path: Path) -> None:
        self.address = str(path)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(self.address)
        self.socket.settimeout(60)

    def heard(self) -> list[str]:
        """Return the lines that have come since the last call."""
        lines: list[str] = []
        while select.select([self.socket], [], [], 0)[0]:
            lines += self.socket.recv(4096).decode().splitlines()
        return lines

    def until(self, line: str) -> None:
        """Wait until `line` has come."""
        while line not in self.socket.recv(4096).decode().splitlines():
            pass


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[Systemd]:
    listener = Systemd(tmp_path / "notify")
    with listener.socket:
        yield listener


def test_a_start_asks_for_time_while_the_engine_loads_and_is_over_when_it_is_there(
    systemd: Systemd,
) -> None:
    node = Node(notifier=Notifier(systemd.address))
    node.daemon.startup()
    node.settle()
    assert systemd.heard() == [
        "STATUS=loading; not connected to the broker",
        "EXTEND_TIMEOUT_USEC=240000000",
    ]
    node.pass_time(5)
    assert systemd.heard() == []
    node.pass_time(5)
    assert systemd.heard() == ["EXTEND_TIMEOUT_USEC=240000000"]
    node.engine.ready()
    node.settle()
    assert systemd.heard() == ["STATUS=ready; not connected to the broker", "READY=1"]
    node.transport.connect(session_present=False)
    node.pass_time(60)
    assert systemd.heard() == ["STATUS=ready"]


def test_a_node_that_can_only_say_what_is_wrong_has_started_too(systemd: Systemd) -> None:
    node = Node(notifier=Notifier(systemd.address))
    node.daemon.startup()
    node.transport.connect(session_present=False)
    for _ in range(3):
        node.engine.load_failed("the bundle is broken")
        node.settle()
        node.pass_time(20)
    lines = systemd.heard()
    assert "STATUS=degraded: the bundle is broken" in lines
    assert lines.count("READY=1") == 1


def test_a_loading_engine_is_killed_when_it_stands_still_and_not_when_it_works() -> None:
    node = Node()
    node.daemon.startup()
    node.settle()
    loading = node.engine
    for seconds in range(5):
        loading.cpu_seconds = float(seconds)
        node.pass_time(STALL_SECONDS - 1)
    assert not loading.killed
    node.pass_time(STALL_SECONDS + 1)
    assert loading.killed
    node.pass_time(5)
    assert node.engine is not loading


def test_a_stop_is_announced_and_asks_for_no_more_time(systemd: Systemd) -> None:
    node = Node(notifier=Notifier(systemd.address))
    node.daemon.startup()
    systemd.heard()
    node.daemon.events.put(StopRequested())
    node.daemon.main_loop()
    node.daemon.shutdown()
    lines = systemd.heard()
    assert "STOPPING=1" in lines
    node.pass_time(60)
    assert not any("EXTEND" in line for line in systemd.heard())


def test_a_wrong_configuration_is_not_loaded_and_the_node_goes_on(
    systemd: Systemd, caplog: pytest.LogCaptureFixture
) -> None:
    def check() -> None:
        raise ConfigError("nestd.yaml:3:1: limits.que: unknown key; did you mean `queue`?")

    node = Node(notifier=Notifier(systemd.address), check_configuration=check).start()
    systemd.heard()
    node.daemon.events.put(ReloadRequested())
    node.settle()
    lines = systemd.heard()
    assert lines[0] == "RELOADING=1"
    assert lines[1].startswith("MONOTONIC_USEC=")
    assert lines[2] == "READY=1"
    assert "did you mean `queue`" in caplog.text
    node.ask(id="a")
    node.engine.finish()
    node.settle()
    assert node.last()["event"] == "done"


def test_a_reload_finishes_what_runs_and_is_no_stop(systemd: Systemd) -> None:
    node = Node(notifier=Notifier(systemd.address)).start()
    node.ask(id="runs")
    systemd.heard()
    node.daemon.events.put(ReloadRequested())
    node.daemon.main_loop()
    node.engine.finish("finished")
    node.daemon.shutdown()
    assert node.last()["text"] == "finished"
    lines = systemd.heard()
    assert "RELOADING=1" in lines
    assert not {"STOPPING=1", "READY=1"} & set(lines)


@pytest.mark.broker
def test_sighup_starts_the_same_process_again_with_the_new_configuration(
    systemd: Systemd,
    mosquitto: Mosquitto,
    tiny_bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", systemd.address)
    config = (
        f"profile: generic\nnode: tiny\nbundle: {tiny_bundle.path}\n"
        f"mqtt: {{port: {mosquitto.port}}}\nstate_directory: {tmp_path / 'state'}\n"
        "engine: {context_length: 512, threads: 1}\n"
    )
    with running_node(tmp_path, config) as process:
        systemd.until("READY=1")
        file = tmp_path / "nestd.yaml"
        file.write_text(config + "limits: {que: 1}\n")
        process.send_signal(signal.SIGHUP)
        systemd.until("READY=1")
        file.write_text(config.replace("node: tiny", "node: renamed"))
        process.send_signal(signal.SIGHUP)
        systemd.until("RELOADING=1")
        systemd.until("READY=1")
        assert process.poll() is None
    log = (tmp_path / "nestd.log").read_text()
    assert "did you mean `queue`?" in log
    assert "node renamed" in log
    assert process.returncode == 0
