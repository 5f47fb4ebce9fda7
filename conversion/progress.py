"""A progress bar on a terminal, a line every ten percent elsewhere."""

from __future__ import annotations

import time
from typing import TextIO

WIDTH = 30
REDRAW_SECONDS = 0.2


class Progress:
    """Counts bytes towards a known total and says what is done, how fast and how long still."""

    def __init__(self, total: int, stream: TextIO) -> None:
        self.total = max(total, 1)
        self.done = 0
        self._stream = stream
        self._terminal = stream.isatty()
        self._start = time.monotonic()
        self._last = self._start
        self._tenth = 0

    def advance(self, nbytes: int) -> None:
        """Count `nbytes` more."""
        self.done += nbytes
        now = time.monotonic()
        if self._terminal:
            if now - self._last >= REDRAW_SECONDS:
                self._last = now
                self._stream.write(f"\r{self._line(now)}")
                self._stream.flush()
        elif (tenth := 10 * self.done // self.total) > self._tenth:
            self._tenth = tenth
            self._stream.write(f"{self._line(now)}\n")

    def finish(self) -> None:
        """Show the end and leave the line."""
        if self._terminal:
            self._stream.write(f"\r{self._line(time.monotonic())}\n")
            self._stream.flush()

    def _line(self, now: float) -> str:
        share = min(1.0, self.done / self.total)
        elapsed = now - self._start
        remaining = elapsed * (1 - share) / share if share else 0.0
        bar = "#" * round(WIDTH * share)
        return (
            f"[{bar:<{WIDTH}}] {share:4.0%}  {size(self.done)} of {size(self.total)}  "
            f"{size(self.done / max(elapsed, 1e-3))}/s  {remaining:.0f} s left "
        )


def size(nbytes: float) -> str:
    """Return bytes for people: `1.9 GB`."""
    for unit in ("B", "kB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} GB"
