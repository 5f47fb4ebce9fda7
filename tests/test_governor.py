"""The governor as clients see it: a made-up board, the memory transport, a scripted engine."""

from __future__ import annotations

import logging
import random
from dataclasses import replace
from typing import Any

import pytest
from support.node import Node

from nestd.bundle.errors import ConfigError
from nestd.daemon.elastic.memory import Memory
from nestd.daemon.elastic.power import Power
from nestd.daemon.elastic.thermal import Thermal
from nestd.daemon.engine.messages import Retain, SetSubmodel

GIB = 2**30
AMPLE = Memory(available_bytes=8 * GIB)
THRASHING = Memory(available_bytes=8 * GIB, pressure_full_percent=60.0)
# Less than the 512M that the profile leaves to other programs.
NOTHING_FREE = Memory(available_bytes=GIB // 4)
OUT_OF_MEMORY = "the board is out of memory (PSI full, or an OOM kill)"


@pytest.fixture
def node() -> Node:
    return Node(limits__queue=10).start()


def set_board(
    node: Node, memory: Memory = AMPLE, power: Power | None = None, celsius: float | None = None
) -> None:
    """Let the board be so from now on, and the daemon notice."""
    node.board.facts = replace(
        node.board.facts,
        memory=memory,
        power=power or Power(),
        thermal=Thermal(celsius=celsius, throttle_c=85.0),
    )
    node.pass_time(1)


def wait_calmly(node: Node, seconds: int) -> None:
    for _ in range(seconds):
        node.pass_time(1)


def battery(percent: float) -> Power:
    return Power(on_battery=True, battery_percent=percent)


def sizes(node: Node) -> list[str]:
    """What the running answer was told to go on on."""
    return [switch.submodel for switch in node.engine.switches]


def test_a_critical_snapshot_steps_the_running_answer_down_in_place(node: Node) -> None:
    node.ask(id="a")
    node.engine.delta("hel")
    set_board(node, THRASHING)
    engine_id = node.engine.starts[0].id
    assert node.engine.commands[-2:] == [
        SetSubmodel(submodel="small", id=engine_id),
        Retain(submodel="small"),
    ]
    node.engine.finish("hello", switches=[(0, "full"), (1, "small")])
    node.settle()
    done = node.last()
    assert (done["event"], done["attempt"], done["submodel"]) == ("done", 1, "small")
    assert done["switches"] == [
        {
            "token": 0,
            "submodel": "full",
            "reason": "nothing stands against the top of the ladder",
        },
        {"token": 1, "submodel": "small", "reason": OUT_OF_MEMORY},
    ]


def test_the_end_of_pressure_steps_the_running_answer_up(node: Node) -> None:
    node.ask(id="a", expires_in=1000)
    set_board(node, THRASHING)
    set_board(node, AMPLE)
    wait_calmly(node, 120)
    assert sizes(node) == ["small", "half", "full"]
    assert node.engine.retained == ["full", "small", "half", "full"]


def test_an_answer_never_grows_beyond_what_its_request_names(node: Node) -> None:
    node.ask(id="a", submodel="half", expires_in=1000)
    set_board(node, THRASHING)
    set_board(node, AMPLE)
    wait_calmly(node, 120)
    assert sizes(node) == ["small", "half"]
    assert node.state()["submodel_reason"] == "the request asks for it"


def test_a_request_for_more_than_the_plan_allows_runs_on_less_and_says_why(node: Node) -> None:
    set_board(node, power=battery(15))
    node.ask(id="a", submodel="full")
    assert node.engine.starts[0].submodel == "small"
    node.engine.finish()
    node.settle()
    (switch,) = node.last()["switches"]
    assert switch["reason"] == "the request asks for full, but the battery is below 20 %"


def test_effort_and_the_owner_choose_within_the_plan(node: Node) -> None:
    node.ask(id="a", effort="low")
    assert node.engine.starts[-1].submodel == "small"
    assert node.control("submodel", submodel="half")["data"] == {
        "submodel": "half",
        "reason": "half is preferred",
    }
    assert sizes(node) == ["half"], "the owner's word counts for what runs"
    node.engine.finish()
    node.settle()
    node.ask(id="b")
    node.ask(id="c", effort="high")
    for name in ("half", "full"):
        assert node.engine.starts[-1].submodel == name
        node.engine.finish()
        node.settle()


def test_a_control_request_for_one_answer_stays_within_the_plan(node: Node) -> None:
    node.ask(id="a")
    set_board(node, power=battery(15))
    reply = node.control("submodel", submodel="full", id="a")
    assert reply["data"]["submodel"] == "small"
    assert "the battery is below 20 %" in reply["data"]["reason"]
    assert sizes(node) == ["small"]


def test_a_critical_battery_answers_503_and_finishes_what_runs(node: Node) -> None:
    node.ask(id="runs")
    node.ask(id="waits")
    set_board(node, power=battery(3))
    node.ask(id="new")
    error = node.last()
    assert (error["id"], error["code"], error["status"]) == ("new", "power_saver", 503)
    assert error["message"] == "the battery is below 5 %: ask again later"
    assert error["retry_after_ms"] > 0
    state = node.state()
    assert (state["phase"], state["largest"]) == ("degraded", None)
    assert state["phase_reason"] == state["power_reason"] == "the battery is below 5 %"
    assert sizes(node) == ["small"]
    node.engine.finish("finished")
    node.settle()
    finals = {e["id"]: e.get("code", "done") for e in node.events() if e["event"] != "accepted"}
    assert finals == {"new": "power_saver", "runs": "done", "waits": "power_saver"}

    set_board(node, power=Power(on_battery=False))
    node.ask(id="new")
    assert node.last()["code"] == "power_saver", "the plan grows after a calm time"
    wait_calmly(node, 40)
    node.ask(id="new")
    assert node.last()["event"] == "accepted", "the same id may come again"


def test_without_any_memory_new_requests_get_507_and_accepted_ones_wait(node: Node) -> None:
    node.ask(id="runs")
    node.ask(id="waits")
    set_board(node, NOTHING_FREE)
    node.ask(id="new")
    assert (node.last()["code"], node.last()["status"]) == ("insufficient_memory", 507)
    assert node.last()["retry_after_ms"] > 0
    node.engine.finish()
    node.settle()
    assert len(node.engine.starts) == 1
    assert "no more fits" in node.state()["memory_reason"]
    set_board(node, AMPLE)
    wait_calmly(node, 60)
    assert len(node.engine.starts) == 2
    node.engine.finish()
    node.settle()
    assert (node.last()["id"], node.last()["event"]) == ("waits", "done")


def test_a_shorter_context_reaches_the_engine_and_its_error_the_client() -> None:
    # 16 KiB of KV cache for 128 tokens: with so little the context shrinks, in one step.
    node = Node(
        elastic__memory__reserve_bytes=0,
        elastic__memory__overhead_bytes=0,
        elastic__memory__grow_margin_bytes=0,
        elastic__memory__min_context_length=16,
        engine__context_length=128,
    ).start()
    set_board(node, Memory(available_bytes=100 + 32 * 128))
    assert node.state()["context_length"] == 32
    assert "memory" in node.state()["context_reason"]
    node.ask(id="a")
    assert node.engine.starts[0].context_length == 32
    node.engine.fail("insufficient_memory", "the prompt has 40 tokens and memory is short")
    node.settle()
    assert (node.last()["code"], node.last()["retry_after_ms"]) == ("insufficient_memory", 30_000)
    node.ask(id="a")
    assert node.last()["event"] == "accepted", "the same id may come again"


def test_the_state_tells_the_plan_with_its_reasons(node: Node) -> None:
    state = node.state()
    assert (state["submodel"], state["largest"]) == ("full", "full")
    assert state["largest_reason"] == "nothing stands against the top of the ladder"
    assert (state["context_length"], state["context_reason"]) == (4096, "as configured")
    assert (state["concurrency"], state["modalities"]) == (1, ["text"])
    assert state["modalities_reason"] == "no request needs one"
    assert (state["power_reason"], state["memory_reason"]) == (None, None)
    set_board(node, THRASHING, battery(15))
    state = node.state()
    assert (state["submodel"], state["largest"]) == ("small", "small")
    assert state["power_reason"] == "the battery is below 20 %"
    assert state["memory_reason"] == OUT_OF_MEMORY


def test_changes_are_published_and_logged_once(
    node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "nestd.daemon.elastic.governor")
    topic = f"{node.base}/state"
    before = len(node.events(topic))
    for _ in range(20):
        set_board(node, power=battery(15))
    assert len(node.events(topic)) == before + 1
    assert [record.message for record in caplog.records] == [
        "plan: submodel full -> small (the battery is below 20 %)",
        "plan: largest full -> small (the battery is below 20 %)",
    ]
    caplog.clear()
    for _ in range(20):
        set_board(node, power=battery(3))
    assert [record.message for record in caplog.records] == [
        "requests are refused: the battery is below 5 %"
    ]


def test_a_new_engine_process_is_told_what_to_retain(node: Node) -> None:
    set_board(node, power=battery(15))
    node.engine.die()
    node.settle()
    node.pass_time(2)
    node.engine.ready()
    node.settle()
    assert node.engine.retained == ["small"]


def test_the_board_is_sampled_each_second_and_let_go_at_the_end(node: Node) -> None:
    before = node.board.samples
    for _ in range(100):
        node.pass_time(0.1)
    assert node.board.samples - before == pytest.approx(10, abs=1)
    node.daemon.shutdown()
    assert node.board.closed


def test_an_answer_tells_its_joules(node: Node) -> None:
    def at(joules: float, watts: float = 5.0, scope: str = "module") -> Power:
        return Power(joules=joules, watts=watts, watts_scope=scope)

    set_board(node, power=at(100.0))
    node.ask(id="a")
    set_board(node, power=at(106.0))
    node.engine.finish()
    node.settle()
    assert node.last()["joules"] == 6.0
    health = node.control("health")["data"]
    assert (health["joules_per_token"], health["watts"]) == (3.0, 5.0)
    assert health["watts_scope"] == "module"

    node.ask(id="b")
    node.now += 0.1  # too soon for another snapshot: the last watts count
    node.engine.finish()
    node.settle()
    assert node.last()["joules"] == pytest.approx(0.5)

    node.ask(id="c")
    set_board(node, power=at(200.0, scope="board"))
    node.engine.finish()
    node.settle()
    assert node.last()["joules"] is None, "another sensor tells now"


def test_health_tells_what_the_board_tells(node: Node) -> None:
    memory = Memory(available_bytes=4 * GIB, total_bytes=8 * GIB, pressure_some_percent=1.5)
    power = Power(on_battery=True, battery_percent=80.0, under_voltage=False, volts=5.1)
    set_board(node, memory, power, celsius=60.0)
    health = node.control("health")["data"]
    told = {
        "memory_available_bytes": 4 * GIB,
        "memory_total_bytes": 8 * GIB,
        "memory_pressure_percent": 1.5,
        "temperature_celsius": 60.0,
        "throttle_celsius": 85.0,
        "battery_percent": 80.0,
        "under_voltage": False,
        "throttled": None,
        "volts": 5.1,
        "watts": None,
        "joules_per_token": None,
    }
    assert {key: health[key] for key in told} == told
    limited = replace(memory, limit_bytes=2 * GIB, limit_free_bytes=GIB)
    set_board(node, limited)
    health = node.control("health")["data"]
    assert (health["memory_available_bytes"], health["memory_total_bytes"]) == (GIB, 2 * GIB)


def test_a_configured_sub_model_that_the_bundle_lacks_ends_the_start() -> None:
    with pytest.raises(ConfigError, match="max_submodel"):
        Node(elastic__max_submodel="huge")


@pytest.mark.parametrize("seed", range(5))
def test_no_request_is_lost_whatever_the_board_does(seed: int) -> None:
    node = Node(limits__queue=100).start()
    chance = random.Random(seed)
    asked = 0
    for _ in range(300):
        if chance.random() < 0.2:
            node.ask(id=str(asked), expires_in=10_000, submodel=chance.choice(["auto", "full"]))
            asked += 1
        memory = chance.choice([AMPLE, AMPLE, THRASHING, replace(AMPLE, available_bytes=GIB)])
        power: Any = chance.choice([None, battery(30), battery(15), Power(under_voltage=True)])
        set_board(node, memory, power, chance.choice([50.0, 80.0, 84.0]))
        if node.daemon.node.book.running and chance.random() < 0.5:
            node.engine.finish()
            node.settle()
    while node.daemon.node.book.running:
        node.engine.finish()
        node.settle()
    done = [event["id"] for event in node.events() if event["event"] == "done"]
    assert done == [str(number) for number in range(asked)]
