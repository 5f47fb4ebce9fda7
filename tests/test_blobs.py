"""Blobs over MQTT: whole, in pieces, twice, broken, hostile, and over a restart."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.node import REPLY, Node

from nestd.daemon.engine.messages import MediaContent

DATA = bytes(range(256)) * 10
SHA256 = hashlib.sha256(DATA).hexdigest()


class Uploader:
    """A client that sends blobs to a node."""

    def __init__(self, directory: Path, **overrides: object) -> None:
        self.directory = directory
        self.overrides = overrides
        self.node = self._new_node()

    def _new_node(self, now: float = 1000.0) -> Node:
        overrides = {"state_directory": self.directory} | self.overrides
        return Node(encoders=True, now=now, **overrides).start()

    def restart(self) -> None:
        """The daemon dies, and another takes its place a second later."""
        self.node = self._new_node(self.node.now + 1)

    def send(self, topic: str, payload: Any) -> int:
        received = self.node.uploads.deliver(
            f"{self.node.base}/blob/{topic}", payload, response_topic=REPLY
        )
        self.node.settle()
        return received.mid

    def init(self, blob: str = "b", size: int = len(DATA), **fields: Any) -> dict[str, Any]:
        self.send(f"{blob}/init", {"size": size, "transaction": "t"} | fields)
        return self.reply()

    def chunk(self, start: int, end: int, blob: str = "b") -> int:
        return self.send(f"{blob}/{start}", DATA[start:end])

    def fin(self, blob: str = "b", size: int = len(DATA), sha256: str = SHA256) -> dict[str, Any]:
        self.send(f"{blob}/fin", {"size": size, "sha256": sha256})
        return self.reply()

    def upload(self, blob: str = "b", **fields: Any) -> dict[str, Any]:
        self.init(blob, **fields)
        self.chunk(0, len(DATA), blob)
        return self.fin(blob)

    def reply(self) -> dict[str, Any]:
        return self.node.uploads.events(REPLY)[-1]

    def error(self) -> dict[str, Any]:
        assert not self.reply()["ok"]
        found: dict[str, Any] = self.reply()["error"]
        return found

    def use(self, blob: str = "b", request_id: str = "a", **part: Any) -> None:
        content = [{"type": "image", "blob": blob} | part]
        self.node.ask(id=request_id, messages=[{"role": "user", "content": content}])

    def files(self) -> list[str]:
        return sorted(
            file.name for file in (self.directory / "media-node").rglob("*") if file.is_file()
        )


@pytest.fixture
def me(tmp_path: Path) -> Uploader:
    return Uploader(tmp_path)


def test_chunks_may_come_in_any_order_and_twice(me: Uploader) -> None:
    first = me.init(content_type="image/png", sha256=SHA256)
    assert first["ok"]
    assert first["transaction"] == "t"
    assert first["data"]["missing"] == [[0, len(DATA)]]
    for start, end in ((2000, 2560), (0, 1000), (500, 1500), (2000, 2560), (1500, 2000)):
        me.chunk(start, end)
    assert me.reply() == first, "chunks that are right get no reply"
    done = me.fin()
    assert done["ok"]
    assert done["data"] == {
        "blob": "b", "size": 2560, "sha256": SHA256, "missing": [], "expires_in": 600.0
    }  # fmt: skip
    me.use()
    content = me.node.engine.starts[-1].messages[-1].content[0]
    assert isinstance(content, MediaContent)
    assert content.path.read_bytes() == DATA
    assert content.content_type == "image/png"


def test_every_message_is_acknowledged_at_once_and_apart_from_requests(me: Uploader) -> None:
    me.node.ask(id="runs")
    mids = [me.send("b/init", {"size": len(DATA)}), me.chunk(0, 1000), me.chunk(0, 1000)]
    mids += [me.send("b/9999999", b"x"), me.send("../init", b"{")]
    assert me.node.uploads.acknowledged == mids
    assert me.node.transport.acknowledged == []


def test_what_comes_without_qos_is_dropped(me: Uploader) -> None:
    me.node.uploads.deliver(f"{me.node.base}/blob/b/init", {"size": 5}, qos=0)
    me.node.settle()
    assert me.node.uploads.published == []
    assert me.files() == []


def test_several_requests_use_one_blob(me: Uploader) -> None:
    me.upload()
    for name in ("one", "two"):
        me.use(request_id=name)
        me.node.engine.finish()
        me.node.settle()
        assert me.node.last()["event"] == "done"


def test_a_request_keeps_its_blob_beyond_the_blobs_end(me: Uploader) -> None:
    me.upload(expires_in=5)
    me.use()
    me.node.pass_time(6)
    assert me.files() == [SHA256]
    me.use(request_id="late")
    assert me.node.last()["code"] == "blob_not_found"
    me.node.engine.finish()
    me.node.settle()
    assert me.files() == []


def test_the_same_request_again_gets_its_answer_though_the_blob_has_expired(me: Uploader) -> None:
    me.upload(expires_in=5)
    me.use()
    me.node.engine.finish("a cat")
    me.node.settle()
    me.node.pass_time(6)
    me.use()
    assert me.node.last()["text"] == "a cat"


def test_the_same_id_with_another_content_of_the_blob_is_another_request(me: Uploader) -> None:
    me.upload(expires_in=5)
    me.use()
    me.node.pass_time(6)
    other = DATA[::-1]
    me.init()
    me.send("b/0", other)
    assert me.fin(sha256=hashlib.sha256(other).hexdigest())["ok"]
    me.use()
    assert me.node.last()["code"] == "id_reused"


def test_an_upload_goes_on_after_a_restart(me: Uploader) -> None:
    me.init()
    me.chunk(0, 1000)
    me.restart()
    me.chunk(1000, 2560)
    assert me.fin()["ok"]


def test_a_finished_blob_is_usable_after_a_restart(me: Uploader) -> None:
    me.upload()
    me.restart()
    me.use()
    assert len(me.node.engine.starts) == 1


def test_a_daemon_that_was_killed_while_finishing_finishes_it(me: Uploader) -> None:
    me.upload()
    blobs = me.directory / "media-node" / "blobs"
    (me.directory / "media-node" / SHA256).rename(blobs / "b.part")
    me.restart()
    me.use()
    assert len(me.node.engine.starts) == 1


def test_a_restart_clears_what_is_broken_or_expired(me: Uploader) -> None:
    me.upload(expires_in=0.5)
    blobs = me.directory / "media-node" / "blobs"
    (blobs / "broken.json").write_text("{")
    (blobs / "lost.part").write_bytes(b"x")
    (blobs / "b.json.new").write_bytes(b"x")
    me.restart()
    me.node.pass_time(1)
    assert me.files() == []


def test_init_again_tells_what_is_missing(me: Uploader) -> None:
    me.init()
    me.chunk(100, 200)
    assert me.init()["data"]["missing"] == [[0, 100], [200, 2560]]
    me.init(size=5)
    assert me.error()["code"] == "id_reused"


def test_fin_names_the_missing_ranges(me: Uploader) -> None:
    me.init()
    me.chunk(0, 1000)
    me.chunk(1500, 2560)
    reply = me.fin()
    assert reply["error"]["code"] == "bad_request"
    assert "500 of 2560 bytes are missing, the first at 1000" in reply["error"]["message"]
    assert reply["data"]["missing"] == [[1000, 1500]]
    me.chunk(1000, 1500)
    assert me.fin()["ok"]
    assert me.fin()["ok"], "fin may come twice"


def test_a_wrong_sha256_asks_for_everything_again(me: Uploader) -> None:
    me.init()
    me.send("b/0", DATA[::-1])
    reply = me.fin()
    assert SHA256 in reply["error"]["message"]
    assert reply["data"]["missing"] == [[0, 2560]]
    me.chunk(0, 2560)
    assert me.fin()["ok"]


@pytest.mark.parametrize("wrong", [{"size": 5}, {"sha256": "0" * 64}])
def test_fin_must_agree_with_init(me: Uploader, wrong: dict[str, Any]) -> None:
    me.init(sha256=SHA256)
    me.chunk(0, 2560)
    me.fin(**wrong)
    assert "disagree" in me.error()["message"]


@pytest.mark.parametrize(
    ("topic", "payload", "code", "words"),
    [
        ("b/2560", b"x", "bad_request", "no part of the 2560 bytes"),
        ("b/2559", b"xy", "bad_request", "no part of the 2560 bytes"),
        ("b/0", b"", "bad_request", "no part of the 2560 bytes"),
        ("b/-1", b"x", "bad_request", "a byte offset"),
        ("b/1e3", b"x", "bad_request", "a byte offset"),
        ("b/\u0663", b"x", "bad_request", "a byte offset"),
        ("b/0000000000000", b"x", "bad_request", "a byte offset"),
        ("b/0", b"x" * 2001, "too_large", "the limit is 2000"),
        ("c/0", b"x", "blob_not_found", "send init"),
        ("c/fin", {"size": 1, "sha256": SHA256}, "blob_not_found", "send init"),
        ("../init", {"size": 1}, "bad_request", "A-Z a-z 0-9 _ -"),
        ("a.b/init", {"size": 1}, "bad_request", "A-Z a-z 0-9 _ -"),
        ("/init", {"size": 1}, "bad_request", "A-Z a-z 0-9 _ -"),
        ("\u0663/0", b"x", "bad_request", "A-Z a-z 0-9 _ -"),
        ("n/init", {"size": 0}, "bad_request", "size"),
        ("n/init", {"size": 1, "colour": 1}, "bad_request", "unknown key 'colour'"),
        ("n/init", {"size": 5000}, "too_large", "at most 4096"),
        ("n/init", {"size": 2000}, "queue_full", "room for"),
        ("n/init", b"[" * 200, "bad_request", "nests deeper"),
        ("b/fin", {"size": 2560, "sha256": "x"}, "bad_request", "sha256"),
    ],
)
def test_what_is_wrong_is_told(
    tmp_path: Path, topic: str, payload: Any, code: str, words: str
) -> None:
    limits: dict[str, Any] = {
        "mqtt__max_payload_bytes": 2000,
        "media__max_bytes": 4096,
        "media__store_bytes": 4096,
    }
    me = Uploader(tmp_path, **limits)
    me.init()
    before = me.files()
    me.send(topic, payload)
    topics = (REPLY, f"{me.node.base}/response/blob")
    replies = [
        reply for name in topics for reply in me.node.uploads.events(name) if not reply["ok"]
    ]
    assert (replies[-1]["error"]["code"], me.files()) == (code, before)
    assert words in replies[-1]["error"]["message"]


def test_too_many_blobs_and_too_many_gaps_are_refused(tmp_path: Path) -> None:
    me = Uploader(tmp_path, media__max_blobs=1)
    me.init(size=1_000_000)
    me.init("c")
    assert me.error()["code"] == "queue_full"
    for offset in range(0, 520, 2):
        me.send(f"b/{offset}", b"x")
    assert "gaps" in me.error()["message"]
    me.node.pass_time(601)
    assert me.init("c")["ok"], "an unfinished blob makes room when it expires"


def test_a_request_names_a_blob_that_is_not_whole(me: Uploader) -> None:
    me.init()
    me.use()
    assert me.node.last()["status"] == 404
    assert "not finished" in me.node.last()["message"]


def test_blobs_still_come_in_after_a_reconnect(me: Uploader) -> None:
    me.init()
    me.node.uploads.disconnect()
    me.node.uploads.connect()
    me.node.settle()
    me.chunk(0, 2560)
    assert me.fin()["ok"]


LEVEL = st.one_of(
    st.sampled_from(["init", "fin", "0", "1", "7", "99999", "..", "b", "-1", "", "\u0660"]),
    st.text(st.characters(exclude_characters="/+#\0", exclude_categories=["Cs"]), max_size=8),
)
PAYLOAD = st.one_of(
    st.binary(max_size=12),
    st.fixed_dictionaries(
        {},
        optional={
            "size": st.integers(-1, 12) | st.text(max_size=2),
            "sha256": st.sampled_from([SHA256, hashlib.sha256(b"").hexdigest(), "x"]),
            "expires_in": st.floats(allow_nan=False) | st.integers(),
            "reply_to": st.text(max_size=5),
            "x": st.none(),
        },
    ),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["b", "c"]) | LEVEL, LEVEL, PAYLOAD), max_size=30))
def test_no_topics_and_payloads_break_it_or_leave_its_directory(messages: list[Any]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        me = Uploader(root / "state")
        for blob, step, payload in messages:
            me.send(f"{blob}/{step}", payload)
        assert len(me.node.uploads.acknowledged) == len(messages)
        assert all(path.name == "state" for path in root.iterdir())
        me.restart()
        assert me.upload("good")["ok"]
