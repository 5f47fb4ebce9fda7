"""Slots with windows: what the engine's caches do to a sequence's logits, which is nothing."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from support.tiny import WINDOW

from nestd.bundle.manifest import Bundle, Submodel
from nestd.conversion.convert import ConvertOptions, convert
from nestd.daemon.engine.generate import Generation
from nestd.daemon.engine.graphs import Floats, Graphs
from nestd.daemon.engine.kv_cache import KVCache
from nestd.daemon.engine.media import EncodedPrompt
from nestd.daemon.engine.messages import ChatMessage, EngineOptions, Sampling, Structure
from nestd.daemon.engine.prompt_lookup import MOST_GUESSED, Ids, PromptLookup
from nestd.daemon.engine.structure import Grammars
from nestd.daemon.prompt.template import Prompt

LENGTH = 8 * WINDOW
IDS = np.random.default_rng(8).integers(5, 300, (3, LENGTH))


def graphs_of(bundle: Bundle, kv_bits: Literal[8, 32], kv_window: bool) -> Graphs:
    options = EngineOptions(threads=2, prefill_chunk=5, kv_window=kv_window, kv_bits=kv_bits)
    return Graphs(bundle, options)


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    destination = tmp_path_factory.mktemp("float32") / "bundle"
    return convert(str(tiny_checkpoint), destination, ConvertOptions(bits=32), io.StringIO())


@pytest.fixture(scope="module", params=[32, 8])
def kv_bits(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(scope="module")
def windowed(bundle: Bundle, kv_bits: Literal[8, 32]) -> Graphs:
    return graphs_of(bundle, kv_bits, kv_window=True)


@pytest.fixture(scope="module")
def whole(bundle: Bundle, kv_bits: Literal[8, 32]) -> Graphs:
    return graphs_of(bundle, kv_bits, kv_window=False)


def full(graphs: Graphs) -> Submodel:
    return graphs.bundle.manifest.submodels[-1]


def read(graphs: Graphs, cache: KVCache, ids: np.ndarray) -> None:
    for at in range(0, len(ids), 5):
        graphs.run(ids[at : at + 5], cache, full(graphs), need_logits=False)


def alike(one: Floats, other: Floats) -> bool:
    """Sums in another order may round an int8 key to its neighbour; a wrong row moves all."""
    return float(np.linalg.norm(one - other)) < 0.02 * float(np.linalg.norm(other))


def test_buffers_of_sliding_layers_are_as_small_as_the_window(windowed: Graphs) -> None:
    caches = windowed.new_caches(2, LENGTH)
    rows = {name: buffer.shape[2] for name, buffer in caches.buffers.items()}
    assert rows == {
        f"{layer}.{part}": WINDOW - 1 + 5 if windowed.model.slides(layer) else LENGTH
        for layer in range(5)
        for part in ("key", "value")
    }
    assert 2 * caches.bytes_of(LENGTH) == sum(item.nbytes for item in caches.buffers.values())


def test_a_batch_of_windows_that_change_slots_equals_sequences_alone(
    windowed: Graphs, whole: Graphs
) -> None:
    caches, apart = windowed.new_caches(4, LENGTH), whole.new_caches(4, LENGTH)
    sequences, others = [caches.new() for _ in IDS], [apart.new() for _ in IDS]
    for ids, length, one, other in zip(IDS, (3, WINDOW, 70), sequences, others, strict=True):
        read(windowed, one, ids[:length])
        read(whole, other, ids[:length])
    for step in range(40):
        # A changing pair steps, so sequences move between slots while their windows move.
        pair = [(step + index) % 3 for index in range(2)]
        ids = np.array([[IDS[item, sequences[item].length]] for item in pair])
        logits = windowed.run_batch(ids, [sequences[item] for item in pair], full(windowed))
        logits = [item.copy() for item in logits]
        expected = whole.run_batch(ids, [others[item] for item in pair], full(whole))
        assert all(alike(one, other) for one, other in zip(logits, expected, strict=True))
    assert all(sequence.start > 0 for sequence in sequences)


def test_rows_that_were_kept_serve_a_beginning_that_the_window_still_holds(
    windowed: Graphs,
) -> None:
    cache = windowed.new_cache(LENGTH)
    read(windowed, cache, IDS[0][:73])
    rows = cache.copy()
    assert rows.holds(73)
    assert not rows.holds(40)
    with pytest.raises(ValueError, match="not what a sequence can go on from"):
        windowed.new_cache(LENGTH).fill(rows, 40)
    count = next(count for count in range(73) if rows.start and rows.holds(count))
    again, alone = windowed.new_cache(LENGTH), windowed.new_cache(LENGTH)
    again.fill(rows, count)
    read(windowed, alone, IDS[0][:count])
    for at in range(count, count + 30):
        one = windowed.run(IDS[0][at : at + 1], again, full(windowed), need_logits=True)
        other = windowed.run(IDS[0][at : at + 1], alone, full(windowed), need_logits=True)
        assert one is not None
        assert other is not None
        assert alike(one, other)


def test_a_sequence_is_not_cut_back_beyond_its_window(windowed: Graphs) -> None:
    cache = windowed.new_cache(LENGTH)
    read(windowed, cache, IDS[0][:100])
    cache.length -= 1  # a guess that was wrong
    with pytest.raises(ValueError, match="no way back to 20"):
        cache.length = 20


def test_more_tokens_than_a_window_takes_at_once_are_refused(windowed: Graphs) -> None:
    cache = windowed.new_cache(LENGTH)
    read(windowed, cache, IDS[0][:30])
    with pytest.raises(ValueError, match="at most 5 fit a window"):
        windowed.run(IDS[0][30:36], cache, full(windowed), need_logits=False)
    assert cache.length == 30


def test_prepared_weights_of_another_cache_width_are_prepared_anew(
    tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("prepared")
    results = []
    widths: tuple[Literal[8, 32], ...] = (32, 8)
    for kv_bits in widths:
        options = EngineOptions(threads=2, prepared_directory=directory, kv_bits=kv_bits)
        graphs = Graphs(tiny_bundle, options)
        cache = graphs.new_cache(LENGTH)
        results.append(graphs.run(IDS[0][:50], cache, full(graphs), need_logits=True))
        assert len(list(directory.iterdir())) == 1
        assert cache.caches.buffers["0.key"].itemsize == kv_bits // 8
    assert not np.array_equal(*results)
    assert np.linalg.norm(results[0] - results[1]) < 0.2 * np.linalg.norm(results[0])


class Guesser(PromptLookup):
    """Guesses as many wrong tokens as it may, at every step."""

    def propose(self, ids: Ids, most: int) -> Ids:
        return np.full_like(ids, 7)[: min(most, MOST_GUESSED)]


@pytest.mark.parametrize("kv_window", [False, True])
def test_a_context_shorter_than_the_window_is_whole(exact_bundle: Bundle, kv_window: bool) -> None:
    graphs = graphs_of(exact_bundle, 32, kv_window)
    short = WINDOW - 4
    cache = graphs.new_cache(short)
    assert cache.caches.window.most_rows == short
    read(graphs, cache, IDS[0][:short])
    assert (cache.length, cache.start) == (short, 0)
    with pytest.raises(ValueError, match="do not fit a cache"):
        graphs.run(IDS[0][:1], cache, full(graphs), need_logits=False)


@pytest.mark.parametrize("schema", [None, {"const": "a text that leaves no choice for a while"}])
@pytest.mark.parametrize("guesser", [None, Guesser()])
def test_an_answer_brings_no_more_tokens_at_once_than_its_window_takes(
    exact_bundle: Bundle, schema: Any, guesser: PromptLookup | None
) -> None:
    prompt, texts = Prompt(exact_bundle), []
    ids = prompt.encode([ChatMessage(role="user", content="lamp on")])
    for kv_window in (False, True):
        options = EngineOptions(threads=1, prefill_chunk=1, kv_window=kv_window)
        graphs = Graphs(exact_bundle, options)
        structure = Structure(json_schema=json.dumps(schema)) if schema else None
        answer = Generation(
            graphs,
            prompt.tokenizer,
            EncodedPrompt(ids),
            Sampling(max_tokens=60),
            full(graphs),
            graphs.new_cache(LENGTH),
            LENGTH,
            Grammars(exact_bundle).compile(structure) if structure else None,
            lookup=guesser if kv_window else None,
        )
        while answer.finish_reason is None:
            answer.step(1)
        texts.append(answer.text)
    assert texts[0] == texts[1]
