"""The remote rung as clients see it: a daemon, its scripted engine, and a server that misbehaves.

tests/test_remote_server.py has the same with a server of somebody else.
"""

from __future__ import annotations

import json
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from support.chat_servers import Call, Misbehaving, misbehaving
from support.node import PATIENCE, Node, until

from nestd.daemon.elastic.memory import Memory
from nestd.daemon.elastic.power import Power
from nestd.daemon.elastic.thermal import Thermal

pytest.importorskip("httpx2", reason="the extra `remote` is not installed")

KEY = "sk-key-that-nobody-may-see"
PICTURE = "iVBORw0KGgo="  # the first bytes of a PNG, which is all that anybody looks at here
TOOL = {"name": "light", "parameters": {"type": "object", "properties": {"on": {}}}}


def final(node: Node) -> dict[str, Any]:
    """Return `done` or `error` of the last request."""
    until(node, lambda: node.kinds() and node.kinds()[-1] in ("done", "error"))
    node.settle()
    return node.last()


class House:
    """Nodes and servers of a test, which are closed behind it."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack

    def server(self, script: Callable[[Call], None]) -> Misbehaving:
        return self._stack.enter_context(misbehaving(script))

    def node(self, base_url: str, encoders: bool = False, **overrides: object) -> Node:
        settings = {
            "enabled": True,
            "base_url": base_url,
            "allow_http": True,
            "model": "big",
            "default": "allowed",
        } | overrides
        others = {key: settings.pop(key) for key in list(settings) if "__" in key}
        remote = {f"remote__{key}": value for key, value in settings.items()}
        node = Node(encoders, **remote, **others).start()
        self._stack.callback(node.daemon.node.remote.close)
        return node


@pytest.fixture
def house() -> Iterator[House]:
    with ExitStack() as stack:
        yield House(stack)


def hello(call: Call) -> None:
    call.stream()
    call.chunk("hel", role="assistant")
    call.chunk("lo")
    call.chunk(reason="stop")
    usage = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}
    call.send(json.dumps({"choices": [], "usage": usage}))
    call.end()


def closed_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}/v1"


# Where a request goes


def test_a_request_for_high_effort_is_answered_by_the_server(house: House) -> None:
    server = house.server(hello)
    node = house.node(server.url)
    mid = node.ask(id="a", effort="high", max_tokens=7, temperature=0.5, seed=3, stop=["END"])
    done = final(node)
    reason = "the request asks for high effort, and the remote server is the last rung"
    assert node.kinds() == ["accepted", "delta", "delta", "done"]
    assert [event["seq"] for event in node.events()] == [0, 1, 2, 3]
    accepted = node.events()[0]
    assert (accepted["remote"], accepted["remote_reason"]) == (True, reason)
    assert [event["text"] for event in node.events()[1:3]] == ["hel", "lo"]
    assert (done["text"], done["finish_reason"], done["attempt"]) == ("hello", "stop", 1)
    assert (done["submodel"], done["remote_model"]) == ("remote", "big")
    assert done["switches"] == [{"token": 0, "submodel": "remote", "reason": reason}]
    assert (done["usage"]["prompt_tokens"], done["usage"]["completion_tokens"]) == (5, 2)
    assert done["joules"] is None
    assert node.engine.starts == []
    assert node.transport.acknowledged == [mid]
    assert server.asked[0] == {
        "model": "big",
        "messages": [{"role": "user", "content": "hello"}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 7,
        "temperature": 0.5,
        "seed": 3,
        "stop": ["END"],
    }


@pytest.mark.parametrize(
    "fields",
    [
        {"remote": "never", "effort": "high"},
        {"remote": "allowed"},
        {"remote": "allowed", "effort": "low"},
    ],
)
def test_without_consent_or_a_reason_this_board_answers(
    house: House, fields: dict[str, Any]
) -> None:
    server = house.server(hello)
    node = house.node(server.url)
    node.ask(id="a", **fields)
    node.engine.finish()
    assert final(node)["remote_model"] is None
    assert server.asked == []


def test_requests_that_say_nothing_stay_here_unless_the_owner_says_otherwise(house: House) -> None:
    server = house.server(hello)
    node = house.node(server.url, default="never")
    node.ask(id="a", effort="high")
    node.engine.finish()
    assert final(node)["submodel"] == "full"
    node.ask(id="b", effort="high", remote="allowed")
    assert final(node)["remote_model"] == "big"


def make_empty(node: Node) -> None:
    power = Power(on_battery=True, battery_percent=2.0)
    node.board.facts = node.board.facts.__class__(
        time=0.0, memory=node.board.facts.memory, power=power
    )


def make_full(node: Node) -> None:
    node.board.facts = node.board.facts.__class__(time=0.0, memory=Memory(available_bytes=1))


def make_hot(node: Node) -> None:
    thermal = Thermal(celsius=90.0, throttle_c=85.0)
    node.board.facts = node.board.facts.__class__(
        time=0.0, memory=node.board.facts.memory, thermal=thermal
    )


@pytest.mark.parametrize(
    ("worsen", "reason", "words"),
    [
        (make_empty, "battery", "the battery is below 5 %"),
        (make_full, "memory", "no more fits in the memory that is free"),
        (make_hot, "heat", "the board is at the temperature that slows it down"),
    ],
)
def test_a_board_in_need_sends_its_requests_away_if_the_owner_named_that_reason(
    house: House, worsen: Callable[[Node], None], reason: str, words: str
) -> None:
    server = house.server(hello)
    node = house.node(server.url, reasons=[reason])
    worsen(node)
    node.pass_time(2)
    node.ask(id="a")
    assert final(node)["switches"][0]["reason"] == words
    assert node.state()["remote_reason"] == words

    others = [name for name in ("task", "memory", "battery", "heat") if name != reason]
    node = house.node(server.url, reasons=others)
    worsen(node)
    node.pass_time(2)
    node.ask(id="a")
    assert len(server.asked) == 1
    assert not node.events()[0].get("remote", False)


def test_a_request_that_requires_the_server_gets_it_or_an_error(house: House) -> None:
    server = house.server(hello)
    node = house.node(server.url)
    node.ask(id="a", remote="required")
    assert final(node)["switches"][0]["reason"] == "the request requires the remote server"

    node = Node().start()
    node.ask(id="b", remote="required")
    assert (node.last()["code"], node.last()["status"]) == ("remote_unavailable", 503)
    assert "this node has no remote server" in node.last()["message"]


def test_a_request_for_the_server_does_not_wait_for_an_engine_that_loads(house: House) -> None:
    server = house.server(hello)
    node = house.node(server.url)
    node.engine.die()
    node.settle()
    node.ask(id="a", effort="high")
    assert final(node)["remote_model"] == "big"


def test_a_server_that_is_slow_holds_nobody_else_up(house: House) -> None:
    def wait(call: Call) -> None:
        call.stream()
        call.chunk("first")
        assert call.server.let_go.wait(PATIENCE)
        call.chunk(reason="stop")
        call.end()

    server = house.server(wait)
    node = house.node(server.url)
    node.ask(id="slow", effort="high")
    until(node, lambda: "delta" in node.kinds())
    node.ask(id="quick")
    node.pass_time(2)
    assert node.state()["queue"]["running"] == 2
    node.engine.finish("quick")
    assert (final(node)["id"], final(node)["text"]) == ("quick", "quick")
    server.let_go.set()
    until(node, lambda: node.last()["id"] == "slow")
    assert node.last()["text"] == "first"


def test_the_server_has_no_more_requests_at_once_than_the_owner_allows(house: House) -> None:
    def wait(call: Call) -> None:
        assert call.server.let_go.wait(PATIENCE)
        hello(call)

    server = house.server(wait)
    node = house.node(server.url, max_concurrent=1)
    node.ask(id="a", effort="high")
    node.ask(id="b", effort="high")
    node.ask(id="c")
    until(node, lambda: server.asked)
    node.settle()
    assert len(server.asked) == 1
    assert len(node.engine.starts) == 1, "the one that may run here does not wait behind them"
    server.let_go.set()
    until(node, lambda: node.kinds().count("done") == 2)
    assert len(server.asked) == 2


# What goes wrong


def test_a_server_that_dies_in_the_middle_of_an_answer(house: House) -> None:
    def die(call: Call) -> None:
        call.stream()
        call.chunk("The answ")

    server = house.server(die)
    node = house.node(server.url)
    mid = node.ask(id="a", effort="high")
    until(node, lambda: node.engine.starts)
    node.engine.delta("From here")
    node.engine.finish("From here.")
    done = final(node)
    assert [(event["event"], event["attempt"]) for event in node.events()] == [
        ("accepted", 1),
        ("delta", 1),
        ("accepted", 2),
        ("delta", 2),
        ("done", 2),
    ]
    trouble = "the remote server broke the connection off"
    assert node.events()[2]["remote"] is False
    assert node.events()[2]["remote_reason"] == trouble
    assert (done["text"], done["submodel"], done["remote_model"]) == ("From here.", "full", None)
    assert done["switches"][0]["reason"].startswith(f"{trouble}; the request asks for high effort")
    assert node.transport.acknowledged == [mid]


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (
            lambda call: call.answer(401),
            "asks for a key: set remote.api_key_file (401)",
        ),
        (lambda call: call.answer(404), "does not know remote.model"),
        (lambda call: call.answer(400), "does not take this request (400)"),
        (lambda call: call.answer(429), "has too much to do (429)"),
        (lambda call: call.answer(500), "has failed (500)"),
        (lambda call: call.answer(302, Location="http://10.0.0.1/"), "redirects"),
        (lambda call: call.answer(200, b"<html>", Content_Type="text/html"), "does not stream"),
        (lambda call: (call.stream(), call.send("{oops")), "none of the chat API"),
        (lambda call: (call.stream(), call.send('{"choices": 3}')), "none of the chat API"),
        (lambda call: (call.stream(), call.send('{"error": "no"}')), "told an error"),
        (lambda call: (call.stream(), call.chunk("half"), call.end()), "ended in the middle"),
        (
            lambda call: (call.stream(), call.chunk("x", "moved"), call.end()),
            "broke the answer off",
        ),
        (lambda call: (call.stream(), call.chunk("x" * 2_000_000)), "does not stream events"),
        (lambda call: call.server.let_go.wait(PATIENCE), "was silent"),
    ],
)
def test_whatever_the_server_does_wrong_this_board_answers_and_says_why(
    house: House, script: Callable[[Call], object], words: str
) -> None:
    server = house.server(lambda call: (script(call), None)[1])
    node = house.node(server.url, read_timeout_s=0.5)
    node.ask(id="a", effort="high")
    until(node, lambda: node.engine.starts)
    node.engine.finish()
    assert words in final(node)["switches"][0]["reason"]
    assert final(node)["event"] == "done"
    health = node.control("health")["data"]
    assert health["counters"]["remote_failed"] == 1

    node.now += 100
    node.ask(id="b", remote="required")
    error = final(node)
    assert (error["code"], error["id"]) == ("remote_unavailable", "b")
    assert words in error["message"]


def test_a_server_that_cannot_be_reached_is_left_alone_for_a_while(house: House) -> None:
    node = house.node(closed_port(), pause_s=30)
    node.ask(id="a", effort="high")
    until(node, lambda: node.engine.starts)
    node.engine.finish()
    assert final(node)["attempt"] == 2
    assert "cannot be reached" in final(node)["switches"][0]["reason"]

    node.ask(id="b", effort="high")
    assert node.last()["remote"] is False
    assert node.last()["remote_reason"].endswith("it is left alone for 30 s")
    assert node.state()["remote_reason"] == node.last()["remote_reason"]
    node.engine.finish()
    assert (final(node)["id"], final(node)["attempt"]) == ("b", 1)

    node.ask(id="c", remote="required")
    assert node.last()["code"] == "remote_unavailable"
    assert 0 < node.last()["retry_after_ms"] <= 30_000
    node.pass_time(31)
    node.ask(id="d", effort="high")
    accepted = next(event for event in node.events() if event["id"] == "d")
    assert accepted["remote"] is True


def test_a_board_that_cannot_answer_either_says_both(house: House) -> None:
    node = house.node(closed_port())
    make_empty(node)
    node.pass_time(2)
    node.ask(id="a")
    error = final(node)
    assert error["code"] == "power_saver"
    assert "the battery is below 5 %" in error["message"]
    assert "the remote server cannot be reached" in error["message"]


def test_a_cancel_ends_the_request_and_its_connection(house: House) -> None:
    ended: list[bool] = []

    def endless(call: Call) -> None:
        call.stream()
        try:
            while not call.server.let_go.wait(0.02):
                call.chunk("on and ")
        except OSError:
            ended.append(True)

    server = house.server(endless)
    node = house.node(server.url)
    node.ask(id="a", effort="high")
    until(node, lambda: "delta" in node.kinds())
    assert node.control("cancel", id="a")["data"]["was"] == "running"
    assert final(node)["code"] == "cancelled"
    count = len(node.events())
    until(node, lambda: ended)
    assert len(node.events()) == count

    node.ask(id="b", effort="high", expires_in=10)
    until(node, lambda: node.kinds()[-1] == "delta")
    node.pass_time(11)
    assert final(node)["code"] == "expired"
    until(node, lambda: len(ended) == 2)
    assert node.daemon.node.book.remote == ()


def test_a_node_that_stops_waits_for_the_answer_and_ends(house: House) -> None:
    server = house.server(hello)
    node = house.node(server.url)
    node.ask(id="a", effort="high")
    node.daemon.shutdown()
    assert node.last()["remote_model"] == "big"


# Keys


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    file = tmp_path / "key"
    file.write_text(f"{KEY}\n")
    return file


def test_the_key_goes_into_the_header_and_a_new_one_counts_at_once(
    house: House, key_file: Path
) -> None:
    server = house.server(hello)
    node = house.node(server.url, api_key_file=str(key_file))
    node.ask(id="a", effort="high")
    final(node)
    key_file.write_text("another\n")
    node.ask(id="b", effort="high")
    until(node, lambda: node.last()["id"] == "b" and node.last()["event"] == "done")
    assert server.keys == [f"Bearer {KEY}", "Bearer another"]


def test_a_wrong_key_is_told_and_never_shown(
    house: House, key_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")

    def refuse(call: Call) -> None:
        call.answer(401, f"wrong: {call.headers['Authorization']}".encode(), X_Key=KEY)

    server = house.server(refuse)
    node = house.node(server.url, api_key_file=str(key_file))
    node.ask(id="a", effort="high")
    until(node, lambda: node.engine.starts)
    node.engine.finish()
    reason = final(node)["switches"][0]["reason"]
    assert "the remote server refuses the key: correct remote.api_key_file (401)" in reason
    key_file.write_text(f"{KEY}\u00e9\n")
    node.pass_time(100)
    node.ask(id="b", remote="required")
    assert "remote.api_key_file cannot be read" in final(node)["message"]
    assert "holds characters that no key has" in caplog.text
    assert KEY not in caplog.text
    published = b"".join(message.payload for message in node.transport.published)
    assert KEY.encode() not in published
    assert server.keys == [f"Bearer {KEY}"]


def test_the_server_is_trusted_by_its_certificate(house: House, tmp_path: Path) -> None:
    pki = pytest.importorskip("support.pki", reason="trustme is not installed")
    ours, strangers = pki.Authority(tmp_path / "ours"), pki.Authority(tmp_path / "strangers")
    pair = ours.issue("localhost")
    server = house.server(hello)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.certificate, pair.key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    url = server.url.replace("http://127.0.0.1", "https://localhost")
    node = house.node(url, allow_http=False, ca_file=str(ours.file))
    node.ask(id="a", remote="required")
    assert final(node)["text"] == "hello"
    node = house.node(url, allow_http=False, ca_file=str(strangers.file))
    node.ask(id="a", remote="required")
    assert final(node)["code"] == "remote_unavailable"
    assert "certificate verify failed" in final(node)["message"]
    assert len(server.asked) == 1


# What goes through


def test_a_conversation_goes_on_wherever_it_was_answered(house: House) -> None:
    server = house.server(hello)
    node = house.node(server.url)
    node.ask(id="a", effort="high", conversation="hall")
    assert final(node)["conversation"] == {"id": "hall", "turn": 1}
    node.ask(id="b", conversation="hall", messages=[{"role": "user", "content": "and then?"}])
    roles = [(turn.role, turn.content) for turn in node.engine.starts[0].messages]
    assert roles == [("user", "hello"), ("assistant", "hello"), ("user", "and then?")]
    node.engine.finish("well")
    final(node)
    node.ask(id="c", effort="high", conversation="hall")
    until(node, lambda: node.last()["id"] == "c" and node.last()["event"] == "done")
    assert [turn["content"] for turn in server.asked[1]["messages"]] == [
        "hello", "hello", "and then?", "well", "hello",
    ]  # fmt: skip


def test_tools_are_called_through_the_server_and_their_results_go_back(house: House) -> None:
    def call_light(call: Call) -> None:
        call.stream()
        first = {"index": 0, "id": "x", "function": {"name": "light", "arguments": ""}}
        call.chunk(tool_calls=[first])
        for piece in ('{"on"', ": true}"):
            call.chunk(tool_calls=[{"index": 0, "function": {"arguments": piece}}])
        call.chunk(reason="tool_calls")
        call.end()

    server = house.server(call_light)
    node = house.node(server.url)
    node.ask(id="a", effort="high", tools=[TOOL], tool_choice="light")
    done = final(node)
    assert done["finish_reason"] == "tool_call"
    assert done["tool_call"] == {"name": "light", "arguments": {"on": True}}
    assert done["usage"] is None, "the server told no figures"
    asked = server.asked[0]
    assert asked["tools"][0]["function"]["name"] == "light"
    assert asked["tool_choice"] == {"type": "function", "function": {"name": "light"}}
    turns = [
        {"role": "user", "content": "light, please"},
        {"role": "assistant", "content": done["text"]},
        {"role": "tool", "content": "it is on"},
    ]
    node.ask(id="b", effort="high", tools=[TOOL], messages=turns)
    until(node, lambda: len(server.asked) == 2)
    called, result = server.asked[1]["messages"][1:]
    assert json.loads(called["tool_calls"][0]["function"]["arguments"]) == {"on": True}
    assert result == {
        "role": "tool",
        "tool_call_id": called["tool_calls"][0]["id"],
        "content": "it is on",
    }


@pytest.mark.parametrize(
    ("fields", "chunk", "words"),
    [
        (
            {"tools": [TOOL], "tool_choice": "required"},
            {"text": "I would rather talk", "reason": "stop"},
            "without the call that was required",
        ),
        (
            {"tools": [TOOL]},
            {"tool_calls": [{"function": {"name": "door"}}], "reason": "tool_calls"},
            "called no tool of the request",
        ),
        (
            {"response_format": {"type": "json_object"}},
            {"text": "Sure! Here it is:", "reason": "stop"},
            "answered no JSON",
        ),
    ],
)
def test_an_answer_that_is_not_of_the_form_asked_for_is_made_here(
    house: House, fields: dict[str, Any], chunk: dict[str, Any], words: str
) -> None:
    def answer(call: Call) -> None:
        call.stream()
        call.chunk(**chunk)
        call.end()

    node = house.node(house.server(answer).url)
    node.ask(id="a", effort="high", **fields)
    until(node, lambda: node.engine.starts)
    node.engine.finish("{}")
    assert words in final(node)["switches"][0]["reason"]


def test_json_of_some_form_is_no_call_of_a_tool(house: House) -> None:
    def answer(call: Call) -> None:
        call.stream()
        call.chunk('{"a": 1}', "stop")
        call.end()

    node = house.node(house.server(answer).url)
    node.ask(id="a", effort="high", tools=[TOOL])
    assert (final(node)["text"], final(node)["tool_call"]) == ('{"a": 1}', None)


def test_a_schema_goes_to_the_server(house: House) -> None:
    def answer(call: Call) -> None:
        call.stream()
        call.chunk('{"celsius": 21}', "stop")
        call.end()

    server = house.server(answer)
    node = house.node(server.url)
    schema = {"type": "object", "properties": {"celsius": {"type": "number"}}}
    form = {"type": "json_schema", "json_schema": schema}
    node.ask(id="a", effort="high", response_format=form)
    assert json.loads(final(node)["text"]) == {"celsius": 21}
    assert server.asked[0]["response_format"]["json_schema"]["schema"] == schema


def test_media_stay_here_unless_the_owner_lets_them_go(house: House) -> None:
    server = house.server(hello)
    picture = {"type": "image", "data": PICTURE}
    node = house.node(server.url, encoders=True)
    node.ask_about(picture, effort="high")
    assert node.last()["remote_reason"] == (
        "this node's owner lets no media go to the remote server"
    )
    assert len(node.engine.starts) == 1
    node.ask_about(picture, id="b", remote="required")
    assert node.last()["code"] == "remote_unavailable"

    node = house.node(server.url, encoders=True, allow_media=True)
    text = {"type": "text", "text": "what is it?"}
    node.ask_about(picture, text, effort="high")
    assert final(node)["remote_model"] == "big"
    url = f"data:image/png;base64,{PICTURE}"
    assert server.asked[0]["messages"][0]["content"] == [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "what is it?"},
    ]
    assert node.stored_media() == []


def test_the_owners_filter_judges_what_the_server_says(house: House) -> None:
    node = house.node(
        house.server(hello).url, filter__patterns=["hello"], filter__stages=["answer"]
    )
    node.ask(id="a", effort="high")
    assert final(node)["code"] == "refused"
    assert node.kinds() == ["accepted", "error"]


def test_the_owner_adds_fields_and_takes_them_away(house: House) -> None:
    server = house.server(hello)
    node = house.node(server.url, extra_fields={"top_k": 40, "stream_options": None})
    node.ask(id="a", effort="high")
    final(node)
    assert server.asked[0]["top_k"] == 40
    assert "stream_options" not in server.asked[0]
