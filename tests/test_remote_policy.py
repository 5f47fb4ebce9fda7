"""When a request goes to the remote server: situation by situation, and what always holds."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.elastic import MANIFEST, PI5, board, configure

from nestd.bundle.errors import RemoteUnavailable
from nestd.daemon.elastic.plan import Plan, RequestMix
from nestd.daemon.elastic.policy import PolicyState, decide
from nestd.daemon.elastic.remote import Trouble, choose_remote
from nestd.daemon.elastic.resources import Snapshot
from nestd.daemon.elastic.task import Task
from nestd.daemon.remote.settings import RemoteSettings

REASONS = ("task", "memory", "battery", "heat")


def remote(**values: object) -> RemoteSettings:
    server = {"enabled": True, "base_url": "https://llm.example.org/v1", "model": "big"}
    return RemoteSettings.model_validate(server | values)


SERVER = remote()


def plan_for(snapshot: Snapshot, server: RemoteSettings = SERVER) -> Plan:
    config = PI5.model_copy(update={"remote": server})
    plan = decide(snapshot, config, MANIFEST, RequestMix(), PolicyState()).plan
    assert plan is not None
    return plan


LAST_RUNG = "the request asks for high effort, and the remote server is the last rung"


@pytest.mark.parametrize(
    ("snapshot", "task", "reason"),
    [
        (board(), Task(effort="high"), LAST_RUNG),
        (
            board(free_gib=3.2),
            Task(submodel="E3.39B"),
            "the request asks for E3.39B, but no more fits in memory with the margin for growing",
        ),
        (
            board(),
            Task(prompt_tokens=5000),
            "the prompt is longer than the 4096 tokens that this board reads now",
        ),
        (board(free_gib=2.0), Task(), "no more fits in the memory that is free"),
        (board(battery=3), Task(), "the battery is below 5 %"),
        (board(celsius=84), Task(), "the board is at the temperature that slows it down"),
    ],
)
def test_a_request_that_may_goes_to_the_server_for_a_reason(
    snapshot: Snapshot, task: Task, reason: str
) -> None:
    choice = choose_remote("allowed", task, plan_for(snapshot), MANIFEST, SERVER)
    assert (choice.value, choice.reason) == (True, reason)


@pytest.mark.parametrize(
    ("snapshot", "task", "server", "reason"),
    [
        (
            board(),
            Task(),
            SERVER,
            "is not needed: only for requests that ask for more than this board gives",
        ),
        (
            board(),
            Task(effort="high"),
            remote(reasons=["memory"]),
            "the remote server is not needed: this board answers",
        ),
        (board(battery=15), Task(submodel="E2B"), SERVER, "the remote server is not needed: only"),
        (
            board(battery=3),
            Task(),
            remote(reasons=["heat", "memory"]),
            "the remote server is not needed: remote.reasons does not name battery",
        ),
        (board(), Task(media=True, effort="high"), SERVER, "lets no media go to the remote server"),
        (
            board(),
            Task(media=True, video=True, effort="high"),
            remote(allow_media=True),
            "the remote server takes no video",
        ),
        (
            board(battery=3),
            Task(),
            RemoteSettings(),
            "this node has no remote server",
        ),
    ],
)
def test_a_request_that_may_stays_here_without_a_reason(
    snapshot: Snapshot, task: Task, server: RemoteSettings, reason: str
) -> None:
    choice = choose_remote("allowed", task, plan_for(snapshot, server), MANIFEST, server)
    assert choice.value is False
    assert reason in choice.reason


def test_a_server_in_trouble_is_not_asked() -> None:
    trouble = Trouble("it has failed lately", 5000)
    task, plan = Task(effort="high"), plan_for(board())
    choice = choose_remote("allowed", task, plan, MANIFEST, SERVER, trouble)
    assert (choice.value, choice.reason) == (False, "it has failed lately")
    with pytest.raises(RemoteUnavailable, match="it has failed lately: ask another") as caught:
        choose_remote("required", task, plan, MANIFEST, SERVER, trouble)
    assert caught.value.retry_after_ms == 5000


def test_a_pictures_owner_may_let_it_go() -> None:
    task, server = Task(media=True, effort="high"), remote(allow_media=True)
    choice = choose_remote("allowed", task, plan_for(board(), server), MANIFEST, server)
    assert (choice.value, choice.reason) == (True, LAST_RUNG)


facts = st.builds(
    board,
    free_gib=st.one_of(st.none(), st.floats(0.5, 8)),
    celsius=st.one_of(st.none(), st.floats(30, 90)),
    battery=st.one_of(st.none(), st.floats(0, 100)),
)
tasks = st.builds(
    Task,
    submodel=st.sampled_from(["auto", "E2B", "E2.69B", "E4B"]),
    effort=st.sampled_from(["low", "auto", "high"]),
    prompt_tokens=st.one_of(st.none(), st.integers(0, 9000)),
    media=st.booleans(),
    json=st.booleans(),
)
servers = st.builds(
    remote,
    enabled=st.booleans(),
    allow_media=st.booleans(),
    reasons=st.lists(st.sampled_from(REASONS), unique=True),
)
troubles = st.one_of(st.none(), st.just(Trouble("it has failed lately")))


@settings(deadline=None, max_examples=300)
@given(facts, tasks, servers, troubles, st.sampled_from(["never", "allowed", "required"]))
def test_nothing_goes_to_the_server_without_consent_and_a_reason_in_words(
    snapshot: Snapshot, task: Task, server: RemoteSettings, trouble: Trouble | None, consent: str
) -> None:
    plan = plan_for(snapshot, server)
    try:
        choice = choose_remote(consent, task, plan, MANIFEST, server, trouble)  # type: ignore[arg-type]
    except RemoteUnavailable as error:
        assert (consent, bool(str(error))) == ("required", True)  # noqa: PT017 (one of two ends)
        return
    assert choice.reason
    if choice.value:
        assert consent != "never"
        assert server.enabled
        assert trouble is None
        assert server.allow_media or not task.media
        assert consent == "required" or server.reasons
    if plan.remote.value is not None:
        assert plan.remote.value in server.reasons


@settings(deadline=None, max_examples=100)
@given(facts, servers)
def test_the_server_changes_nothing_of_what_this_board_does(
    snapshot: Snapshot, server: RemoteSettings
) -> None:
    with_it, without = plan_for(snapshot, server), plan_for(snapshot, RemoteSettings())
    assert with_it.as_dict() | {"remote": None} == without.as_dict() | {"remote": None}


def test_the_plans_own_reason_is_part_of_what_is_told() -> None:
    told = plan_for(board(battery=3)).as_dict()["remote"]
    assert told == {"value": "battery", "reason": "the battery is below 5 %"}
    off = decide(board(), configure(), MANIFEST, RequestMix(), PolicyState()).plan
    assert off is not None
    assert off.remote.reason == "no remote server is configured"
