"""Sliding layers keep a window of their cache, and no logit shows it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.decoder import Decoder
from support.tiny import WINDOW

from nestd.conversion.convert import ConvertOptions, convert
from nestd.daemon.engine.window import Window

TOLERANCE = 2e-4
CONTEXT = 9 * WINDOW


@pytest.fixture(scope="module")
def decoder(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    destination = tmp_path_factory.mktemp("float32") / "bundle"
    return Decoder(
        convert(str(tiny_checkpoint), destination, ConvertOptions(bits=32), io.StringIO())
    )


@pytest.fixture(scope="module")
def ids() -> Any:
    return np.random.default_rng(5).integers(5, 300, (3, CONTEXT))


@pytest.fixture(scope="module")
def expected(decoder: Decoder, ids: Any) -> Any:
    """Logits [3, CONTEXT, vocab] of every token, with caches of full length and no past."""
    return np.concatenate([decoder.batch(1, CONTEXT).step(row[np.newaxis], CONTEXT) for row in ids])


def close(logits: Any, expected: Any) -> None:
    np.testing.assert_allclose(logits, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("margin", [0, 1, 5, WINDOW])
def test_decoding_past_the_window_equals_a_cache_of_full_length(
    decoder: Decoder, ids: Any, expected: Any, margin: int
) -> None:
    batch = decoder.batch(1, CONTEXT, WINDOW + margin)
    for at in range(CONTEXT):
        close(batch.step(ids[:1, at : at + 1])[0, -1], expected[0, at])


@pytest.mark.parametrize("chunk", [1, 2, 7, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW])
@pytest.mark.parametrize("spare", [0, 3])
def test_every_row_of_every_chunk_equals_a_cache_of_full_length(
    decoder: Decoder, ids: Any, expected: Any, chunk: int, spare: int
) -> None:
    batch = decoder.batch(1, CONTEXT, WINDOW - 1 + chunk + spare)
    for at in range(0, CONTEXT, chunk):
        piece = ids[:1, at : at + chunk]
        close(batch.step(piece, piece.shape[1]), expected[:1, at : at + chunk])


def test_sequences_of_different_lengths_step_together(
    decoder: Decoder, ids: Any, expected: Any
) -> None:
    """One is short of the window, one at its edge, one far behind it; they move at other times."""
    batch = decoder.batch(3, CONTEXT, WINDOW + 6)
    lengths = (2, WINDOW - 1, 4 * WINDOW + 3)
    for index, length in enumerate(lengths):
        alone = decoder.batch(1, CONTEXT, WINDOW + 6)
        for at in range(0, length, 7):
            alone.step(ids[index : index + 1, at : min(at + 7, length)], 0)
        for name, buffer in alone.buffers.items():
            batch.buffers[name][index] = buffer[0]
        batch.lengths[index], batch.starts[index] = alone.lengths[0], alone.starts[0]
    moves = set()
    for _ in range(3 * WINDOW):
        at = batch.lengths.copy()
        before = batch.starts.copy()
        logits = batch.step(ids[np.arange(3), at][:, np.newaxis])
        moves.add(tuple(batch.starts != before))
        close(logits[:, 0], expected[np.arange(3), at])
    assert len(moves) > 3


@pytest.mark.parametrize("guesses", [2, 5, WINDOW + 2])
def test_wrong_guesses_are_cut_off_at_any_length(
    decoder: Decoder, ids: Any, expected: Any, guesses: int
) -> None:
    """Each step reads one right token and wrong ones behind it, then keeps the right one."""
    batch = decoder.batch(1, CONTEXT + guesses, WINDOW + guesses)
    wrong = np.full((1, guesses), 7)
    for at in range(CONTEXT):
        logits = batch.step(np.concatenate([ids[:1, at : at + 1], wrong], axis=1), guesses + 1)
        close(logits[0, 0], expected[0, at])
        batch.cut(0, at + 1)


def test_several_tokens_of_several_sequences_at_once_are_an_error_not_a_wrong_answer(
    decoder: Decoder, ids: Any
) -> None:
    batch = decoder.batch(2, CONTEXT)
    batch.step(ids[:2, :1])
    with pytest.raises(Exception, match="batch_size must be 1"):
        batch.step(ids[:2, 1:3], 2)


def test_a_step_that_the_window_cannot_hold_is_refused() -> None:
    window = Window(16, 20)
    assert window.most_rows == 5
    assert window.start_for(0, 0, 20) == 0  # the first tokens may fill the cache
    with pytest.raises(ValueError, match="at most 5"):
        window.start_for(0, 15, 6)
    with pytest.raises(ValueError, match="are gone"):
        window.start_for(10, 20, 1)


@pytest.mark.parametrize("size", [1, 2, 16])
@pytest.mark.parametrize("spare", [0, 1, 9])
def test_a_window_always_holds_what_the_next_token_sees(size: int, spare: int) -> None:
    window = Window(size, size + spare)
    for rows in range(1, window.most_rows + 1):
        start = length = 0
        for _ in range(4 * (size + spare)):
            start = window.start_for(start, length, rows)
            assert start <= max(0, length - (size - 1))
            assert length + rows - start <= window.capacity
            # Whatever a step brought can be cut off again.
            assert all(window.holds(start, length + left) for left in range(rows + 1))
            length += rows


def test_a_sequence_can_always_be_cut_back_by_a_quarter_of_the_margin() -> None:
    window = Window(16, 16 + 19)
    for chunk in range(1, window.most_rows + 1):
        start = length = 0
        for rows in [chunk] * 9 + [1] * 100:
            start, before = window.start_for(start, length, rows), length
            length += rows
            assert window.holds(start, min(before, length - window.most_rows // 4))


def test_what_has_left_the_window_cannot_be_gone_back_to() -> None:
    window = Window(16, 20)
    assert window.holds(0, 3)
    assert window.holds(25, 40)
    assert not window.holds(25, 39)
