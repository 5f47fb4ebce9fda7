"""Control requests as clients see them, on the memory transport and a scripted engine."""

import pytest
from support.node import Node

from nestd.daemon.engine.messages import SetSubmodel


@pytest.fixture
def node() -> Node:
    return Node().start()


def test_a_running_request_is_cancelled_at_once(node: Node) -> None:
    node.ask(id="a")
    reply = node.control("cancel", id="a", transaction=7)
    assert reply == {
        "transaction": 7,
        "ok": True,
        "data": {"id": "a", "was": "running"},
        "error": None,
    }
    assert (node.last()["code"], node.last()["status"]) == ("cancelled", 499)
    assert len(node.engine.cancels) == 1
    node.ask(id="b")
    assert len(node.engine.starts) == 1, "the engine is not through with the first yet"
    node.engine.finish("", "cancelled")
    node.settle()
    assert len(node.engine.starts) == 2


def test_a_waiting_request_is_cancelled_without_the_engine(node: Node) -> None:
    node.ask(id="a")
    node.ask(id="b")
    assert node.control("cancel", id="b")["data"]["was"] == "waiting"
    assert node.engine.cancels == []


def test_a_cancel_may_overtake_its_request(node: Node) -> None:
    assert node.control("cancel", id="a")["data"]["was"] == "unknown"
    node.ask(id="a")
    assert node.last()["code"] == "cancelled"
    assert node.engine.starts == []


def test_a_cancel_after_the_answer_changes_nothing(node: Node) -> None:
    node.ask(id="a")
    node.engine.finish()
    node.settle()
    assert node.control("cancel", id="a")["data"]["was"] == "ended"


def test_the_submodel_of_running_and_coming_answers_is_switched(node: Node) -> None:
    node.ask(id="a")
    reply = node.control("submodel", submodel="SMALL")
    assert reply["data"] == {"submodel": "small", "reason": "small is preferred"}
    assert node.engine.switches == [SetSubmodel(submodel="small", id=node.engine.starts[0].id)]
    node.engine.finish()
    node.settle()
    node.ask(id="b")
    assert node.engine.starts[-1].submodel == "small"
    node.control("submodel", submodel="auto")
    assert node.engine.switches[-1].submodel == "full"


def test_one_running_answer_is_switched(node: Node) -> None:
    node.ask(id="a")
    node.control("submodel", submodel="half", id="a")
    assert node.engine.switches == [SetSubmodel(submodel="half", id=node.engine.starts[0].id)]


def test_control_requests_say_what_is_wrong(node: Node) -> None:
    assert node.control("submodel", submodel="huge")["error"]["code"] == "model_not_found"
    assert node.control("submodel", submodel="half", id="nobody")["error"]["status"] == 400
    assert node.control("cancel")["error"]["message"] == "id is missing: add it"
    reply = node.control("modality", modality="vision", enabled=True)
    assert reply["error"]["code"] == "modality_unavailable"


def test_health_is_told_on_demand_and_every_minute(node: Node) -> None:
    node.engine.stats()
    node.settle()
    health = node.control("health", transaction="t")["data"]
    assert health["rss_bytes"] > 0
    assert health["decode_tokens_per_second"] == 20.0
    assert health["watts"] is None
    before = len(node.events(f"{node.base}/health"))
    node.pass_time(61)
    assert len(node.events(f"{node.base}/health")) == before + 1
