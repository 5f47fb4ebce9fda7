"""Several answers at once on real bundles: each is what it would be alone, and none waits long."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nestd.bundle.manifest import Bundle, Submodel
from nestd.conversion.convert import ConvertOptions, convert
from nestd.daemon.engine.graphs import Graphs
from nestd.daemon.engine.kv_cache import KVCache
from nestd.daemon.engine.messages import (
    Cancel,
    ChatMessage,
    Delta,
    EngineOptions,
    Event,
    Failed,
    Finished,
    Sampling,
    SetSubmodel,
    Start,
    Structure,
)
from nestd.daemon.engine.scheduler import LEAST_CHUNK, PLANNED, ChunkLength
from nestd.daemon.engine.worker import Worker
from nestd.daemon.prompt.template import Prompt

POCKET = Path(__file__).parent.parent / "examples/pocket/checkpoint"
HOUSE = (
    "turn on the kitchen light",
    "is the bedroom window open and how warm is it there now",
    "heating to 21",
    "play some music in the living room, please",
    "off",
)
# No end token comes for so long, by this seed.
LONG = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 3, "max_tokens": 60}


class Clock:
    """Seconds that pass while the decoder runs: a tenth for the weights, and a bit a token."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class CountedGraphs(Graphs):
    """Graphs that note what each run was, and move a clock on.

    Attributes:
        runs: (sequences, tokens of each, sub-model) of each run.
    """

    clock = Clock()

    def run_batch(
        self,
        ids: npt.NDArray[np.int64],
        caches: Sequence[KVCache],
        submodel: Submodel,
        logit_rows: int = 1,
        soft_rows: npt.NDArray[np.float32] | None = None,
    ) -> list[npt.NDArray[np.float32]]:
        self.runs.append((*ids.shape, submodel.name))
        self.clock.now += 0.1 + 0.01 * ids.size
        return super().run_batch(ids, caches, submodel, logit_rows, soft_rows)

    def __init__(self, bundle: Bundle, options: EngineOptions) -> None:
        super().__init__(bundle, options)
        self.runs: list[tuple[int, int, str]] = []


class Engine:
    """A worker in this process that answers up to five requests at once."""

    def __init__(self, graphs: CountedGraphs, prompt: Prompt, **options: object) -> None:
        self.events: list[Event] = []
        self.graphs = graphs
        values = {"context_length": 480, "parallel_requests": 5, "session_cache_bytes": 0}
        settings = EngineOptions.model_validate(values | options)
        self.worker = Worker(graphs, prompt, settings, self.events.append, clock=graphs.clock)
        graphs.runs.clear()

    def start(self, name: str, text: str, submodel: str = "full", **fields: object) -> None:
        sampling = {"max_tokens": 30} | fields
        structure = sampling.pop("structure", None)
        self.worker.handle(
            Start(
                id=name,
                messages=(ChatMessage(role="user", content=text),),
                submodel=submodel,
                sampling=Sampling.model_validate(sampling),
                structure=None if structure is None else Structure(json_schema=str(structure)),
            )
        )

    def run(self, until: Callable[[], bool] = lambda: False) -> None:
        while self.worker.busy and not until():
            self.worker.step()

    def tokens(self, name: str) -> int:
        return max((e.completion_tokens for e in self.deltas(name)), default=0)

    def deltas(self, name: str) -> list[Delta]:
        return [e for e in self.events if isinstance(e, Delta) and e.id == name]

    def finished(self, name: str) -> Finished:
        return next(e for e in self.events if isinstance(e, Finished) and e.id == name)

    def alone(self, name: str, *args: object, **fields: object) -> Finished:
        """Answer one request while nothing else runs."""
        self.start(name, *args, **fields)  # type: ignore[arg-type]
        self.run()
        return self.finished(name)


@pytest.fixture(scope="module")
def graphs(exact_bundle: Bundle) -> CountedGraphs:
    return CountedGraphs(exact_bundle, EngineOptions(threads=1))


@pytest.fixture(scope="module")
def prompt(exact_bundle: Bundle) -> Prompt:
    return Prompt(exact_bundle)


@pytest.fixture
def engine(graphs: CountedGraphs, prompt: Prompt) -> Engine:
    return Engine(graphs, prompt)


