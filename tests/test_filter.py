"""The owner's filter before and behind the model: real programs, and a daemon around them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.node import PATIENCE, Node, settings_for_tests, until

from nestd.bundle.errors import ConfigError
from nestd.daemon.config import HIDDEN, explain_settings

# A filter in Python; each test gives the lines that make a verdict of `document`.
PROGRAM = """\
import json, os, sys, time
document = json.load(sys.stdin)
{lines}
json.dump(verdict, sys.stdout)
"""


@pytest.fixture
def program(tmp_path: Path) -> Callable[[str], list[str]]:
    """Return the value of filter.command for a program with these lines."""

    def write(lines: str) -> str:
        file = tmp_path / "judge.py"
        file.write_text(PROGRAM.format(lines=lines))
        return [sys.executable, str(file)]

    return write


def start(**overrides: object) -> Node:
    listed = {f"filter__{key}": value for key, value in overrides.items()}
    return Node(**listed).start()


def answer(node: Node, text: str) -> dict[str, Any]:
    """Let the engine answer `text` to what runs, and return the last event."""
    until(node, lambda: node.engine.starts)
    node.engine.delta(text)
    node.engine.finish(text)
    until(node, lambda: node.kinds()[-1] in ("done", "error"))
    return node.last()


def test_a_request_that_a_pattern_matches_never_reaches_the_model() -> None:
    node = start(patterns=["(?i)garage code"], stages=["request"])
    mid = node.ask(id="a", messages=[{"role": "user", "content": "the Garage Code, please"}])
    until(node, lambda: node.kinds()[-1] == "error")
    assert (node.last()["code"], node.last()["status"]) == ("refused", 403)
    assert node.engine.starts == []
    until(node, lambda: node.transport.acknowledged == [mid])
    node.ask(id="b")
    assert answer(node, "hello")["text"] == "hello"


def test_patterns_look_at_every_text_of_a_request() -> None:
    node = start(patterns=["secret"], stages=["request"])
    said = {"messages": [{"role": "user", "content": "hello"}]}
    tool = {"name": "f", "description": "a secret"}
    for number, fields in enumerate(
        [
            {"messages": [{"role": "system", "content": "a secret"}, *said["messages"]]},
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a secret"}]}]},
            said | {"tools": [tool]},
            said
            | {"response_format": {"type": "json_schema", "json_schema": {"title": "a secret"}}},
        ]
    ):
        node.ask(id=str(number), **fields)
        until(node, lambda: node.kinds()[-1] == "error")
        assert node.last()["code"] == "refused", fields
    assert node.engine.starts == []


def test_a_refused_answer_is_an_error_and_none_of_it_is_sent(
    program: Callable[[str], list[str]],
) -> None:
    lines = 'verdict = {"allow": "1234" not in document.get("text", ""), "reason": "no codes"}'
    node = start(command=program(lines))
    node.ask(id="a")
    event = answer(node, "it is 1234")
    assert event["code"] == "refused"
    assert "no codes" in event["message"]
    assert "1234" not in json.dumps(node.events())
    assert "delta" not in node.kinds()


def test_a_replacement_takes_the_place_of_a_refused_answer() -> None:
    node = start(patterns=["1234"], replacement="I cannot help with that.")
    node.ask(id="a", conversation="c")
    event = answer(node, "it is 1234")
    assert event["text"] == "I cannot help with that."
    assert event["finish_reason"] == "content_filter"
    node.ask(id="b", conversation="c")
    until(node, lambda: len(node.engine.starts) == 2)
    said = [message.content for message in node.engine.starts[-1].messages]
    assert said == ["hello", "I cannot help with that.", "hello"]


def test_a_program_may_change_an_answer_and_sees_what_was_asked(
    program: Callable[[str], list[str]],
) -> None:
    lines = """
verdict = {"allow": True}
if document["stage"] == "answer":
    asked = document["messages"][-1]["text"]
    verdict["text"] = f"{document['client']} {document['id']} {asked} {document['text'].upper()}"
