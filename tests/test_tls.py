"""TLS and mutual TLS with real Mosquitto and a private CA: who connects, who hears why not."""

from __future__ import annotations

import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from queue import Queue

import pytest
from support.clients import PATIENCE
from support.mosquitto import Mosquitto
from support.node import settings_for_tests
from support.pki import YESTERDAY, Authority, Pair

from nestd.bundle.errors import BrokerError, ConfigError
from nestd.client import Broker, connect
from nestd.daemon.mqtt.connect import node_options, read_password
from nestd.daemon.mqtt.packets import Connected, Disconnected, TransportEvent
from nestd.daemon.mqtt.transport import PahoTransport

pytestmark = [
    pytest.mark.broker,
    # paho leaves the socket of a handshake that failed to the garbage collector.
    pytest.mark.filterwarnings("ignore:.*ssl.SSLSocket:pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    if shutil.which("mosquitto") is None:
        pytest.skip("Mosquitto is not installed")
    return Authority(tmp_path / "ca")


@contextmanager
def broker(
    authority: Authority, directory: Path, *, server: Pair | None = None, clients: bool = False
) -> Iterator[Mosquitto]:
    server = server or authority.issue("localhost")
    running = Mosquitto(directory, *authority.lines(server, clients=clients))
    running.start()
    try:
        yield running
    finally:
        running.stop()


def attempt(port: int, **mqtt: object) -> TransportEvent:
    """Connect as a node with these settings does, and return the first thing that it hears."""
    keys = {f"mqtt__{key}": value for key, value in mqtt.items()}
    settings = settings_for_tests(mqtt__port=port, **keys)
    events: Queue[TransportEvent] = Queue()
    transport = PahoTransport(node_options(settings))
    transport.start(events.put)
    try:
        return events.get(timeout=PATIENCE)
    finally:
        transport.stop(5)


def refused(port: int, **mqtt: object) -> str:
    event = attempt(port, **mqtt)
    assert isinstance(event, Disconnected), event
    assert "\n" not in event.reason
    return event.reason


def test_a_broker_of_the_right_ca_is_connected_to(authority: Authority, tmp_path: Path) -> None:
    with broker(authority, tmp_path) as running:
        event = attempt(running.port, tls="true", ca_file=str(authority.file))
    assert isinstance(event, Connected)


def test_a_ca_that_is_not_trusted_is_told(authority: Authority, tmp_path: Path) -> None:
    other = Authority(tmp_path / "other")
    with broker(authority, tmp_path) as running:
        for trusted in ({"ca_file": str(other.file)}, {}):
            assert "set mqtt.ca_file" in refused(running.port, tls="true", **trusted)


def test_another_host_name_is_told(authority: Authority, tmp_path: Path) -> None:
    with broker(authority, tmp_path, server=authority.issue("elsewhere.lan")) as running:
        reason = refused(running.port, tls="true", ca_file=str(authority.file))
    assert "not made out for 'localhost'" in reason


def test_an_address_instead_of_the_name_is_told(authority: Authority, tmp_path: Path) -> None:
    with broker(authority, tmp_path) as running:
        options = {"tls": "true", "ca_file": str(authority.file)}
        assert "not made out for '127.0.0.1'" in refused(running.port, host="127.0.0.1", **options)


def test_a_certificate_that_has_expired_is_told(authority: Authority, tmp_path: Path) -> None:
    server = authority.issue("localhost", not_after=YESTERDAY)
    with broker(authority, tmp_path, server=server) as running:
        reason = refused(running.port, tls="true", ca_file=str(authority.file))
    assert "has expired" in reason


def test_a_client_certificate_of_the_right_ca_is_let_in(
    authority: Authority, tmp_path: Path
) -> None:
    own = authority.issue("kitchen")
    with broker(authority, tmp_path, clients=True) as running:
        event = attempt(
            running.port,
            tls="true",
            ca_file=str(authority.file),
            cert_file=str(own.certificate),
            key_file=str(own.key),
        )
    assert isinstance(event, Connected)


def test_a_client_from_python_shows_its_certificate_too(
    authority: Authority, tmp_path: Path
) -> None:
    own = authority.issue("app")
    with broker(authority, tmp_path, clients=True) as running:
        place = Broker(host="localhost", port=running.port, tls=True, ca_file=str(authority.file))
        with (
            pytest.raises(BrokerError, match=r"set mqtt\.cert_file"),
            connect(place, pool="house"),
        ):
            pass
        pair = replace(place, cert_file=str(own.certificate), key_file=str(own.key))
        with connect(pair, pool="house") as client:
            assert client.pool == "house"


def test_a_missing_client_certificate_is_told(authority: Authority, tmp_path: Path) -> None:
    with broker(authority, tmp_path, clients=True) as running:
        reason = refused(running.port, tls="true", ca_file=str(authority.file))
    assert "set mqtt.cert_file and mqtt.key_file" in reason


def test_a_client_certificate_of_another_ca_is_told(authority: Authority, tmp_path: Path) -> None:
    own = Authority(tmp_path / "other").issue("kitchen")
    with broker(authority, tmp_path, clients=True) as running:
        reason = refused(
            running.port,
            tls="true",
            ca_file=str(authority.file),
            cert_file=str(own.certificate),
            key_file=str(own.key),
        )
    assert "does not know the CA of our client certificate" in reason


def test_an_expired_client_certificate_is_told(authority: Authority, tmp_path: Path) -> None:
    own = authority.issue("kitchen", not_after=YESTERDAY)
    with broker(authority, tmp_path, clients=True) as running:
        reason = refused(
            running.port,
            tls="true",
            ca_file=str(authority.file),
            cert_file=str(own.certificate),
            key_file=str(own.key),
        )
    assert "our client certificate has expired" in reason


def test_tls_at_a_port_without_it_is_told(mosquitto: Mosquitto) -> None:
    reason = refused(mosquitto.port, tls="true")
    assert "check that mqtt.tls is right for mqtt.port" in reason


def test_a_port_that_answers_something_else_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            peer, _ = server.accept()
            with peer:
                peer.recv(1000)
                peer.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        reason = refused(server.getsockname()[1], tls="true")
        thread.join()
    assert "does not speak TLS on this port" in reason


def test_a_password_may_be_a_credential_of_systemd(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mqtt-password").write_text("hunter2\n")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert read_password(Path("mqtt-password")) == "hunter2"
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", "/nonexistent")
    with pytest.raises(ConfigError, match="/nonexistent/mqtt-password"):
        read_password(Path("mqtt-password"))
