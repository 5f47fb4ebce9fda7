"""`nestd run` and `nestd ask` as users start them: real engine, real broker, tiny random model."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.clients import nestd, running_node
from support.mosquitto import Mosquitto

from nestd.bundle.manifest import Bundle
from nestd.client.connection import Client
from nestd.daemon.mqtt.packets import TransportOptions
from nestd.daemon.mqtt.transport import PahoTransport

pytestmark = pytest.mark.broker

PATIENCE = 60.0
# Long enough that something can be done to the answer while it is made.
LONG: dict[str, Any] = {"max_tokens": 400, "temperature": 0, "stream": True}
LAMP = {
    "type": "object",
    "properties": {"room": {"enum": ["hall", "attic"]}, "on": {"type": "boolean"}},
    "required": ["room", "on"],
    "additionalProperties": False,
}


@pytest.fixture
def node(
    mosquitto: Mosquitto, tiny_bundle: Bundle, tmp_path: Path
) -> Iterator[subprocess.Popen[bytes]]:
    config = (
        f"profile: generic\nnode: tiny\nbundle: {tiny_bundle.path}\n"
        f"mqtt: {{port: {mosquitto.port}}}\nstate_directory: {tmp_path / 'state'}\n"
        "engine: {context_length: 512, prefill_chunk: 64, threads: 1}\n"
    )
    with running_node(tmp_path, config) as process:
        yield process


@pytest.fixture
def client(node: subprocess.Popen[bytes], mosquitto: Mosquitto) -> Iterator[Client]:
    options = TransportOptions("127.0.0.1", mosquitto.port, client_id="test", clean_start=True)
    connection = Client(PahoTransport(options), "test", "nestd")
    connection.connect("tiny", "tiny", PATIENCE)
    assert node.poll() is None
    # Answered once the engine is there, so every test starts with a loaded one.
    events = list(connection.ask(question(max_tokens=1), PATIENCE))
    assert events[-1]["event"] == "done", events
    yield connection
    connection.close()


def question(text: str = "turn the light on", **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}]} | fields


def assert_lamp(document: dict[str, Any]) -> None:
    assert list(document) == ["room", "on"]
    assert document["room"] in ("hall", "attic")
    assert isinstance(document["on"], bool)


def engine_of(node: subprocess.Popen[bytes]) -> psutil.Process:
    return psutil.Process(node.pid).children()[0]


def until(
    attempt: Callable[[], dict[str, Any]], hit: Callable[[dict[str, Any]], bool]
) -> dict[str, Any]:
    """Try to catch an answer in the middle: on a busy machine it may be over before we act."""
    for _ in range(10):
        done = attempt()
        if hit(done):
            break
    return done


def ask(mosquitto: Mosquitto, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = nestd("ask", "turn the light on", "--port", str(mosquitto.port), *arguments)
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)


@pytest.mark.usefixtures("client")
def test_ask_prints_an_answer_at_the_size_it_names(mosquitto: Mosquitto) -> None:
    for submodel in ("nested", "full"):
        answer = ask(mosquitto, "--submodel", submodel, "--max-tokens", "12")
        assert answer.returncode == 0, answer.stderr
        assert f"[{submodel} | " in answer.stderr
        assert "tokens/s" in answer.stderr


@pytest.mark.usefixtures("client")
def test_ask_prints_json_of_the_schema_in_a_file(mosquitto: Mosquitto, tmp_path: Path) -> None:
    (tmp_path / "lamp.json").write_text(json.dumps(LAMP))
    answer = ask(mosquitto, "--schema", str(tmp_path / "lamp.json"))
    assert answer.returncode == 0, answer.stderr
    assert_lamp(json.loads(answer.stdout))


@pytest.mark.usefixtures("client")
def test_asking_again_goes_on_with_a_conversation(mosquitto: Mosquitto) -> None:
    for turn in (1, 2):
        answer = ask(mosquitto, "--conversation", "hall", "--max-tokens", "4", "--json")
        assert answer.returncode == 0, answer.stderr
        done = json.loads(answer.stdout.splitlines()[-1])
        assert done["conversation"] == {"id": "hall", "turn": turn}


@pytest.mark.usefixtures("client")
def test_ask_returns_one_for_an_error_and_two_without_a_node(mosquitto: Mosquitto) -> None:
    unknown = ask(mosquitto, "--submodel", "huge")
    assert unknown.returncode == 1
    assert "404 model_not_found" in unknown.stderr
    absent = ask(mosquitto, "--node", "nobody")
    assert absent.returncode == 2
    assert "online are tiny" in absent.stderr
    cancelled = ask(mosquitto, "--max-tokens", "440", "--cancel-after", "0")
    assert cancelled.returncode == 1
    assert "499 cancelled" in cancelled.stderr


def test_streamed_text_adds_up_to_the_answer(client: Client) -> None:
    events = list(client.ask(question(**LONG), PATIENCE))
    text = "".join(e["text"] for e in events if e["event"] == "delta")
    assert text == events[-1]["text"]
    assert events[-1]["usage"]["completion_tokens"] > 50


def test_a_structured_answer_streams_and_is_json_of_its_schema(client: Client) -> None:
    schema = {"type": "json_schema", "json_schema": LAMP}
    events = list(client.ask(question(response_format=schema, stream=True), PATIENCE))
    text = "".join(e["text"] for e in events if e["event"] == "delta")
    assert text == events[-1]["text"]
    assert_lamp(json.loads(text))


def test_a_tool_is_called_with_arguments_of_its_schema(client: Client) -> None:
    # Short, for each character is a token: the explanation of tools fills most of the context.
    on = {"properties": {"on": {"type": "boolean"}}, "required": ["on"]}
    tool = {"name": "lamp", "parameters": {"type": "object", **on, "additionalProperties": False}}
    asked = question("on", tools=[tool], tool_choice="required")
    done = list(client.ask(asked, PATIENCE))[-1]
    assert (done["event"], done.get("finish_reason")) == ("done", "tool_call"), done
    assert done["tool_call"]["name"] == "lamp"
    assert done["tool_call"]["arguments"] in ({"on": True}, {"on": False})


def test_the_second_turn_of_a_conversation_reads_only_what_is_new(client: Client) -> None:
    turns = [
        list(client.ask(question(words, conversation="hall", max_tokens=8), PATIENCE))[-1]
        for words in ("how warm is it in the hall?", "and in the attic?")
    ]
    assert [done["conversation"] for done in turns] == [
        {"id": "hall", "turn": 1},
        {"id": "hall", "turn": 2},
    ]
    first, second = (done["usage"] for done in turns)
    assert second["prompt_tokens"] > first["prompt_tokens"]
    assert second["cached_tokens"] >= first["prompt_tokens"]


def test_the_size_changes_in_the_middle_of_an_answer(client: Client) -> None:
    def switched() -> dict[str, Any]:
        events = client.ask(question(id=uuid.uuid4().hex, submodel="full", **LONG), PATIENCE)
        running = next(e for e in events if e["event"] == "delta")["id"]
        client.control("submodel", {"submodel": "nested", "id": running})
        return list(events)[-1]

    done = until(switched, lambda done: len(done["switches"]) > 1)
    assert [s["submodel"] for s in done["switches"]] == ["full", "nested"]
    assert done["submodel"] == "nested"


def test_an_engine_that_is_killed_is_replaced_and_the_answer_is_the_same(
    client: Client, node: subprocess.Popen[bytes]
) -> None:
    whole = list(client.ask(question(**LONG), PATIENCE))[-1]["text"]

    def interrupted() -> dict[str, Any]:
        events = client.ask(question(**LONG), PATIENCE)
        next(e for e in events if e["event"] == "delta")
        engine_of(node).kill()
        return list(events)[-1]

    done = until(interrupted, lambda done: done["attempt"] > 1)
    assert (done["event"], done["attempt"]) == ("done", 2)
    assert done["text"] == whole


def test_a_stopped_daemon_finishes_its_answer_and_leaves_nothing_behind(
    client: Client, node: subprocess.Popen[bytes]
) -> None:
    engine = engine_of(node)
    events = client.ask(question(**LONG), PATIENCE)
    next(e for e in events if e["event"] == "delta")
    started = time.monotonic()
    node.send_signal(signal.SIGTERM)
    assert list(events)[-1]["event"] == "done"
    assert node.wait(10) == 0
    assert time.monotonic() - started < 10
    assert not engine.is_running()


@pytest.mark.usefixtures("client")
def test_a_killed_daemon_leaves_no_engine_behind(node: subprocess.Popen[bytes]) -> None:
    engine = engine_of(node)
    node.kill()
    node.wait()
    _, alive = psutil.wait_procs([engine], timeout=5)
    for survivor in alive:
        survivor.kill()
    assert not alive


@pytest.mark.usefixtures("client")
def test_mosquittos_request_response_tool_gets_the_answer(mosquitto: Mosquitto) -> None:
    reply = subprocess.run(
        [
            "mosquitto_rr",
            *("-p", str(mosquitto.port), "-W", "20", "-q", "1"),
            *("-t", "nestd/v1/tiny/request/generate", "-e", "clients/shell/answer"),
            *("-m", json.dumps(question(max_tokens=5))),
        ],
        capture_output=True,
        text=True,
    )
    assert json.loads(reply.stdout)["usage"]["completion_tokens"] == 5


def test_a_bundle_that_is_missing_is_one_clear_sentence(tmp_path: Path) -> None:
    command = nestd("run", "--profile", "generic", "--bundle", str(tmp_path / "none"))
    result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert result.returncode == 2
    assert "nestd convert" in result.stderr
    assert "Traceback" not in result.stderr


def test_small_messages_do_not_wait_for_delayed_acknowledgements(client: Client) -> None:
    """With Nagle's algorithm a control message behind a delta took 40 ms."""
    sock = client._transport._client.socket()  # type: ignore[attr-defined]
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
