"""Daemon processes and clients on real Mosquitto: what unit tests cannot show."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.clients import PATIENCE, daemon, echo_daemon, listening, wait_for_line
from support.mosquitto import Mosquitto

from nestd.cli.main import main
from nestd.client.connection import Client, Due
from nestd.daemon.mqtt.packets import TransportOptions
from nestd.daemon.mqtt.transport import PahoTransport

pytestmark = pytest.mark.broker


@contextmanager
def client(broker: Mosquitto, node: str = "node", protocol: str = "5") -> Iterator[Client]:
    options = TransportOptions(
        host="127.0.0.1",
        port=broker.port,
        client_id=f"client-{uuid.uuid4().hex}",
        protocol=protocol,
        clean_start=True,
        retry_seconds=(0.1, 0.2),
    )
    connection = Client(PahoTransport(options), options.client_id, "nestd")
    try:
        connection.connect(node, node, PATIENCE)
        yield connection
    finally:
        connection.close()


def request(text: str, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "stream": True} | fields


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_an_answer_streams_to_clients_of_both_protocols(
    mosquitto: Mosquitto, protocol: str
) -> None:
    with daemon(mosquitto), client(mosquitto, protocol=protocol) as connection:
        events = list(connection.ask(request("one two three"), PATIENCE))
    assert [e["event"] for e in events] == ["accepted", "delta", "delta", "delta", "done"]
    assert events[-1]["text"] == "one two three"


def test_a_node_may_speak_mqtt_3_itself(mosquitto: Mosquitto) -> None:
    with daemon(mosquitto, "node", "mqtt.protocol=3.1.1"), client(mosquitto) as connection:
        events = list(connection.ask(request("one two"), PATIENCE))
    assert events[-1]["text"] == "one two"


def test_mosquittos_own_command_line_gets_an_answer(mosquitto: Mosquitto) -> None:
    with daemon(mosquitto):
        replies = subprocess.run(
            [
                "mosquitto_rr",
                *("-p", str(mosquitto.port), "-W", "9", "-q", "1"),
                *("-t", "nestd/v1/node/request/generate", "-e", "clients/cli/r"),
                *("-m", json.dumps(request("hi", stream=False))),
            ],
            capture_output=True,
            text=True,
        )
    assert json.loads(replies.stdout)["text"] == "hi"


def test_a_running_answer_is_cancelled(mosquitto: Mosquitto) -> None:
    with daemon(mosquitto), client(mosquitto) as connection:
        events = list(connection.ask(request("wait"), PATIENCE, (Due(0.2, "cancel", {}),)))
    assert [e["event"] for e in events] == ["accepted", "error"]
    assert events[-1]["status"] == 499


def test_bad_requests_are_answered(mosquitto: Mosquitto) -> None:
    topic = "nestd/v1/node/request/generate"
    with (
        daemon(mosquitto, "node", "mqtt.max_payload_bytes=4096"),
        listening(mosquitto, "clients/me/r") as me,
    ):

        def code_of(payload: Any) -> str:
            me.publish(topic, payload, response_topic="clients/me/r")
            return str(me.until_event("error")["code"])

        assert code_of(request("hi", submodel="huge")) == "model_not_found"
        assert code_of(b"{broken") == "bad_request"
        assert code_of(b"\xff\xfe") == "bad_request"
        assert code_of(b"[" * 3000) == "bad_request"
        assert code_of(request("x" * 5000)) == "too_large"
        assert code_of(request("hi", reply_to=17)) == "bad_request"


def test_a_full_queue_refuses_at_once(mosquitto: Mosquitto) -> None:
    with daemon(mosquitto), listening(mosquitto, "clients/me/r") as me:
        for number in range(6):
            me.publish(
                "nestd/v1/node/request/generate",
                request("wait", id=f"id{number}"),
                response_topic="clients/me/r",
            )
        assert me.until_event("error")["code"] == "queue_full"


def test_two_nodes_share_a_broker(mosquitto: Mosquitto) -> None:
    with daemon(mosquitto, "east"), daemon(mosquitto, "west"):
        for node in ("east", "west"):
            with client(mosquitto, node) as connection:
                assert list(connection.ask(request(node), PATIENCE))[-1]["text"] == node


def test_the_nodes_of_a_pool_share_its_requests(mosquitto: Mosquitto) -> None:
    pool = "mqtt.pools=[house]"
    with (
        daemon(mosquitto, "east", pool) as east,
        daemon(mosquitto, "west", pool),
        listening(mosquitto, "clients/me/r") as me,
    ):

        def ask(number: int) -> None:
            me.publish(
                "nestd/v1/pool/house/request/generate",
                request("hi", id=f"{number}", stream=False),
                response_topic="clients/me/r",
            )

        for number in range(10):
            ask(number)
        assert {me.until_event("done")["id"] for _ in range(10)} == {str(n) for n in range(10)}
        for node in ("east", "west"):
            with client(mosquitto, node) as connection:
                counters = connection.control("health", {})["data"]["counters"]
                assert counters["done"] > 0, "each has answered some"
        east.terminate()
        east.wait(PATIENCE)
        for number in range(20, 24):
            ask(number)
        assert len([me.until_event("done") for _ in range(4)]) == 4, "who has left gets none"


def test_nestd_ask_asks_a_pool(
    mosquitto: Mosquitto, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "large").write_bytes(bytes(2_000_000))
    broker = ["--host", "127.0.0.1", "--port", str(mosquitto.port), "--pool", "house"]
    with daemon(mosquitto, "node", "mqtt.pools=[house]", "bundle=media"):
        assert main(["ask", *broker, "--no-stream", "hello"]) == 0
        assert capsys.readouterr().out == "hello\n"
        assert main(["ask", *broker, "--image", str(tmp_path / "large"), "hello"]) == 1
        assert "--node" in capsys.readouterr().err
        assert main(["ask", *broker, "--cancel-after", "1", "hello"]) == 2


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_requests_survive_a_broker_restart(mosquitto: Mosquitto, how: str) -> None:
    with daemon(mosquitto), client(mosquitto) as connection:
        events = connection.ask(request("wait", id="a", stream=True), PATIENCE)
        assert next(events)["event"] == "accepted"
        getattr(mosquitto, how)()
        mosquitto.start()
        assert next(events)["event"] == "accepted", "the client asks again under the same id"
        with client(mosquitto) as other:
            assert other.control("cancel", {"id": "a"})["data"]["was"] == "running"
        # It asks once more when the node has come back, and each time it is told "accepted".
        assert [e["event"] for e in events if e["event"] != "accepted"] == ["error"]
        assert list(connection.ask(request("after"), PATIENCE))[-1]["text"] == "after"


def test_availability_is_retained_and_the_will_speaks_for_the_dead(mosquitto: Mosquitto) -> None:
    with daemon(mosquitto) as process:
        with listening(mosquitto, "nestd/v1/node/availability") as watcher:
            birth = watcher.until(lambda a: a["state"] == "online")
            process.kill()
            assert watcher.until(lambda a: a["state"] == "offline") == birth | {"state": "offline"}
        with listening(mosquitto, "nestd/v1/node/availability") as late:
            assert late.until(lambda _a: True)["state"] == "offline"


def test_a_killed_daemon_loses_no_request(mosquitto: Mosquitto) -> None:
    topic = "nestd/v1/node/request/generate"
    with (
        listening(mosquitto, "clients/me/r") as me,
        listening(mosquitto, "nestd/v1/node/availability") as watcher,
    ):
        with daemon(mosquitto) as process:
            me.publish(topic, request("wait", id="runs"), response_topic="clients/me/r")
            me.publish(topic, request("queued", id="waits"), response_topic="clients/me/r")
            me.until(lambda e: e["id"] == "waits")
            process.kill()
            # Before the broker knows, it would send a message to the dead, and again with `dup`.
            watcher.until(lambda a: a["state"] == "offline")
        me.publish(topic, request("absent", id="absent"), response_topic="clients/me/r")
        with daemon(mosquitto) as process:
            again = me.until(lambda e: e["id"] == "runs")
            assert (again["event"], again["attempt"]) == ("accepted", 2)
            me.publish("nestd/v1/node/request/cancel", {"id": "runs"}, qos=0)
            answers = [me.until_event("error"), me.until_event("done"), me.until_event("done")]
            assert [(a["id"], a["attempt"]) for a in answers] == [
                ("runs", 2),
                ("waits", 2),
                ("absent", 1),
            ]
            process.terminate()  # a kill might come before the last PUBACK
            process.wait(PATIENCE)
        with daemon(mosquitto):
            assert me.nothing_more(1.0), "what was answered has had its PUBACK"


def test_a_daemon_killed_between_an_answer_and_its_puback_does_not_run_it_again(
    mosquitto: Mosquitto,
) -> None:
    topic = "nestd/v1/node/request/generate"
    with listening(mosquitto, "clients/me/r") as me:
        with daemon(mosquitto) as process:
            # The PUBACK of the second waits for that of the first, which still runs.
            me.publish(topic, request("wait", id="first"), response_topic="clients/me/r")
            me.publish(topic, request("hello", id="second"), response_topic="clients/me/r")
            me.until(lambda event: event["id"] == "second")
            me.publish("nestd/v1/node/request/cancel", {"id": "second"}, qos=0)
            me.until_event("error")
            me.nothing_more(0.2)  # the broker's word that it has the answer is on its way
            process.kill()
            process.wait()
        with daemon(mosquitto):
            assert me.until_event("accepted")["id"] == "first"
            me.publish("nestd/v1/node/request/cancel", {"id": "first"}, qos=0)
            assert me.until_event("error")["id"] == "first"
            assert me.nothing_more(1.0), "the second was answered before"


def test_a_stopping_daemon_says_goodbye_and_hands_back(mosquitto: Mosquitto) -> None:
    topic = "nestd/v1/node/request/generate"
    with listening(mosquitto, "clients/me/r", "nestd/v1/node/availability") as me:
        with daemon(mosquitto) as process:
            me.publish(topic, request("wait", id="runs"), response_topic="clients/me/r")
            me.until_event("accepted")
            process.send_signal(signal.SIGTERM)
            process.send_signal(signal.SIGINT)  # two signals: do not even wait for the running one
            assert me.until(lambda e: "state" in e and e["state"] == "offline")
            assert process.wait(10) == 0
        with daemon(mosquitto):
            assert me.until_event("accepted")["attempt"] == 2


def test_a_dead_engine_is_replaced_and_its_request_runs_again(mosquitto: Mosquitto) -> None:
    with daemon(mosquitto), client(mosquitto) as connection:
        once = list(connection.ask(request("die once"), PATIENCE))
        assert [(e["event"], e["attempt"]) for e in once if e["event"] != "delta"] == [
            ("accepted", 1),
            ("accepted", 2),
            ("done", 2),
        ]
        always = list(connection.ask(request("die"), PATIENCE))
        assert (always[-1]["code"], always[-1]["attempt"]) == ("internal", 3)


def test_a_second_node_of_the_same_name_ends_the_first_without_a_fight(
    mosquitto: Mosquitto,
) -> None:
    with daemon(mosquitto) as first, daemon(mosquitto) as second:
        assert first.wait(PATIENCE) == 2
        assert second.poll() is None
        with client(mosquitto) as connection:
            assert list(connection.ask(request("hi"), PATIENCE))[-1]["text"] == "hi"


@pytest.mark.parametrize("mosquitto", [["max_packet_size 6000"]], indirect=True)
def test_the_brokers_packet_limit_is_respected(mosquitto: Mosquitto) -> None:
    with daemon(mosquitto), client(mosquitto) as connection:
        long = "word " * 900
        events = list(connection.ask(request(long), PATIENCE))
        assert events[-1]["event"] == "done"
        with listening(mosquitto, "nestd/v1/node/info") as me:
            assert me.until(lambda _i: True)["schemas"] == {}


def test_a_broker_with_passwords_lets_us_in_only_with_the_right_one(tmp_path: Path) -> None:
    users, password = tmp_path / "users", tmp_path / "password"
    users.write_text("")
    subprocess.run(["mosquitto_passwd", "-b", str(users), "nest", "right"], check=True)
    broker = Mosquitto(tmp_path, f"password_file {users}", anonymous=False)
    credentials = ("mqtt.username=nest", f"mqtt.password_file={password}")
    broker.start()
    try:
        password.write_text("wrong\n")
        with echo_daemon(broker, "node", *credentials) as process:
            log = process.communicate(timeout=PATIENCE)[1]
            assert process.returncode == 2
        assert "mqtt.password_file" in log
        assert "wrong" not in log
        password.write_text("right\n")
        with echo_daemon(broker, "node", *credentials) as process:
            wait_for_line(process, "connected (connection 1)")
    finally:
        broker.stop()


def test_the_broker_is_reached_over_tls_and_its_certificate_is_checked(tmp_path: Path) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"),
            *("-keyout", str(key), "-out", str(certificate)),
        ],
        check=True,
        capture_output=True,
    )
    broker = Mosquitto(tmp_path, f"certfile {certificate}", f"keyfile {key}")
    broker.start()
    try:
        with echo_daemon(
            broker, "node", "mqtt.tls=true", f"mqtt.ca_file={certificate}"
        ) as trusting:
            wait_for_line(trusting, "connected (connection 1)")
        with echo_daemon(broker, "node", "mqtt.tls=true") as distrusting:
            wait_for_line(distrusting, "set mqtt.ca_file")
    finally:
        broker.stop()


def test_a_broker_that_comes_late_is_waited_for(mosquitto: Mosquitto) -> None:
    mosquitto.stop()
    with echo_daemon(mosquitto) as process:
        wait_for_line(process, "cannot reach the broker")
        assert process.stderr is not None
        drain = threading.Thread(target=process.stderr.read)
        drain.start()
        mosquitto.start()
        with listening(mosquitto, "nestd/v1/node/availability") as me:
            me.until(lambda a: a["state"] == "online")
        process.terminate()
        assert process.wait(PATIENCE) == 0
        drain.join()
