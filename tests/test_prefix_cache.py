"""A beginning that came before is not read again, and no answer is another for it."""

from __future__ import annotations

import numpy as np
import pytest

from nestd.bundle.manifest import Bundle
from nestd.daemon.engine.generate import Generation
from nestd.daemon.engine.graphs import Graphs
from nestd.daemon.engine.kv_cache import KVCache, KVCaches
from nestd.daemon.engine.media import EncodedPrompt
from nestd.daemon.engine.messages import (
    ChatMessage,
    EngineOptions,
    Event,
    Finished,
    Retain,
    Sampling,
    Start,
)
from nestd.daemon.engine.prefix_cache import PrefixCache, identity
from nestd.daemon.engine.worker import Worker
from nestd.daemon.prompt.template import Prompt

SYSTEM = "You run a house of many rooms and answer in few words, always politely."


@pytest.fixture(scope="module")
def graphs(exact_bundle: Bundle) -> Graphs:
    return Graphs(exact_bundle, EngineOptions(threads=1))


@pytest.fixture(scope="module")
def prompt(exact_bundle: Bundle) -> Prompt:
    return Prompt(exact_bundle)


class Engine:
    """A worker in this process."""

    def __init__(self, graphs: Graphs, prompt: Prompt, **options: object) -> None:
        self.events: list[Event] = []
        settings = EngineOptions.model_validate({"threads": 1, "context_length": 480, **options})
        self.worker = Worker(graphs, prompt, settings, self.events.append)

    def ask(self, *texts: str, submodel: str = "full", seed: int = 1) -> Finished:
        roles = ("user", "assistant")
        turns = [ChatMessage(role="system", content=SYSTEM)]
        turns += [
            ChatMessage(role=roles[index % 2], content=text)  # type: ignore[arg-type]
            for index, text in enumerate(texts)
        ]
        sampling = Sampling(max_tokens=12, temperature=1.0, top_k=0, top_p=1.0, seed=seed)
        start = Start(id="a", messages=tuple(turns), submodel=submodel, sampling=sampling)
        self.worker.handle(start)
        while self.worker.busy:
            self.worker.step()
        finished = self.events[-1]
        assert isinstance(finished, Finished)
        return finished


def test_a_shared_system_prompt_is_read_once(graphs: Graphs, prompt: Prompt) -> None:
    engine = Engine(graphs, prompt)
    assert engine.ask("lamp on").cached_tokens == 0
    assert engine.ask("heater off").cached_tokens > len(SYSTEM)


def test_the_next_turn_of_a_chat_reads_only_what_is_new(graphs: Graphs, prompt: Prompt) -> None:
    engine = Engine(graphs, prompt)
    first = engine.ask("lamp on")
    second = engine.ask("lamp on", first.text, "and off again")
    new = len(f"{first.text}<end_of_turn>user and off again<end_of_turn>model")
    assert second.cached_tokens >= first.prompt_tokens
    assert second.prompt_tokens - second.cached_tokens <= new


@pytest.fixture(scope="module")
def windowed(exact_bundle: Bundle) -> Graphs:
    return Graphs(exact_bundle, EngineOptions(threads=1))


@pytest.fixture(scope="module")
def unwindowed(exact_bundle: Bundle) -> Graphs:
    return Graphs(exact_bundle, EngineOptions(threads=1, kv_window=False))


@pytest.mark.parametrize("submodel", ["nested", "full"])
def test_answers_are_the_same_with_and_without(
    unwindowed: Graphs, prompt: Prompt, submodel: str
) -> None:
    graphs = unwindowed
    engine = Engine(graphs, prompt)
    for seed in range(6):
        texts = ("lamp on", "it is", f"now number {seed}")
        known = engine.ask(*texts, submodel=submodel, seed=seed)
        alone = Engine(graphs, prompt, session_cache_bytes=0)
        assert known.text == alone.ask(*texts, submodel=submodel, seed=seed).text
    assert known.cached_tokens > 0


def test_a_chat_goes_on_from_a_window_that_has_moved(
    windowed: Graphs, unwindowed: Graphs, prompt: Prompt
) -> None:
    """Its last tokens are there; a question that branches off further up is read anew."""
    some, whole = Engine(windowed, prompt), Engine(unwindowed, prompt)
    alone = Engine(windowed, prompt, session_cache_bytes=0)
    texts = ["lamp on and tell me at length about it, please", *["it is", "and off again"] * 2]
    for seed in range(3):
        answer = some.ask(*texts, seed=seed)
        assert answer.text == alone.ask(*texts, seed=seed).text
        whole.ask(*texts, seed=seed)
        texts += [answer.text, "and the heater"]
    assert answer.cached_tokens > 200
    assert some.ask("heater off").text == alone.ask("heater off").text
    assert some.events[-1].cached_tokens == 0  # type: ignore[union-attr]
    assert whole.ask("heater off").cached_tokens > 0


