"""Which tokens the cache of a sliding layer holds: pure arithmetic, no buffers.

Such a cache holds the tokens [start, length) of its sequence in its rows [0, length - start). A new
token sees itself and the `size` - 1 tokens before it, so nothing older is needed ever again, unless
the sequence is cut back. The decoder graph is told `length - start` and works positions out from
`length`; it cannot notice rows that are missing. So what may run and what may be cut back is
decided here and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Window:
    """The shape of a sliding layer's cache.

    Attributes:
        size: tokens that a token sees, itself among them; the model's `sliding_window`.
        capacity: rows of the cache.
        moves: False where the whole session fits: then no token ever leaves.
    """

    size: int
    capacity: int
    moves: bool = True

    @classmethod
    def of(cls, size: int, context_length: int, prefill_chunk: int | None) -> Window:
        """Return the cache of a session of `context_length` that reads `prefill_chunk` a step.

        With None, it has room for the whole session. A margin of a quarter of the window keeps
        small what a token pays for moving rows.
        """
        capacity = size - 1 + max(prefill_chunk or context_length, size // 4)
        if capacity >= context_length:
            return cls(size, context_length, moves=False)
        return cls(size, capacity)

    @property
    def most_rows(self) -> int:
        """New tokens that a step may bring at any length of the sequence."""
        return self.capacity - self.size + 1 if self.moves else self.capacity

    def start_for(self, start: int, length: int, rows: int) -> int:
        """Return the first token to keep so that `rows` more fit behind the token `length` - 1.

        Where that is not `start`, rows [result - start, length - start) have to move to the front.
        What the new tokens see is kept, and where there is room a quarter of the margin more, so
        that a sequence can be cut back a little later on: a chat's next turn may spell the end of
        its last one otherwise. Single tokens make rows move once in three quarters of the margin.

        Raises:
            ValueError: more rows than a step may bring, or `start` lacks what the first one sees.
        """
        if not self.holds(start, length):
            raise ValueError(
                f"tokens before {start} are gone, the next token at {length} sees some"
            )
        if length - start + rows <= self.capacity:
            return start
        if not self.moves or rows > self.most_rows:
            raise ValueError(f"{rows} tokens in one step, at most {self.most_rows} fit a window")
        seen = self.size - 1
        kept = max(seen, min(seen + self.most_rows // 4, self.capacity - rows))
        return max(start, length - kept)

    def holds(self, start: int, length: int) -> bool:
        """Whether a sequence cut to `length` can go on with a cache that begins at `start`."""
        return start <= max(0, length - self.size + 1)
