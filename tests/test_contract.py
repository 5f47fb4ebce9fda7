"""Reading messages: limits before decoding, errors that name the key, properties that override."""

import json
import time
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nestd.bundle.errors import BadRequest, RequestError, TooLarge
from nestd.daemon.mqtt.contract import CancelRequest, Request, TextPart
from nestd.daemon.mqtt.packets import Received
from nestd.daemon.mqtt.parse import (
    Envelope,
    ParseLimits,
    check_depth,
    read_control,
    read_envelope,
    read_request,
)
from nestd.daemon.mqtt.schemas import schemas
from nestd.daemon.mqtt.topics import Topics

TOPICS = Topics("nestd", "node")
LIMITS = ParseLimits(max_bytes=2000, max_depth=8, max_prompt_chars=500)
HELLO = {"messages": [{"role": "user", "content": "hello"}]}


def envelope(payload: Any, **properties: Any) -> Envelope:
    data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    return read_envelope(Received("t", data, **properties), "generate", TOPICS, LIMITS)


def request(payload: Any, **properties: Any) -> Request:
    return read_request(envelope(payload, **properties), LIMITS)


def complaint(payload: Any, **properties: Any) -> str:
    with pytest.raises(RequestError) as caught:
        request(payload, **properties)
    return str(caught.value)


def test_a_small_request_gets_the_defaults() -> None:
    found = request(HELLO)
    assert found.submodel == "auto"
    assert found.stream is False
    assert found.messages[0].content == "hello"


def test_user_properties_override_the_json() -> None:
    found = request(
        HELLO | {"max_tokens": 5, "stop": ["x"]},
        user_properties=(("max_tokens", "7"), ("stream", "true"), ("stop", "a"), ("stop", "b")),
    )
    assert (found.max_tokens, found.stream, found.stop) == (7, True, ("a", "b"))


def test_messages_may_come_as_a_user_property() -> None:
    found = request({}, user_properties=(("messages", json.dumps(HELLO["messages"])),))
    assert found.messages[0].content == "hello"
    assert "messages" in complaint({}, user_properties=(("messages", "{"),))


def test_content_may_be_a_list_of_parts() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    found = request({"messages": [{"role": "user", "content": parts}]})
    assert found.messages[0].content == (
        TextPart(type="text", text="a"),
        TextPart(type="text", text="b"),
    )


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        (HELLO | {"colour": 1}, "unknown key 'colour'"),
        ({"messages": [{"role": "user", "content": "x", "name": "y"}]}, "messages.0.name"),
        ({}, "messages is missing"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        (HELLO | {"max_tokens": 0}, "max_tokens"),
        (HELLO | {"priority": 10}, "priority"),
        (HELLO | {"temperature": -1}, "temperature"),
        (HELLO | {"response_format": {"type": "xml"}}, "response_format.type"),
        (HELLO | {"response_format": {"type": "json_schema"}}, "give json_schema with the type"),
        (HELLO | {"tools": [{"name": "two words"}]}, "tools.0.name"),
        (HELLO | {"id": "with blank"}, "id"),
        (HELLO | {"id": 7}, "id"),
        (HELLO | {"reply_to": 7}, "reply_to"),
        (b"[]", "must be a JSON object"),
        (b"", "not valid JSON"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"{" * 9, "nests deeper than 8"),
    ],
)
def test_what_is_wrong_is_named(payload: Any, words: str) -> None:
    assert words in complaint(payload)


def test_no_value_of_a_request_is_quoted_in_an_error() -> None:
    assert "hunter2" not in complaint({"messages": [{"role": "hunter2", "content": ["hunter2"]}]})


def test_bytes_are_counted_before_anything_is_decoded() -> None:
    with pytest.raises(TooLarge, match="3000 bytes"):
        request(b"x" * 3000)


def test_characters_of_the_prompt_are_counted() -> None:
    with pytest.raises(TooLarge, match="501 characters"):
        request({"messages": [{"role": "user", "content": "x" * 501}]})


MESSAGES = [{"role": "user", "content": [{"type": "image", "payload": True}]}]


def properties(**pairs: str) -> tuple[tuple[str, str], ...]:
    return tuple(pairs.items())


def test_a_raw_medium_comes_first_and_its_prompt_behind_it() -> None:
    found = request(
        b"RIFF", content_type="audio/wav", user_properties=properties(prompt="what?", seed="3")
    )
    content = found.messages[0].content
    assert [(part.type, getattr(part, "payload", None)) for part in content] == [
        ("audio", True),
        ("text", None),
    ]
    assert found.seed == 3


