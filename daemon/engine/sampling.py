"""Choosing the next token from logits.

Order and meaning are those of transformers' processors: repetition penalty, temperature, top-k,
top-p.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from nestd.daemon.engine.messages import Sampling

Floats = npt.NDArray[np.float32]

# Ids that are looked at first for the likeliest.
FEW = 1024
BLOCK = 1024
LEAST_TEMPERATURE = 1e-30  # a smaller one is 0 in float32


class Sampler:
    """Samples one answer; the same seed gives the same answer."""

    def __init__(self, sampling: Sampling, prompt_ids: Iterable[int]) -> None:
        self._sampling = sampling
        self._random = np.random.default_rng(sampling.seed)
        self._seen = set(prompt_ids) if sampling.repetition_penalty != 1.0 else set()

    def sample(self, logits: Floats) -> int:
        """Return the next token's id for `logits` [vocab], which may be overwritten."""
        sampling = self._sampling
        if sampling.repetition_penalty != 1.0:
            seen = np.fromiter(self._seen, np.int64, len(self._seen))
            values = logits[seen]
            penalty = np.float32(sampling.repetition_penalty)
            logits[seen] = np.where(values > 0, values / penalty, values * penalty)
        token = int(logits.argmax()) if sampling.temperature == 0 else self._draw(logits)
        self.note(token)
        return token

    def _draw(self, logits: Floats) -> int:
        sampling = self._sampling
        draw = self._random.random()
        if sampling.top_k == 0 and sampling.top_p == 1:
            return draw_from_all(logits, sampling.temperature, draw)
        ids, weights = candidates(logits, sampling.temperature, sampling.top_k, sampling.top_p)
        sums = np.cumsum(weights)
        return int(ids[np.searchsorted(sums, draw * sums[-1])])

    def note(self, token: int) -> None:
        """Let the repetition penalty count `token` from now on."""
        if self._sampling.repetition_penalty != 1.0:
            self._seen.add(token)


def candidates(
    logits: Floats, temperature: float, top_k: int, top_p: float
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Return the ids that may come next and their probabilities, likeliest first.

    Args:
        logits: [vocab].
        temperature: above 0.
        top_k: how many of the likeliest remain; 0 for all.
        top_p: the likeliest remain until their probabilities reach this sum; 1 for all.
    """
    if 0 < top_k < len(logits):
        ids = _largest(logits, top_k)
        ids = ids[np.argsort(-logits[ids], kind="stable")[:top_k]]
        weights = np.exp((logits[ids].astype(np.float64) - logits[ids].max()) / temperature)
        weights /= weights.sum()
    else:
        ids, weights = _likeliest(logits, temperature, top_p)
    order = np.argsort(-logits[ids], kind="stable")
    ids, weights = ids[order], weights[order]
    # A token stays while the sum of the likelier ones is below top_p, so the first always does.
    before = np.cumsum(weights) - weights
    keep = before < top_p
    return ids[keep], weights[keep] / weights[keep].sum()


def draw_from_all(logits: Floats, temperature: float, draw: float) -> int:
    """Return the id at `draw`, from 0 to 1, of the probabilities of all `logits` [vocab].

    They are in order of ids, so that nothing has to be sorted, and summed up block by block.
    """
    weights = _weights(logits, temperature)
    sums = np.cumsum(np.add.reduceat(weights, range(0, len(weights), BLOCK), dtype=np.float64))
    at = draw * sums[-1]
    block = int(np.searchsorted(sums, at, side="right"))
    inside = np.cumsum(weights[block * BLOCK : (block + 1) * BLOCK], dtype=np.float64)
    at -= sums[block - 1] if block else 0.0
    # Rounded differently, the block may end a little below the draw: its last possible id then.
    place = min(np.searchsorted(inside, at, side="right"), np.searchsorted(inside, inside[-1]))
    return block * BLOCK + int(place)


def _weights(logits: Floats, temperature: float) -> Floats:
    """Return float32 exp of the scaled `logits`, 1 for the likeliest.

    What is e80 times less likely is 0: it never comes, and `exp` is slow where floats end.
    """
    weights: Floats = logits - logits.max()
    weights /= np.float32(max(temperature, LEAST_TEMPERATURE))
    np.maximum(weights, np.float32(-80), out=weights)
    np.exp(weights, out=weights)
    weights -= np.exp(np.float32(-80))
    return weights


def _likeliest(
    logits: Floats, temperature: float, top_p: float
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Return, unordered, ids that hold the likeliest up to `top_p`, and their probabilities.

    Sorting a vocabulary of 262,144 takes half a step; mostly a thousand ids hold nearly everything.
    """
    weights = _weights(logits, temperature)
    total = weights.sum(dtype=np.float64)
    count, ids = FEW, _largest(weights, FEW)
    while len(ids) < len(weights) and weights[ids].sum(dtype=np.float64) < top_p * total:
        count *= 8
        ids = _largest(weights, count)
    return ids, weights[ids].astype(np.float64) / total


def _largest(values: Floats, count: int) -> npt.NDArray[np.int64]:
    """Return, unordered, the places of the `count` largest of `values`, and of few others.

    The largest of many short columns tell how large they are, without moving everything.
    """
    rows = len(values) // (8 * count)
    if rows < 2:
        return np.arange(len(values))
    tops = values[: len(values) // rows * rows].reshape(rows, -1).max(axis=0)
    return np.flatnonzero(values >= np.partition(tops, -count)[-count])
