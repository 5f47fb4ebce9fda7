"""The daemon as its clients see it, on the memory transport and a scripted engine."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.engine import small_manifest
from support.node import REPLY, Node

from nestd.bundle.errors import BrokerError
from nestd.daemon.engine.messages import SetSubmodel, Start
from nestd.daemon.mqtt.packets import Received
from nestd.daemon.service import StopRequested
from nestd.daemon.supervisor import STALL_SECONDS


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
    assert done["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "cached_tokens": 0}
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


def test_a_request_names_its_submodel_in_any_case(node: Node) -> None:
    node.ask(id="a", submodel="HALF")
    assert node.engine.starts[0].submodel == "half"


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


# Pools


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
