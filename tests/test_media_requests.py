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
from support.node import REPLY, Node

from nestd.daemon.elastic.memory import Memory
from nestd.daemon.engine.messages import KeepEncoders, MediaContent, TextContent

PICTURE = b"\xff\xd8\xff a picture"
SOUND = b"RIFF1234WAVE a clip"


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(encoders=True, state_directory=tmp_path).start()


def base64_part(kind: str, data: bytes, **more: Any) -> dict[str, Any]:
    return {"type": kind, "data": base64.b64encode(data).decode()} | more


def ask(node: Node, *parts: dict[str, Any], **fields: Any) -> None:
    node.ask(**{"id": "a", "messages": [{"role": "user", "content": list(parts)}]} | fields)


def started(node: Node) -> list[MediaContent]:
    content = node.engine.starts[-1].messages[-1].content
    assert not isinstance(content, str)
    return [part for part in content if isinstance(part, MediaContent)]


def stored(node: Node) -> list[Path]:
    directory = node.settings.media_path
    return sorted(file for file in directory.glob("*") if file.is_file())


def test_a_picture_reaches_the_engine_as_a_file(node: Node) -> None:
    ask(
        node,
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
    ask(node, base64_part("image", PICTURE))
    assert len(stored(node)) == 1
    node.engine.finish()
    node.settle()
    assert node.last()["event"] == "done"
    assert stored(node) == []


def test_a_file_stays_while_the_engine_still_has_a_cancelled_request(node: Node) -> None:
    ask(node, base64_part("image", PICTURE))
    node.control("cancel", id="a")
    assert node.last()["code"] == "cancelled"
    assert len(stored(node)) == 1
    node.engine.finish(reason="cancelled")
    node.settle()
    assert stored(node) == []


def test_two_requests_with_one_picture_share_its_file(node: Node) -> None:
    ask(node, base64_part("image", PICTURE))
    ask(node, base64_part("image", PICTURE), id="b")
    assert len(stored(node)) == 1
    node.engine.finish()
    node.settle()
    assert started(node)[0].path.read_bytes() == PICTURE


def test_no_medium_waits_in_memory(node: Node) -> None:
    ask(node, base64_part("image", PICTURE))
    ask(node, base64_part("image", PICTURE), id="waits")
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
    ask(node, base64_part(kind, PICTURE, detail=detail))
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
    ask(node, *parts)
    assert node.last()["code"] == code
    assert words in node.last()["message"]
    assert node.engine.starts == []
    assert stored(node) == []


@pytest.mark.parametrize("role", ["system", "assistant", "tool"])
def test_only_users_show_something(node: Node, role: str) -> None:
    node.ask(id="a", messages=[{"role": role, "content": [base64_part("image", PICTURE)]}])
    assert node.last()["code"] == "bad_request"
    assert "user's turn" in node.last()["message"]
    assert stored(node) == []


def test_a_full_store_is_told_and_empties_with_the_answers(tmp_path: Path) -> None:
    limits: dict[str, Any] = {"media__max_bytes": 1000, "media__store_bytes": 1500}
    node = Node(encoders=True, state_directory=tmp_path, **limits).start()
    ask(node, base64_part("image", b"1" * 1000))
    ask(node, base64_part("image", b"2" * 1000), id="b")
    assert node.last()["code"] == "queue_full"
    assert "room for 500 bytes" in node.last()["message"]
    assert node.last()["retry_after_ms"] > 0
    node.engine.finish()
    node.settle()
    ask(node, base64_part("image", b"2" * 1000), id="b")
    assert node.last()["event"] == "accepted"


def test_a_disk_that_takes_nothing_is_told(tmp_path: Path) -> None:
    (tmp_path / "media-node").write_text("a file in the directory's place")
    node = Node(encoders=True, state_directory=tmp_path).start()
    ask(node, base64_part("image", PICTURE))
    assert node.last()["code"] == "queue_full"
    assert "cannot store the medium" in node.last()["message"]


def test_the_same_media_again_get_the_stored_answer(node: Node) -> None:
    ask(node, base64_part("image", PICTURE))
    node.engine.finish("a cat")
    node.settle()
    ask(node, base64_part("image", PICTURE))
    assert node.last()["text"] == "a cat"
    assert len(node.engine.starts) == 1
    ask(node, base64_part("image", SOUND))
    assert node.last()["code"] == "id_reused"


def test_a_request_that_killed_the_engine_finds_its_media_again(node: Node) -> None:
    ask(node, base64_part("image", PICTURE))
    node.engine.die()
    node.pass_time(1)
    node.engine.ready()
    node.settle()
    assert started(node)[0].path.read_bytes() == PICTURE


def test_a_daemon_that_starts_clears_what_the_last_one_left(tmp_path: Path) -> None:
    node = Node(encoders=True, state_directory=tmp_path).start()
    ask(node, base64_part("image", PICTURE))
    assert len(stored(node)) == 1
    assert stored(Node(encoders=True, state_directory=tmp_path)) == []


# Encoders


def test_a_bundle_without_the_encoder_says_what_it_takes(tmp_path: Path) -> None:
    node = Node(state_directory=tmp_path).start()
    ask(node, base64_part("audio", SOUND))
    assert (node.last()["code"], node.last()["status"]) == ("modality_unavailable", 503)
    assert "takes text" in node.last()["message"]
    assert node.uploads.subscriptions == [], "nor does it take blobs"


def test_the_engine_may_keep_what_the_next_request_needs(node: Node) -> None:
    assert node.engine.keeps == []
    ask(node, base64_part("image", PICTURE))
    kinds = [command.kind for command in node.engine.commands]
    assert node.engine.keeps == [KeepEncoders(keep=("vision",))]
    assert kinds.index("keep_encoders") < kinds.index("start")


def test_a_new_engine_hears_which_encoders_may_stay(node: Node) -> None:
    ask(node, base64_part("audio", SOUND))
    node.engine.die()
    node.pass_time(1)
    node.engine.ready()
    node.settle()
    assert node.engine.keeps == [KeepEncoders(keep=("audio",))]


def test_an_encoder_that_nobody_uses_is_unloaded(tmp_path: Path) -> None:
    unload: dict[str, Any] = {"elastic__memory__encoder_unload_s": 10}
    node = Node(encoders=True, state_directory=tmp_path, **unload).start()
    ask(node, base64_part("image", PICTURE))
    node.engine.finish()
    node.settle()
    for _ in range(12):
        node.pass_time(1)
    assert node.engine.keeps == [KeepEncoders(keep=("vision",)), KeepEncoders(keep=())]


def test_a_request_whose_encoder_does_not_fit_is_told_when_to_come_again(node: Node) -> None:
    node.board.facts = node.board.facts.__class__(
        time=0.0, memory=Memory(available_bytes=1500 * 2**20)
    )
    node.pass_time(1)
    ask(node, base64_part("audio", SOUND))
    assert node.last()["code"] == "modality_unavailable"
    assert "does not fit in memory" in node.last()["message"]
    assert node.last()["retry_after_ms"] > 0
    assert node.engine.starts == []
    assert stored(node) == []


def test_encoders_of_later_requests_wait_for_their_turn(node: Node) -> None:
    ask(node, base64_part("image", PICTURE))
    ask(node, {"type": "text", "text": "no media"}, id="b")
    ask(node, base64_part("audio", SOUND), id="c")
    node.pass_time(1)
    assert node.engine.keeps[-1].keep == ("vision",)
    for _ in range(2):
        node.engine.finish()
        node.settle()
    assert "audio" in node.engine.keeps[-1].keep


def test_the_owner_switches_an_encoder_off_and_on(node: Node) -> None:
    ask(node, base64_part("image", PICTURE))
    node.engine.finish()
    node.settle()
    reply = node.control("modality", modality="vision", enabled=False)
    assert reply["ok"]
    assert reply["data"]["planned"] == []
    assert "switched vision off" in reply["data"]["reason"]
    assert node.engine.keeps[-1] == KeepEncoders(keep=())
    ask(node, base64_part("image", PICTURE), id="b")
    assert node.last()["code"] == "modality_unavailable"
    assert "switched vision off" in node.last()["message"]
    ask(node, base64_part("audio", SOUND), id="c")
    assert len(node.engine.starts) == 2, "the other encoder is none of its business"
    reply = node.control("modality", modality="vision", enabled=True)
    assert "vision" in reply["data"]["planned"]
    assert node.engine.keeps[-1] == KeepEncoders(keep=("vision", "audio"), load=("vision",))


def test_a_waiting_request_is_refused_when_its_encoder_is_switched_off(node: Node) -> None:
    ask(node, {"type": "text", "text": "first"})
    ask(node, base64_part("image", PICTURE), id="b")
    node.control("modality", modality="vision", enabled=False)
    node.engine.finish()
    node.settle()
    assert node.last()["id"] == "b"
    assert node.last()["code"] == "modality_unavailable"


def test_an_encoder_that_was_switched_on_stays_for_a_while(node: Node) -> None:
    node.control("modality", modality="audio", enabled=True)
    node.pass_time(1)
    assert node.engine.keeps[-1].load == ("audio",)
    assert node.state()["modalities_reason"] == "audio was used lately"


@pytest.mark.parametrize("modality", ["vision", "all"])
def test_idle_encoders_are_unloaded_at_once_and_nothing_is_forbidden(
    node: Node, modality: str
) -> None:
    ask(node, base64_part("image", PICTURE))
    node.engine.finish()
    node.settle()
    reply = node.control("modality", modality=modality, unload=True)
    assert reply["data"] == {
        "modality": modality,
        "unload": True,
        "planned": [],
        "reason": "the owner has unloaded vision"
        + ("; the owner has unloaded audio" if modality == "all" else ""),
    }
    assert node.engine.keeps[-1] == KeepEncoders(keep=())
    node.pass_time(1.1)
    assert node.engine.keeps[-1] == KeepEncoders(keep=()), "it does not count as used lately"
    assert node.state()["modalities_off"] == []
    ask(node, base64_part("image", PICTURE), id="b")
    assert len(node.engine.starts) == 2
    assert node.engine.keeps[-1] == KeepEncoders(keep=("vision",))


def test_unloading_leaves_a_running_request_its_encoder(node: Node) -> None:
    node.control("modality", modality="audio", enabled=True)
    ask(node, base64_part("image", PICTURE))
    reply = node.control("modality", modality="all", unload=True)
    assert reply["data"]["planned"] == ["vision"]
    assert node.engine.keeps[-1] == KeepEncoders(keep=("vision",))
    node.engine.finish()
    node.settle()
    assert node.kinds()[-1] == "done"


def test_what_was_switched_off_stays_so_when_it_is_unloaded(node: Node) -> None:
    node.control("modality", modality="vision", enabled=False)
    node.control("modality", modality="all", unload=True)
    node.pass_time(1.1)
    assert node.state()["modalities_off"] == ["vision"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"modality": "vision"}, "either enabled"),
        ({"modality": "vision", "unload": False}, "either enabled"),
        ({"modality": "vision", "enabled": True, "unload": True}, "either enabled"),
        ({"modality": "all", "enabled": True}, "one by one"),
    ],
)
def test_an_encoder_is_either_switched_or_unloaded(
    node: Node, fields: dict[str, Any], words: str
) -> None:
    reply = node.control("modality", **fields)
    assert reply["error"]["code"] == "bad_request"
    assert words in reply["error"]["message"]


def test_no_text_bundle_can_be_told_to_see(tmp_path: Path) -> None:
    node = Node(state_directory=tmp_path).start()
    for enabled in (True, False):
        reply = node.control("modality", modality="vision", enabled=enabled)
        assert reply["error"]["code"] == "modality_unavailable"
    reply = node.control("modality", modality="vision", unload=True)
    assert reply["error"]["code"] == "modality_unavailable"


def test_the_state_tells_what_is_loaded_and_the_info_what_could_be(node: Node) -> None:
    assert node.state()["modalities"] == ["text"]
    node.engine.stats(encoders=("vision",))
    node.settle()
    assert node.state()["modalities"] == ["text", "vision"]
    info = node.last(f"{node.base}/info")
    assert info["modalities"] == ["text", "vision", "audio"]
    assert info["media"]["image_sizes"] == [256, 512, 768]
    assert info["media"]["image_size"] == 768
    assert "BlobInit" in info["schemas"]


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
        assert stored(node) == []
        assert node.transport.acknowledged == [1]
