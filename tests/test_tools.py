"""Tools and schemas: what the engine is told, and what an answer is taken for."""

from __future__ import annotations

import json
from typing import Any

import pytest

from nestd.bundle.errors import BadRequest
from nestd.daemon.engine.messages import ChatMessage
from nestd.daemon.mqtt.contract import Request, Tool
from nestd.daemon.tools import call_of, chosen_tools, structure_of, with_tools

LIGHT = {
    "name": "set_light",
    "description": "Switch a light.",
    "parameters": {
        "type": "object",
        "properties": {"room": {"type": "string"}, "on": {"type": "boolean"}},
        "required": ["room", "on"],
        "additionalProperties": False,
    },
}
CLOCK = {"name": "what_time", "description": "The time now."}


def request(**fields: Any) -> Request:
    messages = [{"role": "user", "content": "light on"}]
    return Request.model_validate({"messages": messages} | fields)


def test_plain_text_is_kept_to_nothing() -> None:
    assert structure_of(request()) is None
    assert structure_of(request(tools=[LIGHT], tool_choice="none")) is None


def test_a_schema_is_passed_on() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    structure = structure_of(
        request(response_format={"type": "json_schema", "json_schema": schema})
    )
    assert structure is not None
    assert json.loads(structure.json_schema) == schema
    assert not structure.or_text


def test_any_object_is_a_schema_too() -> None:
    structure = structure_of(request(response_format={"type": "json_object"}))
    assert structure is not None
    assert json.loads(structure.json_schema) == {"type": "object"}


@pytest.mark.parametrize(("choice", "or_text"), [("auto", True), ("required", False)])
def test_a_call_may_or_must_be_made(choice: str, or_text: bool) -> None:
    structure = structure_of(request(tools=[LIGHT, CLOCK], tool_choice=choice))
    assert structure is not None
    assert structure.or_text == or_text
    names = [
        item["properties"]["name"]["const"] for item in json.loads(structure.json_schema)["anyOf"]
    ]
    assert names == ["set_light", "what_time"]


def test_one_tool_may_be_named() -> None:
    chosen = request(tools=[LIGHT, CLOCK], tool_choice="what_time")
    assert [tool.name for tool in chosen_tools(chosen)] == ["what_time"]
    structure = structure_of(chosen)
    assert structure is not None
    assert not structure.or_text


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tools": [LIGHT], "tool_choice": "fly"}, "'fly'"),
        ({"tool_choice": "required"}, "no tools"),
        ({"tools": [LIGHT], "response_format": {"type": "json_object"}}, "exclude each other"),
    ],
)
def test_what_cannot_be_meant_is_a_bad_request(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(BadRequest, match=words):
        structure_of(request(**fields))


def test_tools_are_explained_in_the_system_message() -> None:
    turns = (
        ChatMessage(role="system", content="Be brief."),
        ChatMessage(role="user", content="light on"),
    )
    tools = (Tool.model_validate(LIGHT),)
    told = with_tools(turns, tools)
    assert [turn.role for turn in told] == ["system", "user"]
    assert str(told[0].content).startswith("Be brief.")
    assert '"set_light"' in str(told[0].content)
    assert with_tools(turns[1:], tools)[0].role == "system"
    assert with_tools(turns, ()) == turns


def test_a_tools_result_is_the_users_turn() -> None:
    turns = (
        ChatMessage(role="user", content="light on"),
        ChatMessage(role="assistant", content='{"name":"set_light"}'),
        ChatMessage(role="tool", content="it is on"),
    )
    told = with_tools(turns, ())
    assert [turn.role for turn in told] == ["user", "assistant", "user"]
    assert "it is on" in str(told[2].content)


def test_an_answer_is_a_call_where_it_is_one() -> None:
    tools = (Tool.model_validate(LIGHT),)
    call = call_of('{"name":"set_light","parameters":{"room":"hall","on":true}}', tools)
    assert call is not None
    assert (call.name, call.arguments) == ("set_light", {"room": "hall", "on": True})
    assert call_of("It is on.", tools) is None
    assert call_of('{"name":"set_light","para', tools) is None
    assert call_of('{"a":1}', ()) is None