def test_a_raw_medium_may_stand_anywhere_in_messages() -> None:
    text = json.dumps([{"role": "user", "content": "look"}, *MESSAGES])
    found = request(b"x", content_type="image/JPEG; q=1", user_properties=properties(messages=text))
    assert len(found.messages) == 2


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        ({}, "either prompt or messages"),
        ({"prompt": "a", "messages": json.dumps(MESSAGES)}, "either prompt or messages"),
        ({"messages": json.dumps(HELLO["messages"])}, "0 parts refer to it"),
        ({"messages": json.dumps(MESSAGES * 2)}, "2 parts refer to it"),
        ({"prompt": "a", "colour": "red"}, "unknown key 'colour'"),
    ],
)
def test_exactly_one_part_stands_for_a_raw_medium(pairs: dict[str, str], words: str) -> None:
    found = complaint(b"x", content_type="image/png", user_properties=properties(**pairs))
    assert words in found


def test_json_cannot_be_its_own_medium() -> None:
    assert "the payload is JSON" in complaint({"messages": MESSAGES})


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({}, "exactly one of data, blob and payload"),
        ({"data": "", "blob": "b"}, "exactly one of data, blob and payload"),
        ({"blob": "../etc/passwd"}, "messages.0.content.0.image.blob"),
        ({"data": "", "detail": "huge"}, "messages.0.content.0.image.detail"),
        ({"data": "", "url": "http://x"}, "unknown key 'messages.0.content.0.image.url'"),
    ],
)
def test_a_media_part_that_is_wrong_is_named(part: dict[str, Any], words: str) -> None:
    assert words in complaint(
        {"messages": [{"role": "user", "content": [{"type": "image"} | part]}]}
    )


def test_a_content_type_that_is_neither_json_nor_a_medium_is_refused() -> None:
    assert "text/plain" in complaint(b"hi", content_type="text/plain")
    assert "the limit is 2000" in complaint(b"x" * 2001, content_type="image/png")


def test_a_raw_mediums_content_type_is_part_of_its_fingerprint() -> None:
    assert (
        envelope(b"x", content_type="image/png").fingerprint
        != envelope(b"x", content_type="image/jpeg").fingerprint
    )


def test_brackets_inside_strings_do_not_nest() -> None:
    check_depth(json.dumps({"a": '[[[["{{{{\\"[['}).encode(), 1)
    with pytest.raises(BadRequest):
        check_depth(b'{"a": [1]}', 1)


def test_the_depth_check_takes_linear_time_on_nasty_input() -> None:
    nasty = b'"' + b'\\"' * 500_000
    before = time.perf_counter()
    check_depth(nasty, 4)
    assert time.perf_counter() - before < 2


@given(st.binary(max_size=300))
def test_no_bytes_crash_the_reader(payload: bytes) -> None:
    with suppress(RequestError):
        request(payload)


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from([*Request.model_fields, "x"]), inner, max_size=4)
        ),
        max_leaves=12,
    )
)
def test_no_json_crashes_the_reader(document: Any) -> None:
    with suppress(RequestError):
        request(document)


def test_the_response_topic_property_beats_reply_to() -> None:
    found = envelope(HELLO | {"reply_to": "clients/a/x"}, response_topic="clients/b/x")
    assert (found.response_topic, found.client) == ("clients/b/x", "b")


def test_a_bad_response_topic_is_a_problem_but_the_answer_has_a_place() -> None:
    found = envelope(HELLO, response_topic="home/lamp/set")
    assert found.response_topic == "nestd/v1/node/response/generate"
    assert isinstance(found.problem, BadRequest)


@pytest.mark.parametrize(
    ("correlation_data", "expected"),
    [(b"abc", "abc"), (b"\x01\x02", "0102"), (None, None), (b"", None)],
)
def test_correlation_data_is_the_id_where_the_json_has_none(
    correlation_data: bytes | None, expected: str | None
) -> None:
    assert envelope(HELLO, correlation_data=correlation_data).id == expected


def test_long_correlation_data_becomes_a_digest() -> None:
    found = envelope(HELLO, correlation_data=b"\xff" * 200).id
    assert found is not None
    assert len(found) == 64


def test_the_id_of_a_broken_request_is_still_read() -> None:
    found = envelope(HELLO | {"id": "a", "colour": 1})
    assert found.id == "a"
    assert found.problem is None


def test_fingerprints_tell_payloads_and_properties_apart() -> None:
    prints = {
        envelope(HELLO).fingerprint,
        envelope(HELLO | {"seed": 1}).fingerprint,
        envelope(HELLO, user_properties=(("seed", "1"),)).fingerprint,
    }
    assert len(prints) == 3


def test_control_requests_are_strict_too() -> None:
    with pytest.raises(BadRequest, match="unknown key 'x'"):
        read_control(CancelRequest, envelope({"id": "a", "x": 1}))


def test_every_message_has_a_schema_that_forbids_unknown_keys() -> None:
    for name, schema in schemas().items():
        assert schema["additionalProperties"] is False, name
    json.dumps(schemas())
