"""The paho transport without a broker; with one it is tested in test_mosquitto.py."""

import socket
from pathlib import Path
from queue import SimpleQueue

import pytest
from support.node import settings_for_tests

from nestd.bundle.errors import ConfigError
from nestd.daemon.mqtt.connect import client_options, node_options, read_password
from nestd.daemon.mqtt.packets import (
    Disconnected,
    GaveUp,
    Message,
    Received,
    TransportEvent,
    TransportOptions,
)
from nestd.daemon.mqtt.transport import PahoTransport


def test_pauses_double_and_are_never_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    transport = PahoTransport(TransportOptions("localhost", retry_seconds=(1.0, 60.0)))
    for draw, factor in ((lambda low, _high: low, 0.5), (lambda _low, high: high, 1.0)):
        monkeypatch.setattr("random.uniform", draw)
        pauses = [transport._pause(failures) for failures in (0, 1, 2, 5, 6, 1000)]
        assert pauses == [factor * ceiling for ceiling in (1, 2, 4, 32, 60, 60)]
    transport.start(lambda _event: None)
    transport.stop(5)


def test_without_a_connection_nothing_is_taken() -> None:
    transport = PahoTransport(TransportOptions("localhost"))
    assert transport.publish(Message("t", b"")) is None
    assert transport.publish(Message("t", b"", qos=0)) is None
    assert not transport.acknowledge(Received("t", b"", qos=1, mid=1, connection=7))
    transport.start(lambda _event: None)
    transport.stop(5)


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x20\x03\x00\x00", b""])
def test_a_peer_that_does_not_speak_mqtt_is_tried_again(answer: bytes) -> None:
    events: SimpleQueue[TransportEvent] = SimpleQueue()
    with socket.create_server(("127.0.0.1", 0)) as server:
        options = TransportOptions(
            "127.0.0.1", server.getsockname()[1], "id", retry_seconds=(0.01, 0.02)
        )
        transport = PahoTransport(options)
        transport.start(events.put)
        for _ in range(2):
            peer, _ = server.accept()
            with peer:
                peer.recv(1000)
                peer.sendall(answer)
                peer.shutdown(socket.SHUT_WR)
                assert isinstance(events.get(timeout=10), Disconnected)
        transport.stop(5)
        while not isinstance(last := events.get(timeout=10), GaveUp):
            assert isinstance(last, Disconnected)


def test_the_size_of_a_message_is_an_upper_bound() -> None:
    message = Message(
        "t" * 10,
        b"x" * 100,
        content_type="a/b",
        correlation_data=b"12",
        user_properties=(("k", "v"),),
    )
    assert 130 < message.size() < 200


def test_a_node_keeps_its_session_and_a_client_does_not() -> None:
    settings = settings_for_tests(mqtt__max_payload_bytes=10_000)
    node, client = node_options(settings), client_options(settings, "me")
    assert node.client_id == "nestd-node"
    assert not node.clean_start
    assert node.session_expiry_interval > 86400
    assert node.receive_maximum == 11 * settings.limits.queue + 1
    assert node.maximum_packet_size == 80_000
    assert client.clean_start


def test_a_password_is_the_first_line_of_its_file_and_not_in_the_options_repr(
    tmp_path: Path,
) -> None:
    file = tmp_path / "password"
    file.write_text("hunter2\nnot this\n")
    assert read_password(file) == "hunter2"
    assert "hunter2" not in repr(TransportOptions("localhost", password="hunter2"))
    file.write_text("\n")
    with pytest.raises(ConfigError, match="empty"):
        read_password(file)
    with pytest.raises(ConfigError, match="cannot read"):
        read_password(tmp_path / "absent")


def test_tls_files_that_are_missing_are_named_at_once() -> None:
    with pytest.raises(ConfigError, match="cannot use mqtt.ca_file"):
        PahoTransport(TransportOptions("localhost", tls=True, ca_file="/nonexistent"))
