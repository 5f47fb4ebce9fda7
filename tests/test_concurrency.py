"""Several requests run at once, as clients and the owner see it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.node import Node

from nestd.daemon.elastic.memory import Memory
from nestd.daemon.elastic.power import Power


@pytest.fixture
def node() -> Node:
    return Node(engine__parallel_requests=3, limits__queue=10).start()


def finish(node: Node, number: int, text: str = "hello") -> None:
    """Let the engine answer the request that it was given as the `number`th."""
    node.engine.finish(text, start=node.engine.starts[number])
    node.settle()


def done(node: Node) -> list[str]:
    return [event["id"] for event in node.events() if event["event"] == "done"]


def test_requests_run_at_once_up_to_the_limit_and_end_in_any_order(node: Node) -> None:
    for name in "abcd":
        node.ask(id=name)
    assert len(node.engine.starts) == 3
    node.pass_time(1)
    queue = node.state()["queue"]
    assert (queue["running"], queue["waiting"]) == (3, 1)
    assert (node.state()["concurrency"], node.state()["concurrency_reason"]) == (3, "as configured")
    finish(node, 1)
    assert len(node.engine.starts) == 4
    for number in (3, 0, 2):
        finish(node, number)
    assert done(node) == ["b", "d", "a", "c"]


def test_ahead_counts_all_that_run_and_those_that_wait_before(node: Node) -> None:
    for name in "abcd":
        node.ask(id=name)
    node.ask(id="urgent", priority=9)
    ahead = {e["id"]: e["ahead"] for e in node.events() if e["event"] == "accepted"}
    assert ahead == {"a": 0, "b": 1, "c": 2, "d": 3, "urgent": 3}
    finish(node, 0)
    finish(node, 3)
    assert done(node) == ["a", "urgent"]


def test_a_cancelled_answer_keeps_its_place_until_the_engine_has_dropped_it(node: Node) -> None:
    for name in "abcd":
        node.ask(id=name)
    node.control("cancel", id="b")
    assert node.last()["code"] == "cancelled"
    assert [item.id for item in node.engine.cancels] == [node.engine.starts[1].id]
    assert len(node.engine.starts) == 3
    node.engine.finish("", "cancelled", node.engine.starts[1])
    node.settle()
    assert len(node.engine.starts) == 4


def test_two_requests_of_one_conversation_run_one_after_the_other(node: Node) -> None:
    node.ask(id="1", conversation="hall", messages=[{"role": "user", "content": "one"}])
    node.ask(id="2", conversation="hall", messages=[{"role": "user", "content": "two"}])
    node.ask(id="other", conversation="attic")
    node.ask(id="stranger", conversation="hall", reply="clients/you/replies")
    asked = [start.messages[-1].content for start in node.engine.starts]
    assert asked == ["one", "hello", "hello"]
    finish(node, 0, "the first answer")
    assert [item.content for item in node.engine.starts[-1].messages] == [
        "one",
        "the first answer",
        "two",
    ]
    finish(node, 3)
    assert [e["conversation"]["turn"] for e in node.events() if e["event"] == "done"] == [1, 2]


def test_all_that_ran_on_a_dead_engine_run_again_and_one_by_one(node: Node) -> None:
    for name in "abc":
        node.ask(id=name)
    node.engine.die()
    node.settle()
    attempts = [(e["id"], e["attempt"]) for e in node.events()[-3:]]
    assert attempts == [("a", 2), ("b", 2), ("c", 2)]
    node.pass_time(2)
    node.engine.ready()
    node.settle()
    # Who dies now is to blame.
    assert len(node.engine.starts) == 1
    node.ask(id="new", priority=9)
    assert len(node.engine.starts) == 1
    for number in range(4):
        finish(node, number)
    assert sorted(done(node)) == ["a", "b", "c", "new"]


def test_a_request_that_kills_the_engine_takes_no_other_with_it(node: Node) -> None:
    for name in ("good", "deadly", "fine"):
        node.ask(id=name)
    for _ in range(3):
        node.engine.die()
        node.settle()
        node.pass_time(5)
        node.engine.ready()
        node.settle()
        if not done(node):
            finish(node, 0)  # `good` runs alone and is answered; `deadly` is next
    finish(node, 0)
    errors = [event["id"] for event in node.events() if event["event"] == "error"]
    assert errors == ["deadly"]
    assert sorted(done(node)) == ["fine", "good"]


def test_memory_pressure_lets_no_more_run_beside_others(node: Node) -> None:
    node.ask(id="a")
    memory = Memory(available_bytes=8 * 2**30, pressure_some_percent=50.0)
    node.board.facts = replace(node.board.facts, memory=memory)
    node.pass_time(2)
    for name in "bc":
        node.ask(id=name)
    assert len(node.engine.starts) == 1
    assert "wait for memory" in node.state()["concurrency_reason"]
    finish(node, 0)
    assert len(node.engine.starts) == 2


def test_answers_side_by_side_share_the_joules(node: Node) -> None:
    def at(joules: float) -> None:
        power = Power(joules=joules, watts=5.0, watts_scope="module")
        node.board.facts = replace(node.board.facts, power=power)
        node.pass_time(1.0)

    at(100.0)
    node.ask(id="long")
    at(110.0)
    node.ask(id="short")
    at(130.0)
    finish(node, 1)
    assert node.last()["joules"] == pytest.approx(10.0)
    at(140.0)
    finish(node, 0)
    assert node.last()["joules"] == pytest.approx(10.0 + 10.0 + 10.0)


def test_every_running_answer_steps_down_with_the_plan(node: Node) -> None:
    for name in "ab":
        node.ask(id=name)
    assert {start.submodel for start in node.engine.starts} == {"full"}
    low = Power(on_battery=True, battery_percent=10.0)
    node.board.facts = replace(node.board.facts, power=low)
    node.pass_time(2)
    assert [(item.id, item.submodel) for item in node.engine.switches] == [
        (start.id, "small") for start in node.engine.starts
    ]