@pytest.fixture(scope="module")
def pocket(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    target = tmp_path_factory.mktemp("pocket") / "bundle"
    return convert(str(POCKET), target, ConvertOptions(modalities=("text",)), io.StringIO())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_five_answers_together_are_the_same_as_one_by_one(
    engine: Engine, temperature: float
) -> None:
    fields = {"temperature": temperature, "seed": 3}
    expected = [engine.alone(f"alone {text}", text, **fields).text for text in HOUSE]
    assert all(expected)
    for text in HOUSE:
        engine.start(text, text, **fields)
    engine.graphs.runs.clear()
    engine.run()
    assert [engine.finished(text).text for text in HOUSE] == expected
    assert max(batch for batch, _, _ in engine.graphs.runs) >= 4


def test_a_trained_model_answers_many_as_it_answers_one(pocket: Bundle) -> None:
    options = EngineOptions(threads=1)
    engine = Engine(CountedGraphs(pocket, options), Prompt(pocket), context_length=256)
    names = [item.name for item in pocket.manifest.submodels]
    submodel = names[-1]
    expected = [engine.alone(f"alone {text}", text, submodel).text for text in HOUSE]
    for text in HOUSE:
        engine.start(text, text, submodel)
    engine.run()
    assert [engine.finished(text).text for text in HOUSE] == expected
    assert len(set(expected)) == len(HOUSE)


def test_answers_that_join_and_end_in_the_middle_leave_the_others_alone(engine: Engine) -> None:
    lengths = (40, 5, 25, 12, 33)
    cases = list(zip(HOUSE, lengths, strict=True))
    expected = [
        engine.alone(f"alone {text}", text, max_tokens=most, stop=["\x00"]).text
        for text, most in cases
    ]
    for number, (text, most) in enumerate(cases):
        engine.start(text, text, max_tokens=most, stop=["\x00"])
        steps = len(engine.graphs.runs) + 3 * number
        engine.run(until=lambda steps=steps: len(engine.graphs.runs) >= steps)
    engine.run()
    assert [engine.finished(text).text for text in HOUSE] == expected


def test_a_switch_of_one_answer_leaves_the_others_alone(engine: Engine) -> None:
    def switched(name: str, *others: str) -> str:
        engine.start(name, HOUSE[0], temperature=1, seed=1, max_tokens=40)
        for other in others:
            engine.start(other, other, max_tokens=40)
        engine.run(until=lambda: engine.tokens(name) >= 5)
        tokens = engine.tokens(name)
        engine.worker.handle(SetSubmodel(submodel="nested", id=name))
        engine.run()
        switches = engine.finished(name).switches
        assert [item.submodel for item in switches] == ["full", "nested"]
        assert switches[1].token == tokens
        return engine.finished(name).text

    expected = [engine.alone(f"alone {text}", text, max_tokens=40).text for text in HOUSE[1:]]
    assert switched("with others", *HOUSE[1:]) == switched("without")
    assert [engine.finished(text).text for text in HOUSE[1:]] == expected


def test_answers_of_two_sizes_take_turns_and_are_not_mixed(
    graphs: CountedGraphs, prompt: Prompt
) -> None:
    engine = Engine(graphs, prompt, prompt_lookup=False)
    sizes = ("full", "nested", "full", "nested", "nested")
    cases = list(zip(HOUSE, sizes, strict=True))
    expected = [engine.alone(f"alone {t}", t, size, **LONG).text for t, size in cases]
    for text, size in cases:
        engine.start(text, text, size, **LONG)
    engine.graphs.runs.clear()
    engine.run()
    assert [engine.finished(text).text for text in HOUSE] == expected
    assert {(2, 1, "full"), (3, 1, "nested")} < set(engine.graphs.runs)
    turns = [name for _, size, name in engine.graphs.runs if size == 1]
    last = min(len(turns) - turns[::-1].index(name) for name in ("full", "nested"))
    both = turns[turns.index("nested") : last]
    assert len(both) > 50
    assert all(one != other for one, other in itertools.pairwise(both))


def test_a_cancelled_answer_leaves_at_once_and_the_next_one_takes_its_place(
    engine: Engine,
) -> None:
    expected = [engine.alone(f"alone {text}", text, **LONG).text for text in HOUSE[2:]]
    for text in (*HOUSE, "sixth"):
        engine.start(text, text, **LONG)
    engine.run(until=lambda: all(engine.tokens(text) >= 3 for text in HOUSE))
    assert not engine.deltas("sixth")
    for text in HOUSE[:2]:
        engine.worker.handle(Cancel(id=text))
        assert engine.finished(text).finish_reason == "cancelled"
    engine.run()
    assert engine.finished("sixth").finish_reason in ("stop", "length")
    assert [engine.finished(text).text for text in HOUSE[2:]] == expected


def test_a_long_prompt_never_holds_up_answers_for_longer_than_is_set(
    graphs: CountedGraphs, prompt: Prompt
) -> None:
    engine = Engine(graphs, prompt, max_stall_seconds=0.5)
    engine.start("answer", HOUSE[0], **LONG)
    engine.run(until=lambda: engine.tokens("answer") >= 3)
    engine.start("long", "x" * 300, max_tokens=3)
    engine.graphs.runs.clear()
    engine.run(until=lambda: bool(engine.deltas("long")))
    chunks = [size for batch, size, _ in engine.graphs.runs if batch == 1 and size > 1]
    assert sum(chunks) > 300
    # By the clock a chunk of 40 takes 0.5 s, one of 22 and a step the part of it that is PLANNED.
    assert max(chunks) <= 40
    assert chunks[-2] >= 20
    # One token of the answer between any two chunks.
    sizes = [size for _, size, _ in engine.graphs.runs[: 2 * len(chunks)]]
    assert all(min(pair) == 1 for pair in itertools.pairwise(sizes))


@given(fixed=st.floats(0.01, 0.2), each=st.floats(0.0005, 0.05), most=st.floats(0.1, 1.0))
def test_a_chunk_fits_into_the_time_whatever_the_speed_of_the_board(
    fixed: float, each: float, most: float
) -> None:
    length = ChunkLength(128, most)
    assert length.tokens("full", fixed) == LEAST_CHUNK
    chunks = [128]  # read while nobody waited
    for _ in range(20):
        length.note("full", chunks[-1], fixed + each * chunks[-1])
        chunks.append(length.tokens("full", fixed))
    assert all(fixed + each * chunk <= most + 1e-6 for chunk in chunks[1:] if chunk > LEAST_CHUNK)
    # And it is not shorter than that needs: together with a step it fills the time planned.
    assert chunks[-1] >= min(128, (PLANNED * most - 2 * fixed) / each - 2)


def test_a_prompt_that_holds_nobody_up_is_read_in_whole_chunks(engine: Engine) -> None:
    engine.alone("long", "x" * 300, max_tokens=3)
    assert engine.graphs.runs[0][1] == engine.graphs.runs[1][1] == 128


def test_several_long_prompts_take_turns(graphs: CountedGraphs, prompt: Prompt) -> None:
    engine = Engine(graphs, prompt, prefill_chunk=16)
    for name in "abc":
        engine.start(name, name * 200, max_tokens=1)
    engine.run()
    ends = [event.id for event in engine.events if isinstance(event, Finished)]
    assert ends == ["a", "b", "c"]
    # None was read to its end before the others had been read but for a chunk or two.
    runs = len(engine.graphs.runs)
    moments = [engine.finished(name).timings.prefill_ms for name in "abc"]
    assert moments[0] > 0.9 * moments[2]
    assert runs >= 3 * 200 // 16


def test_nothing_is_guessed_beside_other_answers(engine: Engine) -> None:
    text = "lamp 8 on, lamp 8 off, lamp 8 on"
    alone = engine.alone("alone", text, max_tokens=120)
    assert alone.guessed_tokens > 0
    engine.start("first", text, max_tokens=120)
    engine.start("second", HOUSE[0], "nested", **LONG)
    engine.run(until=lambda: engine.tokens("first") > 0 < engine.tokens("second"))
    engine.graphs.runs.clear()
    engine.run(until=lambda: len(engine.worker._answers) == 1)
    assert len(engine.graphs.runs) > 60
    assert {(batch, size) for batch, size, _ in engine.graphs.runs} == {(1, 1)}
    engine.run()
    assert engine.finished("first").text == alone.text


def test_a_refused_request_beside_running_ones_fails_alone(engine: Engine) -> None:
    engine.start("good", HOUSE[0])
    engine.start("bad", "x" * 600)
    engine.start("no schema", HOUSE[1], structure="{")
    engine.run()
    codes = {event.id: event.code for event in engine.events if isinstance(event, Failed)}
    assert codes == {"bad": "too_large", "no schema": "bad_request"}
    assert engine.finished("good").text


def test_answers_that_keep_to_a_schema_run_beside_free_ones(engine: Engine) -> None:
    schema = '{"type":"object","properties":{"on":{"type":"boolean"}},"required":["on"],'
    schema += '"additionalProperties":false}'
    fields = {"temperature": 1.0, "seed": 4}
    expected = engine.alone("alone", HOUSE[0], structure=schema, **fields).text
    free = engine.alone("alone free", HOUSE[1], **fields).text
    engine.start("json", HOUSE[0], structure=schema, **fields)
    engine.start("free", HOUSE[1], **fields)
    engine.run()
    assert engine.finished("json").text == expected
    assert expected in ('{"on":true}', '{"on":false}')
    assert engine.finished("free").text == free


def test_rates_count_all_answers_together(engine: Engine) -> None:
    engine.start("one", HOUSE[0], max_tokens=30, stop=["\x00"], temperature=2, seed=1)
    engine.run()
    one = engine.worker.stats().decode_tokens_per_second
    for number in range(5):
        engine.start(f"{number}", HOUSE[0], max_tokens=30, temperature=2, seed=1, stop=["\x00"])
    engine.run()
    assert one is not None
    # By the clock a step takes 0.11 s for one token and 0.15 s for five.
    assert one == pytest.approx(1 / 0.11, rel=0.2)
    five = engine.worker.stats().decode_tokens_per_second
    assert five is not None
    assert five > 2 * one
