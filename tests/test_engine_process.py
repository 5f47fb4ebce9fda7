"""The engine process as the daemon sees it: commands in, events out, on a real bundle."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue

import pytest

from nestd.bundle.manifest import Bundle
from nestd.daemon.engine.messages import (
    Cancel,
    ChatMessage,
    Delta,
    EngineOptions,
    Event,
    Exited,
    Failed,
    Finished,
    LoadFailed,
    Ready,
    Retain,
    Sampling,
    SetSubmodel,
    Start,
    Stats,
)
from nestd.daemon.engine.process import EngineProcess

PATIENCE = 60.0


class Engine:
    """A running engine process and its events."""

    def __init__(self, bundle: Path, options: EngineOptions) -> None:
        self.events: SimpleQueue[Event] = SimpleQueue()
        self.process = EngineProcess(bundle, options, self.events.put)
        self.process.start()

    def until(self, *kinds: type) -> list[Event]:
        """Return all events up to the first of one of `kinds`."""
        seen: list[Event] = []
        while not (seen and isinstance(seen[-1], kinds)):
            seen.append(self.events.get(timeout=PATIENCE))
        return seen

    def finished(self) -> Finished:
        event = self.until(Finished)[-1]
        assert isinstance(event, Finished)
        return event

    def ask(self, request_id: str, submodel: str = "full", max_tokens: int = 30) -> None:
        message = ChatMessage(role="user", content="turn the light on")
        # Without <eos> within reach (temperature high, seed fixed) the answer runs to its limit.
        sampling = Sampling(max_tokens=max_tokens, temperature=1.0, top_k=0, top_p=1.0, seed=5)
        self.process.send(
            Start(id=request_id, messages=(message,), submodel=submodel, sampling=sampling)
        )


@pytest.fixture
def engine(tiny_bundle: Bundle) -> Iterator[Engine]:
    options = EngineOptions(threads=1, context_length=480, prefill_chunk=8)
    engine = Engine(tiny_bundle.path, options)
    ready = engine.until(Ready)[-1]
    assert isinstance(ready, Ready)
    assert ready.context_length == 480
    yield engine
    engine.process.stop(10)


def test_deltas_join_to_the_finished_text(engine: Engine) -> None:
    engine.ask("a")
    events = engine.until(Finished)
    text = "".join(event.text for event in events if isinstance(event, Delta))
    finished = events[-1]
    assert isinstance(finished, Finished)
    assert finished.text == text
    assert finished.id == "a"
    assert [item.submodel for item in finished.switches] == ["full"]
    assert finished.timings.prefill_ms > 0


def test_requests_are_answered_in_the_order_of_their_start(engine: Engine) -> None:
    engine.ask("a", max_tokens=5)
    engine.ask("b", max_tokens=5)
    assert [engine.finished().id, engine.finished().id] == ["a", "b"]


def test_a_running_answer_is_cancelled_and_the_next_one_runs(engine: Engine) -> None:
    engine.ask("long", max_tokens=400)
    engine.until(Delta)
    engine.process.send(Cancel(id="long"))
    engine.ask("next", max_tokens=3)
    cancelled = engine.finished()
    assert (cancelled.id, cancelled.finish_reason) == ("long", "cancelled")
    assert cancelled.completion_tokens < 400
    assert engine.finished().id == "next"


def test_a_waiting_request_is_cancelled_before_it_runs(engine: Engine) -> None:
    engine.ask("long", max_tokens=400)
    engine.ask("waiting")
    engine.process.send(Cancel(id="waiting"))
    first = engine.finished()
    assert (first.id, first.finish_reason, first.completion_tokens) == ("waiting", "cancelled", 0)
    engine.process.send(Cancel(id="long"))
    assert engine.finished().id == "long"


def test_the_size_changes_in_the_middle_of_an_answer(engine: Engine) -> None:
    engine.ask("a", max_tokens=400)
    engine.until(Delta)
    engine.process.send(SetSubmodel(submodel="nested", id="a"))
    names = [item.submodel for item in engine.finished().switches]
    assert names == ["full", "nested"]


def test_handing_memory_back_leaves_the_answer_alone(engine: Engine) -> None:
    engine.ask("a", max_tokens=20)
    engine.process.send(Retain(submodel="nested"))
    assert engine.finished().completion_tokens > 0


def test_a_prompt_beyond_the_context_fails_with_413s_code(engine: Engine) -> None:
    message = ChatMessage(role="user", content="x" * 1000)
    engine.process.send(Start(id="a", messages=(message,), submodel="full"))
    failed = engine.until(Failed)[-1]
    assert isinstance(failed, Failed)
    assert failed.code == "too_large"
    assert "shorten it" in failed.message


def test_a_context_that_memory_has_shortened_fails_with_507s_code(engine: Engine) -> None:
    message = ChatMessage(role="user", content="turn the light on")
    for context_length, reason in ((32, None), (40, "length"), (4096, "length")):
        sampling = Sampling(max_tokens=3)
        start = Start(
            id=str(context_length),
            messages=(message,),
            submodel="full",
            sampling=sampling,
            context_length=context_length,
        )
        engine.process.send(start)
        event = engine.until(Failed, Finished)[-1]
        if reason is None:
            assert isinstance(event, Failed)
            assert event.code == "insufficient_memory"
            assert "33 tokens" in event.message
            assert "context of 32 now" in event.message
        else:
            assert isinstance(event, Finished)
            assert event.finish_reason == reason


def test_statistics_come_when_the_engine_becomes_idle(engine: Engine) -> None:
    engine.ask("a", max_tokens=20)
    engine.finished()
    stats = engine.until(Stats)[-1]
    assert isinstance(stats, Stats)
    assert stats.rss_bytes > stats.private_bytes > 0
    assert stats.decode_tokens_per_second is not None
    assert stats.submodel == "full"


def test_the_process_is_the_kernels_preferred_victim(engine: Engine) -> None:
    score = Path(f"/proc/{engine.process.pid}/oom_score_adj").read_text()
    assert int(score) == 900


def test_ctrl_c_at_the_daemons_terminal_does_not_reach_the_process(engine: Engine) -> None:
    assert engine.process.pid is not None
    assert os.getsid(engine.process.pid) == engine.process.pid != os.getsid(0)


def test_a_killed_process_says_so_last(engine: Engine) -> None:
    engine.ask("a", max_tokens=400)
    engine.until(Delta)
    engine.process.kill()
    exited = engine.until(Exited)[-1]
    assert isinstance(exited, Exited)
    assert exited.returncode == -9
    assert not engine.process.alive
    engine.process.send(Cancel(id="a"))  # lost, and nothing raises


def test_a_missing_bundle_is_said_before_the_process_ends(tmp_path: Path) -> None:
    engine = Engine(tmp_path, EngineOptions())
    events = engine.until(Exited)
    assert isinstance(events[0], LoadFailed)
    assert "nestd convert" in events[0].message
    assert isinstance(events[-1], Exited)
    assert events[-1].returncode == 1
    engine.process.stop(1)


def test_the_engine_runs_on_mapped_weights(tiny_bundle: Bundle, tmp_path: Path) -> None:
    engine = Engine(tiny_bundle.path, EngineOptions(threads=1, prepared_directory=tmp_path))
    engine.until(Ready)
    engine.ask("a", max_tokens=5)
    assert engine.finished().completion_tokens == 5
    assert len(list(tmp_path.glob("*/decoder.data"))) == 1
    engine.process.stop(10)
