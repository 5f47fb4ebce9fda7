"""How a node stops, and what it does in pools meanwhile, on the memory transport."""

import pytest
from support.node import REPLY, Node

from nestd.daemon.service import StopRequested


@pytest.fixture
def node() -> Node:
    return Node().start()


def test_a_stop_finishes_what_runs_and_hands_back_the_rest(node: Node) -> None:
    node.ask(id="runs")
    node.ask(id="waits")
    node.ask(id="unkept", qos=0)
    node.daemon.events.put(StopRequested())
    node.daemon.main_loop()
    node.engine.finish("finished")
    node.daemon.shutdown()
    finals = {e["id"]: e["event"] for e in node.events() if e["event"] != "accepted"}
    assert finals == {"runs": "done", "unkept": "error"}
    assert node.transport.acknowledged == [1]
    assert node.last(f"{node.base}/availability")["state"] == "offline"
    assert node.transport.stopped
    assert node.state()["phase"] == "draining"


def test_a_request_that_comes_while_stopping_stays_with_the_broker(node: Node) -> None:
    node.ask(id="runs")
    node.daemon.node.status.draining = True
    node.ask(id="late")
    node.ask(id="unkept", qos=0)
    assert [(e["id"], e["event"]) for e in node.events()] == [
        ("runs", "accepted"),
        ("unkept", "error"),
    ]


def test_a_running_request_that_does_not_end_is_handed_back(node: Node) -> None:
    node.ask(id="runs")
    node.daemon.events.put(StopRequested())
    node.daemon.events.put(StopRequested())
    node.daemon.main_loop()
    node.daemon.shutdown()
    assert node.kinds() == ["accepted"]
    assert node.transport.acknowledged == []


def test_a_request_to_a_pool_is_answered_like_any_other() -> None:
    node = Node(mqtt__pools=["house"]).start()
    greeting = {"id": "a", "messages": [{"role": "user", "content": "hello"}]}
    for _ in range(2):
        node.transport.deliver(
            "nestd/v1/pool/house/request/generate", greeting, response_topic=REPLY
        )
        node.settle()
    assert len(node.engine.starts) == 1
    assert node.transport.acknowledged == []
    node.engine.finish()
    node.settle()
    assert node.transport.acknowledged == [1, 2]
    assert node.kinds() == ["done"]


def test_a_node_that_stops_leaves_its_pools() -> None:
    node = Node(mqtt__pools=["house"]).start()
    node.daemon.shutdown()
    assert not any("$share" in item.topic_filter for item in node.transport.subscriptions)
