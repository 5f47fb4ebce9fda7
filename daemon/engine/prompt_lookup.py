"""Guesses the next tokens: where the last ones came before, what followed them then follows again.

Answers repeat their prompt and themselves: names, JSON, quoted text. Guessed tokens are checked in
one step of the decoder, which costs little more than a step for one token, and only those that the
sampler would have chosen anyway are kept. So an answer is the same with and without.

A guess that costs more than it brings is not repeated soon: an answer without repetitions pays for
very few of them. Costs are reckoned and not measured, so the same request takes the same steps.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]

# So many last tokens must have come before, in this order.
MATCH = 3
LEAST_GUESSED, MOST_GUESSED = 2, 16
# What a further row costs, in steps: 0.28 at 4 bits and 0.12 at 8 (E4B, 8 rows, docs/engine.md).
PRICE = 0.3
# Tokens without a guess after guessing has cost more than it brought; doubles each time.
FIRST_PAUSE, LONGEST_PAUSE = 16, 512
# Of the gain so far, in steps, that guesses which bring nothing may use up.
MOST_CREDIT = 4.0


class PromptLookup:
    """The guesses for one answer: each step calls `propose` before and `judge` after it."""

    def __init__(self) -> None:
        self._size = LEAST_GUESSED
        self._length = self._guessed = 0
        self._credit = 0.0
        self._pause = FIRST_PAUSE
        self._resume_at = 0

    def propose(self, ids: Ids, most: int) -> Ids:
        """Return up to `most` tokens that may follow `ids` [S]; negative ids are no tokens."""
        paused = len(ids) < self._resume_at
        guess = ids[:0] if paused else lookup(ids, min(most, self._size))
        self._length, self._guessed = len(ids), len(guess)
        return guess

    def judge(self, accepted: int) -> None:
        """Learn from the step that has just run: so many of its guesses were right."""
        if not self._guessed:
            return
        self._size = min(MOST_GUESSED, max(LEAST_GUESSED, 2 * accepted))
        self._credit += accepted - PRICE * self._guessed
        if self._credit >= 0:
            self._credit = min(self._credit, MOST_CREDIT)
            self._pause = FIRST_PAUSE
        else:
            self._credit = 0.0
            self._resume_at = self._length + self._pause
            self._pause = min(LONGEST_PAUSE, 2 * self._pause)


def lookup(ids: Ids, most: int) -> Ids:
    """Return up to `most` tokens that followed the last `MATCH` of `ids` when they came before.

    The latest place counts that is followed by so many, or else the first.
    """
    last = len(ids) - MATCH
    if most < 1 or last < 1:
        return ids[:0]
    same = ids[:last] == ids[last]
    for offset in range(1, MATCH):
        same &= ids[offset : last + offset] == ids[last + offset]
    places = np.flatnonzero(same) + MATCH
    if not len(places):
        return ids[:0]
    whole = places[places + most <= len(ids)]
    start = whole[-1] if len(whole) else places[0]
    guess = ids[start : start + most]
    soft = np.flatnonzero(guess < 0)
    return guess[: soft[0]] if len(soft) else guess
