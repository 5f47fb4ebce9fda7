"""Keys and values of ended answers, so that a beginning which came before is not read again.

The next turn of a chat and a shared system prompt cost only what is new in them. Rows are used
again only for the sub-model that made them, so an answer is the same with and without this cache.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nestd.daemon.engine.kv_cache import KVCache, KVRows

Ids = npt.NDArray[np.int64]

# A shorter beginning is read faster than it is worth talking about.
LEAST_TOKENS = 8


@dataclass(eq=False, slots=True)
class Rows:
    """What one ended answer left.

    Attributes:
        ids: int64 [rows], as `identity` gives them.
        submodels: the sub-model that made each row.
        kept: the rows.
        used: when they were last of use, on the clock.
    """

    ids: Ids
    submodels: list[str]
    kept: KVRows
    used: float


def identity(
    ids: Ids, soft: npt.NDArray[np.bool_], soft_rows: npt.NDArray[np.float32] | None
) -> Ids:
    """Return `ids` [S] with digests of their rows in place of soft tokens.

    So two prompts begin alike only where they also show the same.
    """
    if soft_rows is None:
        return ids
    result = ids.copy()
    digests = (hashlib.blake2b(row.tobytes(), digest_size=7).digest() for row in soft_rows)
    result[soft] = [-1 - int.from_bytes(digest) for digest in digests]
    return result


class PrefixCache:
    """Rows of the last answers, the least recently used first to go."""

    def __init__(
        self, most_bytes: int, most_seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._most_bytes = most_bytes
        self._most_seconds = most_seconds
        self._clock = clock
        self._kept: list[Rows] = []  # the most recently used last

    def fill(self, cache: KVCache, ids: Ids, submodel: str) -> int:
        """Copy the rows of the longest known beginning of `ids` into the empty `cache`.

        The last id is always left to be read, since its logits are wanted.

        Returns:
            How many rows were copied.
        """
        self.expire()
        best, most = None, LEAST_TOKENS - 1
        for rows in self._kept:
            length = min(_common(rows, submodel, ids), len(ids) - 1)
            if length > most and rows.kept.holds(length):
                best, most = rows, length
        if best is None:
            return 0
        cache.fill(best.kept, most)
        best.used = self._clock()
        self._kept.remove(best)
        self._kept.append(best)
        return most

    def keep(self, ids: Ids, submodels: list[str], cache: KVCache) -> None:
        """Copy the rows of an ended answer; what it continued is part of it and goes."""
        ids, submodels = ids[: cache.length], submodels[: cache.length]
        if cache.caches.bytes_of(cache.length) > self._most_bytes:
            return
        new = Rows(ids, submodels, cache.copy(), self._clock())
        self._kept = [rows for rows in self._kept if not _within(rows, new)]
        self._kept.append(new)
        while sum(rows.kept.nbytes for rows in self._kept) > self._most_bytes:
            self._kept.pop(0)

    def expire(self) -> None:
        """Let go of what has been of no use for too long."""
        oldest = self._clock() - self._most_seconds
        self._kept = [rows for rows in self._kept if rows.used > oldest]

    def next_expiry(self) -> float | None:
        """Seconds until `expire` has something to do, None if nothing is kept."""
        if not self._kept:
            return None
        oldest = min(rows.used for rows in self._kept)
        return max(0.0, oldest + self._most_seconds - self._clock())

    def clear(self) -> None:
        """Let go of everything."""
        self._kept = []


def _common(rows: Rows, submodel: str, ids: Ids) -> int:
    """Return the length of the common beginning, as far as `submodel` made it."""
    length = min(len(rows.ids), len(ids))
    different = np.flatnonzero(rows.ids[:length] != ids[:length])
    if len(different):
        length = int(different[0])
    other = next((at for at, name in enumerate(rows.submodels) if name != submodel), length)
    return min(length, other)


def _within(rows: Rows, new: Rows) -> bool:
    length = len(rows.ids)
    return (
        length <= len(new.ids)
        and rows.submodels == new.submodels[:length]
        and bool((rows.ids == new.ids[:length]).all())
    )
