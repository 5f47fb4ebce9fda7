"""Media over real Mosquitto: each way in, beside running answers, over restarts, `nestd ask`."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from support.clients import Listener, daemon, listening
from support.mosquitto import Mosquitto

from nestd.cli.main import main

pytestmark = pytest.mark.broker

NODE = "nestd/v1/node"
FIRST = b"\xff\xd8\xff" + bytes(3000)
SECOND = b"\x89PNG\r\n\x1a\n" + bytes(4000)
CLIP = b"RIFF....WAVE" + bytes(range(256)) * 200


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def upload(me: Listener, blob: str, data: bytes, step: int = 10_000) -> dict[str, Any]:
    """Send a blob backwards, and return the reply to `fin`."""
    stated = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    replies = {"response_topic": "clients/me/blob"}
    me.publish(f"{NODE}/blob/{blob}/init", stated, **replies)
    assert me.until(lambda reply: "ok" in reply)["ok"]
    for offset in reversed(range(0, len(data), step)):
        me.publish(f"{NODE}/blob/{blob}/{offset}", data[offset : offset + step], **replies)
    me.publish(f"{NODE}/blob/{blob}/fin", stated, **replies)
    return me.until(lambda reply: "ok" in reply)


def test_one_request_has_a_payload_base64_a_blob_and_text(mosquitto: Mosquitto) -> None:
    content = [
        {"type": "image", "payload": True},
        {"type": "text", "text": "and"},
        {"type": "image", "data": encoded(SECOND), "detail": "low"},
        {"type": "audio", "blob": "clip"},
        {"type": "text", "text": "differ?"},
    ]
    with (
        daemon(mosquitto, "node", "bundle=media"),
        listening(mosquitto, "clients/me/#") as me,
    ):
        assert upload(me, "clip", CLIP)["ok"]
        me.publish(
            f"{NODE}/request/generate",
            FIRST,
            content_type="image/jpeg",
            response_topic="clients/me/answer",
            user_properties=(("messages", json.dumps([{"role": "user", "content": content}])),),
        )
        done = me.until_event("done")
    assert done["text"] == "image:3003:768 and image:4008:256 audio:51212:None differ?"


def test_a_client_of_mqtt_3_sends_media_too(mosquitto: Mosquitto) -> None:
    with (
        daemon(mosquitto, "node", "bundle=media", "mqtt.protocol=3.1.1"),
        listening(mosquitto, "clients/me/#", protocol="3.1.1") as me,
    ):
        stated = {"size": len(CLIP), "sha256": hashlib.sha256(CLIP).hexdigest()}
        me.publish(f"{NODE}/blob/c/init", stated | {"reply_to": "clients/me/b"})
        me.publish(f"{NODE}/blob/c/0", CLIP)
        me.publish(f"{NODE}/blob/c/fin", stated | {"reply_to": "clients/me/b"})
        assert [me.until(lambda r: "ok" in r)["ok"] for _ in range(2)] == [True, True]
        content = [{"type": "audio", "blob": "c"}, {"type": "image", "data": encoded(FIRST)}]
        fields = {"messages": [{"role": "user", "content": content}], "reply_to": "clients/me/a"}
        me.publish(f"{NODE}/request/generate", fields)
        assert me.until_event("done")["text"] == "audio:51212:None image:3003:768"


def test_a_blob_comes_in_while_answers_run_and_survives_a_kill(mosquitto: Mosquitto) -> None:
    request = f"{NODE}/request/generate"
    with listening(mosquitto, "clients/me/#") as me:
        with daemon(mosquitto, "node", "bundle=media") as process:
            for number in range(5):  # one runs and four wait: no PUBACK of these for now
                waits = {"messages": [{"role": "user", "content": "wait"}], "stream": True}
                me.publish(request, waits | {"id": f"{number}"}, response_topic="clients/me/answer")
            assert upload(me, "clip", CLIP, step=500)["ok"]
            me.publish(f"{NODE}/blob/half/init", {"size": 6}, response_topic="clients/me/blob")
            me.publish(f"{NODE}/blob/half/0", b"abc")
            assert me.until(lambda reply: "ok" in reply)["ok"]
            process.kill()
            process.wait()
        me.publish(f"{NODE}/blob/half/3", b"def")
        with daemon(mosquitto, "node", "bundle=media"):
            me.until(lambda event: (event.get("id"), event.get("attempt")) == ("4", 2))
            for number in range(5):
                me.publish(f"{NODE}/request/cancel", {"id": f"{number}"}, qos=0)
            half = {"size": 6, "sha256": hashlib.sha256(b"abcdef").hexdigest()}
            me.publish(f"{NODE}/blob/half/fin", half, response_topic="clients/me/blob")
            assert me.until(lambda reply: "ok" in reply and reply["data"]["blob"] == "half")["ok"]
            content = [{"type": "audio", "blob": "clip"}, {"type": "audio", "blob": "half"}]
            fields = {"messages": [{"role": "user", "content": content}], "priority": 9}
            me.publish(request, fields, response_topic="clients/me/answer")
            assert me.until_event("done")["text"] == "audio:51212:None audio:6:None"


@pytest.mark.parametrize(
    ("mosquitto", "limit"),
    [([], 1_000_000), ([], 20_000), (["max_packet_size 9000"], 1_000_000)],
    indirect=["mosquitto"],
    ids=["all in the request", "the node's limit", "the broker's limit"],
)
def test_nestd_ask_shows_files_whatever_the_limits(
    mosquitto: Mosquitto, tmp_path: Path, capsys: pytest.CaptureFixture[str], limit: int
) -> None:
    for name, data in (("a.jpg", FIRST), ("b.png", SECOND), ("c.wav", CLIP)):
        (tmp_path / name).write_bytes(data)
    files = ["--image", "a.jpg", "--audio", "c.wav", "--image", "b.png"]
    files = [item if item.startswith("--") else str(tmp_path / item) for item in files]
    limits = f"mqtt.max_payload_bytes={limit}"
    with daemon(mosquitto, "node", "bundle=media", limits):
        broker = ["--host", "127.0.0.1", "--port", str(mosquitto.port), "--node", "node"]
        status = main(["ask", *broker, *files, "--detail", "high", "--no-stream", "what?"])
    out, err = capsys.readouterr()
    assert status == 0, err
    assert out == "image:3003:768 audio:51212:None image:4008:768 what?\n"


def test_nestd_ask_says_what_is_wrong_with_a_file(
    mosquitto: Mosquitto, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.wav").write_bytes(CLIP)
    small = ("media.max_bytes=4096", "mqtt.max_payload_bytes=20000")
    with daemon(mosquitto, "node", "bundle=media", *small):
        broker = ["--host", "127.0.0.1", "--port", str(mosquitto.port), "--node", "node"]
        assert main(["ask", *broker, "--audio", str(tmp_path / "c.wav"), "hm?"]) == 1
        assert "413 too_large" in capsys.readouterr().err
        assert main(["ask", *broker, "--audio", str(tmp_path / "none.wav"), "hm?"]) == 2
        assert "none.wav: No such file" in capsys.readouterr().err


def test_nestd_ask_knows_a_node_that_takes_text_only(
    mosquitto: Mosquitto, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.wav").write_bytes(CLIP)
    with daemon(mosquitto):
        broker = ["--host", "127.0.0.1", "--port", str(mosquitto.port), "--node", "node"]
        assert main(["ask", *broker, "--audio", str(tmp_path / "c.wav"), "hm?"]) == 1
    assert "text only" in capsys.readouterr().err
