"""Which encoders the engine may keep: what requests need, what fits, what the owner wants."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.media import PICTURE, SOUND, base64_part
from support.node import Node

from nestd.daemon.elastic.memory import Memory
from nestd.daemon.engine.messages import KeepEncoders


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(encoders=True, state_directory=tmp_path).start()


def test_a_bundle_without_the_encoder_says_what_it_takes(tmp_path: Path) -> None:
    node = Node(state_directory=tmp_path).start()
    node.ask_about(base64_part("audio", SOUND))
    assert (node.last()["code"], node.last()["status"]) == ("modality_unavailable", 503)
    assert "takes text" in node.last()["message"]
    assert node.uploads.subscriptions == [], "nor does it take blobs"


def test_the_engine_may_keep_what_the_next_request_needs(node: Node) -> None:
    assert node.engine.keeps == []
    node.ask_about(base64_part("image", PICTURE))
    kinds = [command.kind for command in node.engine.commands]
    assert node.engine.keeps == [KeepEncoders(keep=("vision",))]
    assert kinds.index("keep_encoders") < kinds.index("start")


def test_a_new_engine_hears_which_encoders_may_stay(node: Node) -> None:
    node.ask_about(base64_part("audio", SOUND))
    node.engine.die()
    node.pass_time(1)
    node.engine.ready()
    node.settle()
    assert node.engine.keeps == [KeepEncoders(keep=("audio",))]


def test_an_encoder_that_nobody_uses_is_unloaded(tmp_path: Path) -> None:
    unload: dict[str, Any] = {"elastic__memory__encoder_unload_s": 10}
    node = Node(encoders=True, state_directory=tmp_path, **unload).start()
    node.ask_about(base64_part("image", PICTURE))
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
    node.ask_about(base64_part("audio", SOUND))
    assert node.last()["code"] == "modality_unavailable"
    assert "does not fit in memory" in node.last()["message"]
    assert node.last()["retry_after_ms"] > 0
    assert node.engine.starts == []
    assert node.stored_media() == []


def test_encoders_of_later_requests_wait_for_their_turn(node: Node) -> None:
    node.ask_about(base64_part("image", PICTURE))
    node.ask_about({"type": "text", "text": "no media"}, id="b")
    node.ask_about(base64_part("audio", SOUND), id="c")
    node.pass_time(1)
    assert node.engine.keeps[-1].keep == ("vision",)
    for _ in range(2):
        node.engine.finish()
        node.settle()
    assert "audio" in node.engine.keeps[-1].keep


def test_the_owner_switches_an_encoder_off_and_on(node: Node) -> None:
    node.ask_about(base64_part("image", PICTURE))
    node.engine.finish()
    node.settle()
    reply = node.control("modality", modality="vision", enabled=False)
    assert reply["ok"]
    assert reply["data"]["planned"] == []
    assert "switched vision off" in reply["data"]["reason"]
    assert node.engine.keeps[-1] == KeepEncoders(keep=())
    node.ask_about(base64_part("image", PICTURE), id="b")
    assert node.last()["code"] == "modality_unavailable"
    assert "switched vision off" in node.last()["message"]
    node.ask_about(base64_part("audio", SOUND), id="c")
    assert len(node.engine.starts) == 2, "the other encoder is none of its business"
    reply = node.control("modality", modality="vision", enabled=True)
    assert "vision" in reply["data"]["planned"]
    assert node.engine.keeps[-1] == KeepEncoders(keep=("vision", "audio"), load=("vision",))


def test_a_waiting_request_is_refused_when_its_encoder_is_switched_off(node: Node) -> None:
    node.ask_about({"type": "text", "text": "first"})
    node.ask_about(base64_part("image", PICTURE), id="b")
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
    node.ask_about(base64_part("image", PICTURE))
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
    node.ask_about(base64_part("image", PICTURE), id="b")
    assert len(node.engine.starts) == 2
    assert node.engine.keeps[-1] == KeepEncoders(keep=("vision",))


def test_unloading_leaves_a_running_request_its_encoder(node: Node) -> None:
    node.control("modality", modality="audio", enabled=True)
    node.ask_about(base64_part("image", PICTURE))
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