def test_what_another_submodel_has_read_is_read_again(graphs: Graphs, prompt: Prompt) -> None:
    engine = Engine(graphs, prompt)
    engine.ask("lamp on", submodel="full")
    assert engine.ask("lamp on", submodel="nested").cached_tokens == 0
    assert engine.ask("lamp on", submodel="full").cached_tokens > 0


def test_nothing_is_kept_where_no_memory_is_given_for_it(graphs: Graphs, prompt: Prompt) -> None:
    engine = Engine(graphs, prompt, session_cache_bytes=0)
    engine.ask("lamp on")
    assert engine.ask("lamp on").cached_tokens == 0


def test_shrinking_gives_the_memory_back(
    graphs: Graphs, prompt: Prompt, tiny_bundle: Bundle
) -> None:
    engine = Engine(graphs, prompt)
    sizes = tiny_bundle.manifest.submodels
    engine.worker.handle(Retain(submodel=sizes[-1].name))
    engine.ask("lamp on")
    engine.worker.handle(Retain(submodel=sizes[0].name))
    assert engine.ask("lamp on").cached_tokens == 0


def cache_with(bundle: Bundle, ids: np.ndarray) -> KVCache:
    """A cache that shows in every row which token made it."""
    cache = KVCaches(bundle.manifest.model, 1, len(ids) + 8).new()
    for buffer in cache.caches.buffers.values():
        buffer[:, :, : len(ids)] = ids[:, np.newaxis]
    cache.length = len(ids)
    return cache


def empty(bundle: Bundle) -> KVCache:
    return KVCaches(bundle.manifest.model, 1, 64).new()


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_longest_known_beginning_is_copied(tiny_bundle: Bundle) -> None:
    known = PrefixCache(1 << 30, 60)
    short, long = np.arange(20), np.arange(30)
    for ids in (short, long):
        known.keep(ids, ["full"] * len(ids), cache_with(tiny_bundle, ids))
    wanted = np.concatenate([np.arange(25), [7, 7, 7]])
    target = empty(tiny_bundle)
    assert known.fill(target, wanted, "full") == target.length == 25
    for buffer in target.caches.buffers.values():
        np.testing.assert_array_equal(buffer[0, 0, :25, 0], np.arange(25))


def test_one_token_is_always_left_to_read(tiny_bundle: Bundle) -> None:
    known = PrefixCache(1 << 30, 60)
    ids = np.arange(20)
    known.keep(ids, ["full"] * 20, cache_with(tiny_bundle, ids))
    assert known.fill(empty(tiny_bundle), ids, "full") == 19


def test_the_least_recently_used_goes_first(tiny_bundle: Bundle) -> None:
    one = cache_with(tiny_bundle, np.arange(20)).copy().nbytes
    known = PrefixCache(2 * one, 60)
    chats = [np.arange(20) + 100 * number for number in range(3)]
    for ids in chats[:2]:
        known.keep(ids, ["full"] * 20, cache_with(tiny_bundle, ids))
    assert known.fill(empty(tiny_bundle), chats[0], "full") == 19
    known.keep(chats[2], ["full"] * 20, cache_with(tiny_bundle, chats[2]))
    found = [known.fill(empty(tiny_bundle), ids, "full") for ids in chats]
    assert found == [19, 0, 19]


def test_what_nobody_comes_back_for_is_let_go(tiny_bundle: Bundle) -> None:
    clock = Clock()
    known = PrefixCache(1 << 30, 60, clock)
    assert known.next_expiry() is None
    ids = np.arange(20)
    known.keep(ids, ["full"] * 20, cache_with(tiny_bundle, ids))
    assert known.next_expiry() == 60
    clock.now = 61
    known.expire()
    assert known.next_expiry() is None


def test_two_pictures_are_not_taken_for_one() -> None:
    ids = np.array([2, 301, 301, 5])
    soft = ids == 301
    rows = np.random.default_rng(0).standard_normal((2, 64)).astype(np.float32)
    one, same = identity(ids, soft, rows), identity(ids, soft, rows.copy())
    other = identity(ids, soft, rows + 1)
    np.testing.assert_array_equal(one, same)
    assert (one != other).tolist() == [False, True, True, False]
    assert one[1] != one[2]


def test_a_cancelled_prompt_is_known_as_far_as_it_was_read(graphs: Graphs, prompt: Prompt) -> None:
    known = PrefixCache(1 << 30, 60)
    ids = prompt.encode([ChatMessage(role="user", content="x" * 100)])
    submodel = graphs.bundle.manifest.submodel("full")

    def answer() -> Generation:
        sampling = Sampling(max_tokens=4)
        cache = graphs.new_cache(480)
        return Generation(
            graphs,
            prompt.tokenizer,
            EncodedPrompt(ids),
            sampling,
            submodel,
            cache,
            480,
            known=known,
        )

    first = answer()
    first.step(32)
    first.cancel()
    first.release()
    assert answer().cached_tokens == 32
