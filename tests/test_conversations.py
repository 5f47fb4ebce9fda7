"""Conversations: what is remembered, for whom and how long, and what it keeps alive."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest
from support.media import encoded, photo
from support.node import REPLY, Node


def turns(node: Node) -> list[tuple[str, Any]]:
    """The last prompt as (role, content)."""
    return [(item.role, item.content) for item in node.engine.starts[-1].messages]


def say(node: Node, number: int, text: str, answer: str, reply: str = REPLY, **fields: Any) -> Any:
    """Ask, let the engine answer, and return the final event."""
    messages = [{"role": "user", "content": text}]
    fields = {"id": f"r{number}", "conversation": "c", "messages": messages} | fields
    node.ask(reply=reply, **fields)
    node.engine.finish(answer)
    node.settle()
    node.transport.confirm()
    node.settle()
    return node.events(reply)[-1]


@pytest.fixture
def node() -> Node:
    return Node().start()


def test_the_next_turn_brings_only_what_is_new(node: Node) -> None:
    first = say(node, 1, "lamp on", "it is on")
    second = say(node, 2, "and off", "it is off")
    assert (first["conversation"], second["conversation"]) == (
        {"id": "c", "turn": 1},
        {"id": "c", "turn": 2},
    )
    assert turns(node) == [("user", "lamp on"), ("assistant", "it is on"), ("user", "and off")]


def test_a_request_without_a_conversation_is_not_remembered(node: Node) -> None:
    done = say(node, 1, "lamp on", "it is on", conversation=None)
    assert done["conversation"] is None
    say(node, 2, "and off", "it is off")
    assert turns(node) == [("user", "and off")]


def test_each_client_has_conversations_of_its_own(node: Node) -> None:
    say(node, 1, "my secret", "kept")
    other = say(node, 1, "what did I say", "nothing", reply="clients/other/replies")
    assert other["conversation"]["turn"] == 1
    assert turns(node) == [("user", "what did I say")]


def test_a_new_system_message_takes_the_place_of_the_first(node: Node) -> None:
    system = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "a"}]
    say(node, 1, "", "b", messages=system)
    say(node, 2, "c", "d")
    assert [role for role, _ in turns(node)] == ["system", "user", "assistant", "user"]
    system = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "e"}]
    say(node, 3, "", "f", messages=system)
    assert turns(node)[0] == ("system", "be kind")
    assert [role for role, _ in turns(node)].count("system") == 1


def test_what_nobody_goes_on_with_is_forgotten() -> None:
    node = Node(limits__conversation_expiry_s=60).start()
    say(node, 1, "a", "b")
    node.pass_time(61)
    assert say(node, 2, "c", "d")["conversation"]["turn"] == 1


def test_the_least_recently_used_is_forgotten_first() -> None:
    node = Node(limits__conversations=2).start()
    for number, name in enumerate(("x", "y", "x", "z")):
        say(node, number, "a", "b", conversation=name)
    assert say(node, 5, "a", "b", conversation="x")["conversation"]["turn"] == 3
    assert say(node, 6, "a", "b", conversation="y")["conversation"]["turn"] == 1


def test_a_conversation_that_gets_too_long_says_so() -> None:
    node = Node(limits__max_prompt_chars=20).start()
    say(node, 1, "twelve chars", "and many more of them")
    node.ask(id="r2", conversation="c", messages=[{"role": "user", "content": "on"}])
    error = node.events()[-1]
    assert (error["status"], "begin another one" in error["message"]) == (413, True)


def test_an_answer_that_failed_leaves_the_conversation_as_it_was(node: Node) -> None:
    say(node, 1, "a", "b")
    node.ask(id="r2", conversation="c", messages=[{"role": "user", "content": "c"}])
    node.control("cancel", id="r2")
    node.settle()
    say(node, 3, "d", "e")
    assert turns(node) == [("user", "a"), ("assistant", "b"), ("user", "d")]


def test_a_request_that_runs_again_has_each_turn_once(node: Node) -> None:
    say(node, 1, "a", "b")
    node.ask(id="r2", conversation="c", messages=[{"role": "user", "content": "c"}])
    node.engine.die()
    node.pass_time(5)
    node.engine.ready()
    node.settle()
    assert turns(node) == [("user", "a"), ("assistant", "b"), ("user", "c")]


def test_a_picture_stays_while_its_conversation_does() -> None:
    node = Node(encoders=True, limits__conversation_expiry_s=60).start()
    data = base64.b64encode(encoded(photo(8, 8), "PNG")).decode()
    parts = [{"type": "image", "data": data}, {"type": "text", "text": "what is it"}]
    say(node, 1, "", "a lamp", messages=[{"role": "user", "content": parts}])
    say(node, 2, "is it on", "yes")
    picture = node.engine.starts[-1].messages[0].content[0]
    assert not isinstance(picture, str)
    assert picture.type == "image"
    path: Path = picture.path
    assert path.is_file()
    node.pass_time(120)
    say(node, 3, "hello", "hi")
    node.settle()
    assert not path.exists()


def test_a_tools_result_comes_behind_its_call(node: Node) -> None:
    tool = {"name": "set_light", "parameters": {"type": "object"}}
    call = '{"name":"set_light","parameters":{}}'
    done = say(node, 1, "light on", call, tools=[tool])
    assert done["finish_reason"] == "tool_call"
    assert done["tool_call"] == {"name": "set_light", "arguments": {}}
    result = [{"role": "tool", "content": "it is on"}]
    say(node, 2, "", "The light is on.", messages=result, tools=[tool])
    roles = [role for role, _ in turns(node)]
    assert roles == ["system", "user", "assistant", "user"]
    assert node.engine.starts[-1].structure is not None
