"""What a node says on each connection, and what survives a lost one, on the memory transport."""

import json

import pytest
from support.node import Node

from nestd.bundle.errors import BrokerError


@pytest.fixture
def node() -> Node:
    return Node().start()


def test_birth_state_and_info_are_retained_and_said_on_every_connect(node: Node) -> None:
    node.transport.disconnect()
    node.transport.connect()
    node.settle()
    births = node.events(f"{node.base}/availability")
    assert [(b["state"], b["n"]) for b in births] == [("online", 1), ("online", 2)]
    assert node.transport.will is not None
    will = json.loads(node.transport.will.payload)
    assert will == {"state": "offline", "boot": births[1]["boot"], "n": 2}
    retained = {m.topic for m in node.transport.published if m.retain}
    assert retained == {f"{node.base}/{name}" for name in ("availability", "state", "info")}
    assert len(node.events(f"{node.base}/info")) == 2
    assert node.state()["phase"] == "ready"


def test_info_tells_submodels_limits_and_schemas(node: Node) -> None:
    info = node.last(f"{node.base}/info")
    assert [s["name"] for s in info["submodels"]] == ["small", "half", "full"]
    assert info["limits"]["queue"] == 3
    assert "messages" in info["schemas"]["Request"]["properties"]


def test_info_leaves_the_schemas_out_where_the_broker_takes_less(node: Node) -> None:
    node.transport.disconnect()
    node.transport.connect(maximum_packet_size=8000)
    node.settle()
    assert node.last(f"{node.base}/info")["schemas"] == {}


def test_an_answer_over_the_brokers_limit_becomes_an_error(node: Node) -> None:
    node.transport.disconnect()
    node.transport.connect(maximum_packet_size=8000)
    node.settle()
    node.ask(id="a")
    node.engine.finish("x" * 9000)
    node.settle()
    assert node.last()["code"] == "too_large"


def test_an_offline_that_is_not_ours_is_contradicted(node: Node) -> None:
    topic = f"{node.base}/availability"
    node.transport.deliver(topic, {"state": "offline", "boot": "other", "n": 1})
    node.settle()
    assert [e["state"] for e in node.events(topic)] == ["online", "online"]
    node.transport.deliver(topic, b"rubbish")
    node.settle()
    assert len(node.events(topic)) == 3


def test_an_offline_from_before_our_birth_is_not_contradicted(node: Node) -> None:
    topic = f"{node.base}/availability"
    node.transport.deliver(topic, {"state": "offline", "boot": "other", "n": 1}, retain=True)
    node.settle()
    assert len(node.events(topic)) == 1


def test_a_rival_that_insists_makes_the_node_leave(node: Node) -> None:
    topic = f"{node.base}/availability"
    for _ in range(3):
        node.transport.disconnect()
        node.transport.connect()
        node.settle()
        node.transport.deliver(topic, {"state": "online", "boot": "other", "n": 1}, retain=True)
        node.settle()
    with pytest.raises(BrokerError, match="another process"):
        node.daemon.raise_if_gave_up()


def test_a_birth_of_an_earlier_process_is_no_rival(node: Node) -> None:
    topic = f"{node.base}/availability"
    for _ in range(3):
        node.transport.deliver(topic, {"state": "online", "boot": "earlier", "n": 9}, retain=True)
        node.settle()
    node.daemon.raise_if_gave_up()


def test_a_lost_session_is_counted(node: Node) -> None:
    node.transport.disconnect()
    node.transport.connect(session_present=False)
    node.settle()
    assert node.last(f"{node.base}/health")["counters"]["sessions_lost"] == 1


def test_answers_made_while_the_broker_is_away_are_delivered_later(node: Node) -> None:
    node.ask(id="a")
    node.transport.disconnect()
    node.settle()
    node.engine.finish("hello")
    node.settle()
    node.transport.connect()
    node.settle()
    assert node.kinds() == ["accepted", "done"]
    assert node.transport.acknowledged == [1]


def test_an_answer_that_expires_while_the_broker_is_away_becomes_408(node: Node) -> None:
    node.ask(id="a", expires_in=20)
    node.transport.disconnect()
    node.settle()
    node.engine.finish("hello")
    node.settle()
    node.pass_time(30)
    node.transport.connect()
    node.settle()
    assert node.kinds() == ["accepted", "error"]
    assert node.last()["code"] == "expired"


def test_a_redelivered_request_of_an_earlier_process_is_attempt_two(node: Node) -> None:
    node.ask(id="a", dup=True)
    assert node.last()["attempt"] == 2


def test_a_redelivered_request_is_not_answered_twice(node: Node) -> None:
    node.transport.confirming = False
    node.ask(id="a")
    node.engine.finish()
    node.settle()
    node.transport.disconnect()
    node.transport.connect()
    node.settle()
    assert node.transport.acknowledged == []
    node.transport.confirm()
    node.settle()
    assert node.kinds() == ["accepted", "done"]
    assert node.transport.acknowledged == [1]


def test_a_redelivered_refusal_is_not_judged_anew(node: Node) -> None:
    for name in "abcde":
        node.ask(id=name)
    assert node.last()["code"] == "queue_full"
    node.transport.disconnect()
    node.transport.connect()
    node.settle()
    kinds = [e["event"] for e in node.events() if e["id"] == "e"]
    assert kinds == ["error"]


def test_a_session_taken_over_ends_the_daemon(node: Node) -> None:
    node.transport.give_up("another client has connected")
    node.daemon.main_loop()
    with pytest.raises(BrokerError, match="another client"):
        node.daemon.raise_if_gave_up()
