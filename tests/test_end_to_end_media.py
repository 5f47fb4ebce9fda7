"""Media with `nestd run` and `nestd ask`: real engine with tiny encoders, real broker."""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.clients import PATIENCE, Listener, listening, nestd, running_node
from support.media import clip, encoded, photo, tone
from support.mosquitto import Mosquitto

from nestd.bundle.manifest import Bundle

pytestmark = pytest.mark.broker

B = "nestd/v1/eyes"
# The second is small enough for a user property.
PICTURES = (encoded(photo(300, 200, 1), "PNG"), encoded(photo(150, 100, 2), "JPEG"))
SOUND = clip(tone(2.0), "WAV")


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def node(
    mosquitto: Mosquitto, media_bundle: Bundle, tmp_path: Path, state: Path
) -> Iterator[subprocess.Popen[bytes]]:
    config = (
        f"profile: generic\nnode: eyes\nbundle: {media_bundle.path}\n"
        f"mqtt: {{port: {mosquitto.port}}}\nstate_directory: {state}\n"
        "engine: {context_length: 480, prefill_chunk: 32, threads: 1}\n"
    )
    with running_node(tmp_path, config) as process:
        yield process


@pytest.fixture
def me(mosquitto: Mosquitto, node: subprocess.Popen[bytes]) -> Iterator[Listener]:
    with listening(mosquitto, "clients/me/#", f"{B}/state") as listener:
        listener.until(lambda state: state.get("phase") == "ready")
        assert node.poll() is None
        yield listener


def picture(data: bytes, **more: Any) -> dict[str, Any]:
    return {"type": "image", "data": base64.b64encode(data).decode()} | more


def stored(state: Path) -> list[str]:
    return [file.name for file in (state / "media-eyes").iterdir() if file.is_file()]


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def ask(me: Listener, *content: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """Send a request of one user turn and return its end."""
    sampling = {"id": uuid.uuid4().hex, "max_tokens": 8, "temperature": 0}
    request = sampling | {"messages": [{"role": "user", "content": list(content)}]} | fields
    me.publish(f"{B}/request/generate", request, response_topic="clients/me/answer")
    return me.until(lambda event: event.get("event") in ("done", "error"))


def upload(me: Listener, blob: str, data: bytes) -> None:
    stated = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    replies = {"response_topic": "clients/me/blob"}
    me.publish(f"{B}/blob/{blob}/init", stated, **replies)
    assert me.until(lambda reply: "ok" in reply)["ok"]
    for offset in reversed(range(0, len(data), 20_000)):
        me.publish(f"{B}/blob/{blob}/{offset}", data[offset : offset + 20_000], **replies)
    me.publish(f"{B}/blob/{blob}/fin", stated, **replies)
    assert me.until(lambda reply: "ok" in reply)["ok"]


def test_two_pictures_a_clip_and_text_arrive_in_three_ways(me: Listener, state: Path) -> None:
    upload(me, "clip", SOUND)
    content = [
        {"type": "image", "payload": True},
        text("or"),
        picture(PICTURES[1], detail="low"),
        {"type": "audio", "blob": "clip"},
        text("which?"),
    ]
    me.publish(
        f"{B}/request/generate",
        PICTURES[0],
        content_type="image/png",
        response_topic="clients/me/answer",
        user_properties=(
            ("messages", json.dumps([{"role": "user", "content": content}])),
            ("max_tokens", "8"),
            ("temperature", "0"),
        ),
    )
    mixed = me.until(lambda event: "event" in event)
    assert mixed["event"] == "done", mixed
    content[0] = picture(PICTURES[0])
    content[3] = {"type": "audio", "data": base64.b64encode(SOUND).decode()}
    same = ask(me, *content)
    assert same["text"] == mixed["text"], "how bytes travel makes no difference"
    assert same["usage"]["prompt_tokens"] == mixed["usage"]["prompt_tokens"]
    assert same["usage"]["cached_tokens"] > mixed["usage"]["cached_tokens"]
    assert same["timings"]["encode_ms"] < mixed["timings"]["encode_ms"], "it knows them already"
    assert same["usage"]["prompt_tokens"] > 2 * 18 + 190, "what is seen and heard counts"
    # The answer may be here before the node has cleared up behind it.
    deadline = time.monotonic() + PATIENCE
    while stored(state) != [hashlib.sha256(SOUND).hexdigest()]:
        assert time.monotonic() < deadline, "the blob's own file stays, and none of requests"
        time.sleep(0.05)


def test_state_tells_loaded_encoders_and_the_owner_switches_and_unloads_them(me: Listener) -> None:
    assert ask(me, picture(PICTURES[0]), text("what?"))["event"] == "done"
    control = {"response_topic": "clients/me/control"}
    off = {"modality": "vision", "enabled": False}
    me.publish(f"{B}/request/modality", off, **control)
    assert me.until(lambda m: "ok" in m)["data"]["planned"] == []
    assert me.until(lambda m: m.get("modalities") == ["text"])
    refused = ask(me, picture(PICTURES[0]), text("what?"))
    assert (refused["code"], refused["status"]) == ("modality_unavailable", 503)
    me.publish(f"{B}/request/modality", off | {"enabled": True}, **control)
    assert me.until(lambda m: "vision" in m.get("modalities", ()))
    me.publish(f"{B}/request/modality", {"modality": "all", "unload": True}, **control)
    assert me.until(lambda m: m.get("modalities") == ["text"])
    assert ask(me, picture(PICTURES[0]), text("what?"))["event"] == "done"


@pytest.mark.parametrize(
    ("part", "code", "words"),
    [
        (picture(b"GIF89a" + bytes(50)), "unsupported_media", "GIF"),
        (picture(PICTURES[0][:500]), "unsupported_media", "broken"),
        (picture(b""), "unsupported_media", "empty"),
        (picture(PICTURES[0], content_type="image/jpeg"), "unsupported_media", "image/png"),
        (picture(SOUND), "unsupported_media", "WAV"),
        ({"type": "image", "blob": "none"}, "blob_not_found", "init"),
    ],
)
def test_a_medium_that_is_no_use_is_answered_with_a_sentence(
    me: Listener, part: dict[str, Any], code: str, words: str
) -> None:
    error = ask(me, part, text("what?"))
    assert error["code"] == code, error
    assert words in error["message"]
    assert ask(me, text("still there?"))["event"] == "done"


@pytest.mark.usefixtures("me")
def test_nestd_ask_shows_files(mosquitto: Mosquitto, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PICTURES[0])
    (tmp_path / "b.wav").write_bytes(SOUND)
    broker = ("--host", "127.0.0.1", "--port", str(mosquitto.port), "--node", "eyes")
    shown = ("--image", str(tmp_path / "a.png"), "--audio", str(tmp_path / "b.wav"))
    command = nestd("ask", *broker, *shown, "--max-tokens", "3", "--json", "what is it?")
    result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert result.returncode == 0, result.stderr
    done = json.loads(result.stdout.splitlines()[-1])
    assert done["usage"]["prompt_tokens"] > 18 + 190
