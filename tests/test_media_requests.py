"""Media in requests, from the message to what the engine is told to start."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.media import PICTURE, SOUND, base64_part
from support.node import REPLY, Node

from nestd.daemon.engine.messages import MediaContent, TextContent


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(encoders=True, state_directory=tmp_path).start()


def started(node: Node) -> list[MediaContent]:
    content = node.engine.starts[-1].messages[-1].content
    assert not isinstance(content, str)
    return [part for part in content if isinstance(part, MediaContent)]


def test_a_picture_reaches_the_engine_as_a_file(node: Node) -> None:
    node.ask_about(
        {"type": "text", "text": "what is"},
        base64_part("image", PICTURE, content_type="image/jpeg"),
        {"type": "text", "text": "this?"},
    )
    content = node.engine.starts[-1].messages[-1].content
    assert content[0] == TextContent(text="what is")
    assert content[2] == TextContent(text="this?")
    [picture] = started(node)
    assert picture.path.read_bytes() == PICTURE
    assert picture.sha256 == hashlib.sha256(PICTURE).hexdigest()
    assert (picture.content_type, picture.size) == ("image/jpeg", 768)


def test_the_file_is_gone_when_the_request_has_ended(node: Node) -> None:
    node.ask_about(base64_part("image", PICTURE))
    assert len(node.stored_media()) == 1
    node.engine.finish()
    node.settle()
    assert node.last()["event"] == "done"
    assert node.stored_media() == []


def test_a_file_stays_while_the_engine_still_has_a_cancelled_request(node: Node) -> None:
    node.ask_about(base64_part("image", PICTURE))
    node.control("cancel", id="a")
    assert node.last()["code"] == "cancelled"
    assert len(node.stored_media()) == 1
    node.engine.finish(reason="cancelled")
    node.settle()
    assert node.stored_media() == []


def test_two_requests_with_one_picture_share_its_file(node: Node) -> None:
    node.ask_about(base64_part("image", PICTURE))
    node.ask_about(base64_part("image", PICTURE), id="b")
    assert len(node.stored_media()) == 1
    node.engine.finish()
    node.settle()
    assert started(node)[0].path.read_bytes() == PICTURE


def test_no_medium_waits_in_memory(node: Node) -> None:
    node.ask_about(base64_part("image", PICTURE))
    node.ask_about(base64_part("image", PICTURE), id="waits")
    [record] = node.daemon.node.book.waiting
    assert base64.b64encode(PICTURE).decode() not in repr(record)
    assert all(entry.received.payload == b"" for entry in record.entries)


@pytest.mark.parametrize(
    ("kind", "detail", "size"),
    [
        ("image", "low", 256),
        ("image", "auto", 512),
        ("image", "high", 768),
        ("video", "auto", 256),
        ("video", "high", 768),
        ("audio", "high", None),
    ],
)
def test_detail_chooses_a_size_of_the_bundle(
    tmp_path: Path, kind: str, detail: str, size: int | None
) -> None:
    node = Node(encoders=True, state_directory=tmp_path, media__image_size=600).start()
    node.ask_about(base64_part(kind, PICTURE, detail=detail))
    assert started(node)[0].size == size


def test_the_payload_itself_may_be_the_medium(node: Node) -> None:
    node.transport.deliver(
        f"{node.base}/request/generate",
        SOUND,
        content_type="audio/wav",
        response_topic=REPLY,
        user_properties=(("prompt", "what is that?"), ("id", "a")),
    )
    node.settle()
    [clip] = started(node)
    assert clip.path.read_bytes() == SOUND
    assert (clip.type, clip.content_type) == ("audio", "audio/wav")
    assert node.engine.starts[-1].messages[-1].content[1] == TextContent(text="what is that?")


def test_a_picture_in_an_earlier_turn_goes_along(node: Node) -> None:
    node.ask(
        id="a",
        messages=[
            {"role": "user", "content": [base64_part("image", PICTURE)]},
            {"role": "assistant", "content": "a cat"},
            {
                "role": "user",
                "content": [{"type": "text", "text": "what "}, {"type": "text", "text": "colour?"}],
            },
        ],
    )
    first, second, third = node.engine.starts[-1].messages
    assert isinstance(first.content[0], MediaContent)
    assert (second.content, third.content) == ("a cat", "what colour?")


@pytest.mark.parametrize(
    ("parts", "code", "words"),
    [
        ([{"type": "image", "data": "no base64!"}], "bad_request", "not base64"),
        ([{"type": "image", "data": "aGk=\n"}], "bad_request", "not base64"),
        ([{"type": "image", "data": "data:image/png;base64,aGk="}], "bad_request", "not base64"),
        ([{"type": "image", "data": "aGk\u00e9"}], "bad_request", "not base64"),
        ([{"type": "image", "blob": "unknown"}], "blob_not_found", "send init"),
        ([base64_part("image", b"x" * 5000)], "too_large", "at most 4096"),
        ([base64_part("image", b"x" * 4097)], "too_large", "at most 4096"),
        ([base64_part("audio", SOUND)] * 4, "too_large", "4 media: send at most 3"),
    ],
)
def test_a_medium_that_is_wrong_is_refused_and_leaves_nothing(
    tmp_path: Path, parts: list[dict[str, Any]], code: str, words: str
) -> None:
    limits: dict[str, Any] = {"media__max_bytes": 4096, "media__max_per_request": 3}
    node = Node(encoders=True, state_directory=tmp_path, **limits).start()
    node.ask_about(*parts)
    assert node.last()["code"] == code
    assert words in node.last()["message"]
    assert node.engine.starts == []
    assert node.stored_media() == []


@pytest.mark.parametrize("role", ["system", "assistant", "tool"])
def test_only_users_show_something(node: Node, role: str) -> None:
    node.ask(id="a", messages=[{"role": role, "content": [base64_part("image", PICTURE)]}])
    assert node.last()["code"] == "bad_request"
    assert "user's turn" in node.last()["message"]
    assert node.stored_media() == []


def test_a_full_store_is_told_and_empties_with_the_answers(tmp_path: Path) -> None:
    limits: dict[str, Any] = {"media__max_bytes": 1000, "media__store_bytes": 1500}
    node = Node(encoders=True, state_directory=tmp_path, **limits).start()
    node.ask_about(base64_part("image", b"1" * 1000))
    node.ask_about(base64_part("image", b"2" * 1000), id="b")
    assert node.last()["code"] == "queue_full"
    assert "room for 500 bytes" in node.last()["message"]
    assert node.last()["retry_after_ms"] > 0
    node.engine.finish()
    node.settle()
    node.ask_about(base64_part("image", b"2" * 1000), id="b")
    assert node.last()["event"] == "accepted"


def test_a_disk_that_takes_nothing_is_told(tmp_path: Path) -> None:
    (tmp_path / "media-node").write_text("a file in the directory's place")
    node = Node(encoders=True, state_directory=tmp_path).start()
    node.ask_about(base64_part("image", PICTURE))
    assert node.last()["code"] == "queue_full"
    assert "cannot store the medium" in node.last()["message"]


def test_the_same_media_again_get_the_stored_answer(node: Node) -> None:
    node.ask_about(base64_part("image", PICTURE))
    node.engine.finish("a cat")
    node.settle()
    node.ask_about(base64_part("image", PICTURE))
    assert node.last()["text"] == "a cat"
    assert len(node.engine.starts) == 1
    node.ask_about(base64_part("image", SOUND))
    assert node.last()["code"] == "id_reused"


def test_a_request_that_killed_the_engine_finds_its_media_again(node: Node) -> None:
    node.ask_about(base64_part("image", PICTURE))
    node.engine.die()
    node.pass_time(1)
    node.engine.ready()
    node.settle()
    assert started(node)[0].path.read_bytes() == PICTURE


def test_a_daemon_that_starts_clears_what_the_last_one_left(tmp_path: Path) -> None:
    node = Node(encoders=True, state_directory=tmp_path).start()
    node.ask_about(base64_part("image", PICTURE))
    assert len(node.stored_media()) == 1
    assert Node(encoders=True, state_directory=tmp_path).stored_media() == []


# Whatever comes


PART = st.fixed_dictionaries(
    {"type": st.sampled_from(["image", "audio", "video", "text", "film"])},
    optional={
        "data": st.sampled_from(["aGk=", "aGk", "", "=", "\u00e9"]) | st.text(max_size=6),
        "blob": st.sampled_from(["a", "..", "a/b", ""]),
        "payload": st.booleans() | st.none(),
        "text": st.text(max_size=4),
        "detail": st.sampled_from(["low", "auto", "high", "most"]),
        "content_type": st.none() | st.text(max_size=5),
    },
)
CONTENT = st.text(max_size=3) | st.lists(PART, max_size=4)
TURN = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "user", "assistant", "system"]), "content": CONTENT}
)


@settings(max_examples=80, deadline=None)
@given(st.lists(TURN, max_size=3), st.sampled_from([None, "image/png", "audio/wav", "image/gif"]))
def test_any_request_is_accepted_or_refused_and_a_refused_one_leaves_no_file(
    messages: list[dict[str, Any]], content_type: str | None
) -> None:
    node = Node(encoders=True).start()
    fields = {"messages": json.dumps(messages), "id": "a", "stream": "true"}
    node.transport.deliver(
        f"{node.base}/request/generate",
        b"\x89PNG" if content_type else b"{}",
        content_type=content_type,
        response_topic=REPLY,
        user_properties=tuple(fields.items()),
    )
    node.settle()
    assert node.kinds() in (["accepted"], ["error"])
    assert len(node.engine.starts) == node.kinds().count("accepted")
    if node.kinds() == ["error"]:
        assert node.last()["code"] != "internal"
        assert node.stored_media() == []
        assert node.transport.acknowledged == [1]
