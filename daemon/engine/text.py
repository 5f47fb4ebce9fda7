"""Token ids -> text while they come: whole characters only, and nothing behind a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class StreamingText:
    """The text of one answer.

    Attributes:
        text: what may be shown so far.
        stopped: a stop string has come; `text` ends before it.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._stop = tuple(stop)
        self._held = ""  # may be the beginning of a stop string
        self._ids: list[int] = []
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Take the next token; return the text that it makes certain, "" if none."""
        self._ids.append(token)
        # DecodeStream keeps the bytes of an unfinished character back.
        return self._show(self._stream.step(self._tokenizer, token) or "", last=False)

    def finish(self) -> str:
        """Return the text held back: the answer has ended, so it cannot become a stop string.

        Bytes of a character that never ended appear as U+FFFD.
        """
        if self.stopped:
            return ""
        whole = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        shown = self.text + self._held
        rest = whole[len(shown) :] if whole.startswith(shown) else ""
        return self._show(rest, last=True)

    def _show(self, piece: str, last: bool) -> str:
        pending = self._held + piece
        cut = min((at for stop in self._stop if (at := pending.find(stop)) >= 0), default=None)
        if cut is not None:
            self.stopped = True
            self._held, visible = "", pending[:cut]
        else:
            keep = 0 if last else self._possible_stop(pending)
            visible = pending[: len(pending) - keep]
            self._held = pending[len(visible) :]
        self.text += visible
        return visible

    def _possible_stop(self, pending: str) -> int:
        """Return how many characters at the end of `pending` may begin a stop string."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for size in range(min(longest, len(pending)), 0, -1):
            if any(stop.startswith(pending[-size:]) for stop in self._stop):
                return size
        return 0
