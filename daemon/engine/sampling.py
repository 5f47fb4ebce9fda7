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
        if sampling.temperature == 0:
            token = int(logits.argmax())
        else:
            ids, weights = candidates(logits, sampling.temperature, sampling.top_k, sampling.top_p)
            sums = np.cumsum(weights)
            token = int(ids[np.searchsorted(sums, self._random.random() * sums[-1])])
        self.note(token)
        return token

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
        ids = np.argpartition(logits, -top_k)[-top_k:]
    else:
        ids = np.arange(len(logits))
    ids = ids[np.argsort(-logits[ids], kind="stable")]
    scaled = logits[ids].astype(np.float64) / temperature
    weights = np.exp(scaled - scaled[0])
    weights /= weights.sum()
    # A token stays while the sum of the likelier ones is below top_p, so the first always does.
    before = np.cumsum(weights) - weights
    keep = before < top_p
    return ids[keep], weights[keep] / weights[keep].sum()
