"""`nestd ask`: what it prints and the status it returns."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from nestd.bundle.errors import ConfigError
from nestd.cli import ask
from nestd.cli.main import build_parser

DONE: dict[str, Any] = {
    "id": "a",
    "event": "done",
    "attempt": 1,
    "text": "one two",
    "finish_reason": "stop",
    "submodel": "full",
    "switches": [{"token": 0, "submodel": "full"}, {"token": 3, "submodel": "small"}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 8},
    "timings": {"queue_ms": 1, "encode_ms": 0, "prefill_ms": 20, "decode_ms": 400},
}
ERROR: dict[str, Any] = {
    "id": "a",
    "event": "error",
    "attempt": 1,
    "code": "cancelled",
    "status": 499,
    "message": "the client cancelled the request",
}


def delta(text: str, attempt: int = 1) -> dict[str, Any]:
    return {"id": "a", "event": "delta", "attempt": attempt, "text": text}


def parse(*arguments: str) -> argparse.Namespace:
    return build_parser().parse_args(["ask", *arguments])


def test_what_is_not_given_is_left_to_the_node() -> None:
    assert ask.request_fields(parse("hello")) == {
        "messages": [{"role": "user", "content": "hello"}],
        "submodel": "auto",
        "effort": "auto",
        "stream": True,
        "expires_in": 300.0,
    }


def test_options_reach_the_request() -> None:
    args = parse("hi", "--system", "be brief", "--max-tokens", "5", "--no-stream", "--seed", "0")
    fields = ask.request_fields(args)
    assert fields["messages"][0] == {"role": "system", "content": "be brief"}
    assert (fields["max_tokens"], fields["stream"], fields["seed"]) == (5, False, 0)


def test_a_schema_file_and_a_conversation_reach_the_request(tmp_path: Path) -> None:
    (tmp_path / "answer.json").write_text('{"type": "boolean"}')
    args = parse("warm?", "--schema", str(tmp_path / "answer.json"), "--conversation", "hall")
    fields = ask.request_fields(args)
    wanted = {"type": "json_schema", "json_schema": {"type": "boolean"}}
    assert (fields["response_format"], fields["conversation"]) == (wanted, "hall")


@pytest.mark.parametrize("content", [None, b"", b"{type", b"[]", b"\xff", b"[" * 100_000])
def test_a_schema_file_that_is_none_is_a_sentence_that_names_it(
    tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "answer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"answer\.json"):
        ask.request_fields(parse("warm?", "--schema", str(path)))


def test_text_streams_and_the_figures_follow(capsys: pytest.CaptureFixture[str]) -> None:
    assert ask.print_text([delta("one "), delta("two"), DONE]) == 0
    out, err = capsys.readouterr()
    assert out == "one two\n"
    assert "full -> small from token 3 | 8 tokens | 20.0 tokens/s" in err


def test_joules_are_told_where_the_board_can_tell(capsys: pytest.CaptureFixture[str]) -> None:
    ask.print_text([DONE | {"joules": 4.21}])
    assert "decode 400 ms | 4.2 J | stop" in capsys.readouterr().err


def test_a_lost_delta_costs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    ask.print_text([delta("two"), DONE])
    assert capsys.readouterr().out == "two\none two\n"


def test_a_new_attempt_starts_from_the_beginning(capsys: pytest.CaptureFixture[str]) -> None:
    ask.print_text([delta("one"), delta("one ", 2), DONE | {"attempt": 2}])
    out, err = capsys.readouterr()
    assert out == "oneone two\n"
    assert "attempt 2" in err


def test_an_error_is_printed_and_is_the_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert ask.print_text([ERROR]) == 1
    assert "499 cancelled: the client cancelled the request" in capsys.readouterr().err


def test_json_prints_each_event(capsys: pytest.CaptureFixture[str]) -> None:
    assert ask.print_json([delta("é"), DONE]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["delta", "done"]
    assert "é" in lines[0]
    assert ask.print_json([ERROR]) == 1
