"""Answers survive a daemon that is killed between an answer and its PUBACK."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.node import REPLY, Node

GREETING = [{"role": "user", "content": "hello"}]


def new_node(directory: Path, now: float = 1000.0) -> Node:
    return Node(state_directory=directory, now=now)


def reborn(node: Node, directory: Path) -> Node:
    """Another process takes the place of `node`, which was killed, a second later."""
    fresh = new_node(directory, node.now + 1)
    fresh.daemon.startup()
    fresh.transport.connect()
    fresh.engine.ready()
    fresh.settle()
    return fresh


def lines(directory: Path) -> list[dict[str, Any]]:
    text = (directory / "answers-node.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def answered(directory: Path, *, confirmed: bool) -> Node:
    """A node that has published an answer, whose PUBACK to the broker has not left."""
    node = new_node(directory).start()
    node.ask(id="before", stream=False)  # its PUBACK has to go first
    node.ask(id="a", stream=False)
    if not confirmed:
        node.transport.confirming = False
    node.control("cancel", id="a")
    assert node.last()["code"] == "cancelled"
    assert node.transport.acknowledged == []
    return node


def test_an_answer_that_the_broker_has_is_neither_run_nor_told_again(tmp_path: Path) -> None:
    node = reborn(answered(tmp_path, confirmed=True), tmp_path)
    assert node.events() == []
    mid = node.ask(id="a", stream=False, dup=True)
    assert node.events() == []
    assert node.engine.starts == []
    assert node.transport.acknowledged == [mid]


def test_an_answer_that_the_broker_may_not_have_is_told_but_not_run_again(tmp_path: Path) -> None:
    old = answered(tmp_path, confirmed=False)
    node = reborn(old, tmp_path)
    assert node.events() == [old.last()]
    mid = node.ask(id="a", stream=False, dup=True)
    assert node.events() == [old.last()]
    assert node.engine.starts == []
    assert node.transport.acknowledged == [mid]
    again = reborn(node, tmp_path)
    assert again.events() == [], "now the broker has it"


def test_an_answer_is_on_the_disk_before_it_is_published(tmp_path: Path) -> None:
    node = new_node(tmp_path).start()
    node.ask(id="a", stream=False)
    node.transport.accepting = False
    node.engine.finish("not sent")
    node.settle()
    assert node.events() == []
    fresh = reborn(node, tmp_path)
    assert fresh.last()["text"] == "not sent"
    assert fresh.engine.starts == []


def test_who_asks_again_after_a_restart_gets_the_stored_answer(tmp_path: Path) -> None:
    node = new_node(tmp_path).start()
    node.ask(id="a", stream=False)
    node.engine.finish("stored")
    node.settle()
    fresh = reborn(node, tmp_path)
    fresh.ask(id="a", stream=False)
    assert fresh.last()["text"] == "stored"
    assert fresh.engine.starts == []
    fresh.ask(id="a", stream=False, max_tokens=5)
    assert fresh.last()["code"] == "id_reused"


def test_correlation_data_and_topic_come_back(tmp_path: Path) -> None:
    node = new_node(tmp_path).start()
    node.transport.confirming = False
    node.transport.deliver(
        f"{node.base}/request/generate",
        {"messages": GREETING, "id": "a"},
        response_topic=REPLY,
        correlation_data=b"\x00\xff",
    )
    node.settle()
    node.engine.finish("é")
    node.settle()
    fresh = reborn(node, tmp_path)
    [message] = [m for m in fresh.transport.published if m.topic == REPLY]
    assert message.correlation_data == b"\x00\xff"
    assert json.loads(message.payload)["text"] == "é"


def test_refusals_and_requests_of_qos_0_leave_no_trace(tmp_path: Path) -> None:
    node = new_node(tmp_path).start()
    node.ask(id="bad", colour="red")
    node.ask(id="a", qos=0)
    node.engine.finish()
    node.settle()
    assert node.kinds() == ["error", "accepted", "done"]
    assert not (tmp_path / "answers-node.jsonl").exists()


def test_answers_are_deleted_when_their_requests_have_expired(tmp_path: Path) -> None:
    node = new_node(tmp_path).start()
    node.ask(id="a", expires_in=10)
    node.engine.finish()
    node.settle()
    assert [line["kind"] for line in lines(tmp_path)] == ["answer", "told"]
    node.pass_time(11)
    assert not (tmp_path / "answers-node.jsonl").exists()


def test_nothing_is_restored_after_its_time(tmp_path: Path) -> None:
    node = answered(tmp_path, confirmed=False)
    node.now += 400
    assert reborn(node, tmp_path).events() == []
    assert not (tmp_path / "answers-node.jsonl").exists()


@pytest.mark.parametrize("tail", [b'{"kind": "answer", "cli', b"\xff\xfe\n", b"[]\n", b"\n"])
def test_a_line_cut_short_costs_no_other(tmp_path: Path, tail: bytes) -> None:
    node = answered(tmp_path, confirmed=True)
    with (tmp_path / "answers-node.jsonl").open("ab") as file:
        file.write(tail)
    fresh = reborn(node, tmp_path)
    fresh.ask(id="a", stream=False, dup=True)
    assert fresh.engine.starts == []


def test_the_file_does_not_grow_with_the_past(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nestd.daemon.journal.COMPACT_BYTES", 2000)
    node = new_node(tmp_path).start()
    for number in range(40):
        node.ask(id=f"{number}", expires_in=5)
        node.engine.finish()
        node.settle()
        node.pass_time(1)
    assert len(lines(tmp_path)) < 40


def test_a_disk_that_takes_nothing_stops_no_answer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    node = new_node(tmp_path / "state").start()
    (tmp_path / "state").write_text("a file in the directory's place")
    node.ask(id="a")
    node.engine.finish()
    node.settle()
    assert node.last()["event"] == "done"
    assert "cannot write" in caplog.text
