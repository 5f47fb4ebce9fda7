"""An engine that loads, dies, hangs or fails, as clients see it."""

import pytest
from support.node import Node

from nestd.daemon.supervisor import STALL_SECONDS


@pytest.fixture
def node() -> Node:
    return Node().start()


def test_the_engine_dies_and_the_request_runs_again(node: Node) -> None:
    node.ask(id="a", stream=True)
    node.engine.delta("hel")
    node.engine.die()
    node.settle()
    assert node.state()["phase"] == "starting"
    node.pass_time(2)
    node.engine.ready()
    node.settle()
    node.engine.finish("hello")
    node.settle()
    assert [(e["event"], e["attempt"]) for e in node.events()] == [
        ("accepted", 1),
        ("delta", 1),
        ("accepted", 2),
        ("done", 2),
    ]
    assert [e["seq"] for e in node.events()] == [0, 1, 2, 3]
    assert node.transport.acknowledged == [1]


def test_a_request_that_kills_the_engine_three_times_is_answered_500(node: Node) -> None:
    node.ask(id="a")
    node.ask(id="b")
    for _ in range(3):
        node.engine.die()
        node.settle()
        node.pass_time(5)
        node.engine.ready()
        node.settle()
    error = next(e for e in node.events() if e["event"] == "error")
    assert (error["id"], error["code"], error["attempt"]) == ("a", "internal", 3)
    node.engine.finish()
    node.settle()
    assert (node.last()["id"], node.last()["event"]) == ("b", "done")


def test_events_of_an_engine_that_is_history_are_ignored(node: Node) -> None:
    node.ask(id="a")
    old = node.engine
    old.die()
    node.settle()
    node.pass_time(2)
    node.engine.ready()
    node.settle()
    old.finish("from the grave")
    node.settle()
    assert node.kinds() == ["accepted", "accepted"]


def test_an_engine_that_hangs_is_killed(node: Node) -> None:
    node.ask(id="a", expires_in=1000)
    node.pass_time(STALL_SECONDS + 1)
    assert node.engine.killed


def test_requests_wait_while_the_engine_loads() -> None:
    node = Node()
    node.daemon.startup()
    node.transport.connect()
    node.settle()
    node.ask(id="a")
    assert node.kinds() == ["accepted"]
    node.engine.ready()
    node.settle()
    assert len(node.engine.starts) == 1


def test_an_engine_that_cannot_load_is_told_to_clients() -> None:
    node = Node()
    node.daemon.startup()
    node.transport.connect()
    node.settle()
    node.ask(id="a")
    for _ in range(3):
        node.engine.load_failed("no memory")
        node.settle()
        node.pass_time(70)
    assert node.last()["code"] == "loading"
    node.ask(id="b")
    assert "no memory" in node.last()["message"]
    assert node.state()["phase"] == "degraded"
    node.engine.ready()
    node.settle()
    node.ask(id="b")
    assert node.last()["event"] == "accepted"


def test_a_failure_inside_the_engine_reaches_the_client(node: Node) -> None:
    node.ask(id="a")
    node.engine.fail("too_large", "the prompt has too many tokens")
    node.settle()
    assert (node.last()["code"], node.last()["status"]) == ("too_large", 413)