"""
    node = start(command=program(lines))
    node.ask(id="a")
    event = answer(node, "hi")
    assert event["text"] == "me a hello HI"
    assert event["finish_reason"] == "content_filter"


def test_an_answer_that_passes_unchanged_ends_as_it_ended(
    program: Callable[[str], list[str]],
) -> None:
    node = start(command=program('verdict = {"allow": True}'))
    node.ask(id="a")
    event = answer(node, "hi")
    assert (event["text"], event["finish_reason"]) == ("hi", "stop")
    assert node.kinds() == ["accepted", "done"]  # no delta before it has passed


def test_without_an_answer_stage_text_streams() -> None:
    node = start(patterns=["never"], stages=["request"])
    node.ask(id="a")
    answer(node, "hi")
    assert node.kinds() == ["accepted", "delta", "done"]


def test_an_answer_of_a_schema_is_never_replaced() -> None:
    node = start(patterns=["1234"], replacement="no", stages=["answer"])
    node.ask(id="a", response_format={"type": "json_object"})
    assert answer(node, '{"code": 1234}')["code"] == "refused"


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("raise SystemExit(3)", "ended with status 3"),
        ("verdict = {'allow': 'perhaps'}", "says no verdict: allow"),
        ("verdict = {'allow': True, 'allowed': 1}", "says no verdict: allowed"),
        ("print('hello'); verdict = {'allow': True}", "says no verdict"),
        ("time.sleep(60); verdict = {'allow': True}", "took longer than filter.timeout_s"),
        ("os.fork() or time.sleep(60); time.sleep(60)", "took longer than filter.timeout_s"),
        ("os.close(1); os._exit(0)", "says no verdict"),
    ],
)
def test_a_filter_that_fails_lets_nothing_pass(
    program: Callable[[str], list[str]], caplog: pytest.LogCaptureFixture, lines: str, words: str
) -> None:
    node = start(command=program(lines), timeout_s=1.5 if "longer" in words else PATIENCE)
    node.ask(id="a")
    until(node, lambda: node.kinds()[-1] == "error")
    event = node.last()
    assert (event["code"], event["status"]) == ("internal", 500)
    assert "filter failed" in event["message"]
    assert event["retry_after_ms"] > 0
    assert node.engine.starts == []
    assert words in caplog.text


def test_a_program_that_is_not_there_lets_nothing_pass(caplog: pytest.LogCaptureFixture) -> None:
    node = start(command=["/nonexistent/judge"], stages=["answer"])
    node.ask(id="a")
    assert answer(node, "hi")["code"] == "internal"
    assert "correct filter.command" in caplog.text


def test_a_pattern_that_backtracks_for_ever_is_cut_off(caplog: pytest.LogCaptureFixture) -> None:
    node = start(patterns=["(a+)+$"], timeout_s=1.5)
    node.ask(id="a", messages=[{"role": "user", "content": "a" * 60 + "!"}])
    until(node, lambda: node.kinds()[-1] == "error")
    assert node.last()["code"] == "internal"
    assert "took longer" in caplog.text


def test_the_daemon_works_while_the_filter_thinks(
    program: Callable[[str], list[str]], tmp_path: Path
) -> None:
    go = tmp_path / "go"
    wait = f"while not os.path.exists({str(go)!r}): time.sleep(0.01)\nverdict = {{'allow': True}}"
    node = start(command=program(wait), timeout_s=30)
    node.ask(id="a")
    node.ask(id="b")
    assert node.control("health")["ok"]
    assert node.control("cancel", id="b")["ok"]
    assert node.last()["code"] == "cancelled"
    go.write_text("")
    until(node, lambda: node.engine.starts)
    node.engine.finish("hi")
    until(node, lambda: node.last()["event"] == "done")
    assert node.last()["id"] == "a"


def test_a_stop_waits_for_an_answer_that_is_judged_and_not_for_a_program_that_hangs(
    program: Callable[[str], list[str]],
) -> None:
    lines = "time.sleep(0.3)\nverdict = {'allow': True}"
    node = start(command=program(lines), stages=["answer"])
    node.ask(id="a")
    until(node, lambda: node.engine.starts)
    node.engine.finish("hi")
    node.settle()
    node.daemon.shutdown()
    assert node.last()["text"] == "hi"


def test_nothing_but_path_is_in_the_programs_environment(
    program: Callable[[str], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NESTD_TOKEN", "hidden")
    lines = "verdict = {'allow': False, 'reason': ' '.join(sorted(os.environ))}"
    node = start(command=program(lines), stages=["request"])
    node.ask(id="a")
    until(node, lambda: node.kinds()[-1] == "error")
    assert "PATH" in node.last()["message"]
    assert "NESTD_TOKEN" not in node.last()["message"]


def test_a_broken_pattern_is_a_mistake_in_the_configuration() -> None:
    with pytest.raises(ConfigError, match="is no regular expression"):
        settings_for_tests(filter__patterns=["("])


def test_what_is_filtered_is_told_to_nobody() -> None:
    for patterns, told in (([], []), (["garage"], HIDDEN)):
        explained = explain_settings(
            None, "generic", {"filter.patterns": patterns}, {}, Path("/nonexistent")
        )
        assert explained.redacted()["filter"]["patterns"] == told
