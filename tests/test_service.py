"""Requests as clients see them, on the memory transport and a scripted engine."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.engine import small_manifest
from support.node import REPLY, Node

from nestd.daemon.engine.messages import Start
from nestd.daemon.mqtt.packets import Received


@pytest.fixture
def node() -> Node:
    return Node().start()


def test_a_request_is_accepted_run_and_answered(node: Node) -> None:
    mid = node.ask(id="a", stream=True)
    node.engine.delta("hel")
    node.engine.delta("lo", 2)
    node.engine.finish("hello")
    node.settle()
    assert node.kinds() == ["accepted", "delta", "delta", "done"]
    assert [event["seq"] for event in node.events()] == [0, 1, 2, 3]
    done = node.last()
    assert done["text"] == "hello"
    assert done["submodel"] == "full"
    assert done["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 2,
        "cached_tokens": 0,
        "guessed_tokens": 0,
    }
    assert done["joules"] is None
    assert node.transport.acknowledged == [mid]


def test_without_stream_there_is_exactly_one_message(node: Node) -> None:
    node.ask(id="a", stream=False)
    node.engine.delta("hel")
    node.engine.finish()
    node.settle()
    assert node.kinds() == ["done"]


def test_events_carry_the_correlation_data_and_never_are_retained(node: Node) -> None:
    node.transport.deliver(
        f"{node.base}/request/generate",
        {"messages": [{"role": "user", "content": "hello"}], "stream": True},
        response_topic=REPLY,
        correlation_data=b"\x00\xff",
    )
    node.settle()
    node.engine.finish()
    node.settle()
    messages = [m for m in node.transport.published if m.topic == REPLY]
    assert {m.correlation_data for m in messages} == {b"\x00\xff"}
    assert not any(m.retain for m in messages)
    assert node.last()["id"] == "00ff"


def test_a_client_without_properties_names_its_topic_in_the_json(node: Node) -> None:
    node.ask(id="a", reply=None, reply_to="clients/ha/answers")
    node.engine.finish()
    node.settle()
    assert node.kinds("clients/ha/answers") == ["accepted", "done"]


def test_without_any_response_topic_the_answer_goes_to_the_nodes_own(node: Node) -> None:
    node.ask(id="a", reply=None)
    assert node.kinds(f"{node.base}/response/generate") == ["accepted"]


@pytest.mark.parametrize(
    ("fields", "code", "words"),
    [
        ({"colour": 1}, "bad_request", "unknown key 'colour'"),
        ({"messages": []}, "bad_request", "messages"),
        ({"submodel": "huge"}, "model_not_found", "small, half, full"),
        ({"max_tokens": 100_000}, "bad_request", "max_tokens"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "data": "aGk="}]}]},
            "modality_unavailable",
            "no vision encoder",
        ),
    ],
)
def test_a_bad_request_is_answered_with_a_sentence(
    node: Node, fields: dict[str, Any], code: str, words: str
) -> None:
    mid = node.ask(id="a", **fields)
    assert node.kinds() == ["error"]
    assert node.last()["code"] == code
    assert words in node.last()["message"]
    assert node.last()["id"] == "a"
    assert node.transport.acknowledged == [mid]


def test_malformed_json_is_answered_and_acknowledged(node: Node) -> None:
    node.transport.deliver(f"{node.base}/request/generate", b"{oops", response_topic=REPLY)
    node.settle()
    assert node.last()["code"] == "bad_request"
    assert node.last()["id"] is None
    assert node.transport.acknowledged == [1]


def test_a_payload_over_the_limit_is_answered_413() -> None:
    node = Node(mqtt__max_payload_bytes=2000).start()
    node.ask(id="a", messages=[{"role": "user", "content": "x" * 3000}])
    assert (node.last()["code"], node.last()["status"]) == ("too_large", 413)


def test_a_forbidden_response_topic_is_told_on_the_nodes_own(node: Node) -> None:
    node.ask(id="a", reply="home/lamp/set")
    assert node.events("home/lamp/set") == []
    assert node.last(f"{node.base}/response/generate")["code"] == "bad_request"


def test_the_owner_may_allow_more_response_topics() -> None:
    node = Node(mqtt__response_topics=["apps/+/in"]).start()
    node.ask(id="a", reply="apps/x/in")
    assert node.kinds("apps/x/in") == ["accepted"]


def test_a_full_queue_answers_429_and_the_same_id_may_come_again(node: Node) -> None:
    for name in "abcd":  # one runs, three wait
        node.ask(id=name)
    node.ask(id="e")
    assert node.last()["code"] == "queue_full"
    assert node.last()["retry_after_ms"] > 0
    node.engine.finish()
    node.settle()
    node.ask(id="e")
    assert node.last()["event"] == "accepted"


def test_priority_decides_who_is_next(node: Node) -> None:
    node.ask(id="first")
    node.ask(id="low", priority=1)
    node.ask(id="high", priority=9)
    for _ in range(3):
        node.engine.finish()
        node.settle()
    order = [e["id"] for e in node.events() if e["event"] == "done"]
    assert order == ["first", "high", "low"]


def test_the_same_request_again_gets_the_running_answer(node: Node) -> None:
    node.ask(id="a")
    node.ask(id="a")
    assert len(node.engine.starts) == 1
    node.engine.finish()
    node.settle()
    assert node.kinds() == ["accepted", "accepted", "done"]
    assert node.transport.acknowledged == [1, 2]


def test_the_same_request_again_gets_the_stored_answer(node: Node) -> None:
    node.ask(id="a")
    node.engine.finish("stored")
    node.settle()
    node.ask(id="a")
    assert len(node.engine.starts) == 1
    assert node.kinds() == ["accepted", "done", "done"]
    assert node.transport.acknowledged == [1, 2]


def test_another_payload_under_the_same_id_gets_409(node: Node) -> None:
    node.ask(id="a")
    node.ask(id="a", max_tokens=3)
    assert node.last()["code"] == "id_reused"
    node.engine.finish("of the first")
    node.settle()
    assert node.last()["text"] == "of the first"


def test_two_clients_may_use_the_same_id(node: Node) -> None:
    node.ask(id="a")
    node.ask(id="a", reply="clients/you/replies", max_tokens=5)
    node.engine.finish("one")
    node.settle()
    node.engine.finish("two")
    node.settle()
    assert node.last()["text"] == "one"
    assert node.last("clients/you/replies")["text"] == "two"


def test_a_request_expires_while_it_waits(node: Node) -> None:
    node.ask(id="a")
    node.ask(id="b", expires_in=10)
    node.pass_time(11)
    assert node.last()["id"] == "b"
    assert node.last()["code"] == "expired"
    assert len(node.engine.cancels) == 0


def test_work_on_an_expired_request_stops(node: Node) -> None:
    node.ask(id="a", expires_in=10, stream=True)
    node.pass_time(11)
    assert node.last()["code"] == "expired"
    assert [c.id for c in node.engine.cancels] == [node.engine.starts[0].id]
    node.engine.delta("too late")
    node.engine.finish("too late", "cancelled")
    node.settle()
    assert node.kinds() == ["accepted", "error"]


def test_the_message_expiry_of_mqtt_counts_too(node: Node) -> None:
    node.transport.deliver(
        f"{node.base}/request/generate",
        {"id": "a", "messages": [{"role": "user", "content": "hi"}]},
        response_topic=REPLY,
        message_expiry_interval=5,
    )
    node.settle()
    node.pass_time(6)
    assert node.last()["code"] == "expired"


def test_a_request_names_its_submodel_in_any_case(node: Node) -> None:
    node.ask(id="a", submodel="HALF")
    assert node.engine.starts[0].submodel == "half"


@pytest.fixture(scope="module")
def fuzzed() -> Node:
    return Node().start()


@given(
    verb=st.sampled_from(["generate", "cancel", "submodel", "modality", "health"]),
    payload=st.binary(max_size=64)
    | st.dictionaries(
        st.sampled_from(["id", "messages", "submodel", "transaction", "reply_to", "modality", "x"]),
        st.none() | st.integers() | st.text(max_size=8) | st.lists(st.text(max_size=3)),
    ).map(lambda document: json.dumps(document).encode()),
    response_topic=st.none() | st.text(max_size=12),
)
@settings(max_examples=300, deadline=None)
def test_no_message_crashes_the_daemon_or_goes_unanswered(
    fuzzed: Node, verb: str, payload: bytes, response_topic: str | None
) -> None:
    node = fuzzed
    before = len(node.transport.published)
    node.transport.deliver(f"{node.base}/request/{verb}", payload, response_topic=response_topic)
    node.settle()
    answers = [m for m in node.transport.published[before:] if not m.retain]
    assert len(answers) == 1


def test_messages_on_other_topics_are_none_of_our_business(node: Node) -> None:
    node.daemon.handle(Received(f"{node.base}/request/unheard-of", b"{}"))
    node.settle()
    assert node.kinds() == []


def test_prompts_are_never_logged(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    node.ask(id="a", messages=[{"role": "user", "content": "my secret"}])
    node.engine.finish("their secret")
    node.settle()
    node.ask(id="b", messages=[{"role": "user", "content": 17}, {"secret": "my secret"}])
    assert "secret" not in caplog.text.replace("'secret'", "")
    assert node.last()["code"] == "bad_request"


def test_sampling_comes_from_the_request_and_else_from_the_model(node: Node) -> None:
    node.ask(id="a", temperature=0.5, top_k=7, repetition_penalty=1.3, seed=9, stop=["END"])
    start = next(command for command in node.engine.commands if isinstance(command, Start))
    assert (start.sampling.temperature, start.sampling.top_k) == (0.5, 7)
    assert (start.sampling.repetition_penalty, start.sampling.seed) == (1.3, 9)
    assert start.sampling.stop == ("END",)
    assert start.sampling.top_p == small_manifest().generation.top_p
