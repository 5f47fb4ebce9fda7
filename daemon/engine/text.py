"""Token ids -> text while they come: whole characters only, and nothing behind a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

REPLACEMENT = "\ufffd"  # what a decoder makes of bytes that are no text, or not yet


class StreamingText:
    """The text of one answer.

    Bytes that never become text appear as U+FFFD. What was shown stays shown, so where a run of
    bytes turns out broken in its middle there may be fewer of them than in the decoded whole.

    Attributes:
        text: what may be shown so far.
        stopped: a stop string has come; `text` ends before it.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._held = ""  # may be the beginning of a stop string
        # The last ids that were shown, and those that are not: a decoder may treat the first id of
        # a text in a way of its own, so new ids are decoded behind some that are known.
        self._shown_ids: list[int] = []
        self._new_ids: list[int] = []
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Take the next token; return the text that it makes certain, "" if none."""
        self._new_ids.append(token)
        # tokenizers' DecodeStream would do the same, but raises on bytes that are no text.
        piece = self._new_text()
        if not piece or piece.endswith(REPLACEMENT):
            return ""  # a character that is not whole yet, or a special token
        self._shown_ids, self._new_ids = self._new_ids, []
        return self._show(piece, last=False)

    def finish(self) -> str:
        """Return the text held back: the answer has ended, so it cannot become a stop string."""
        return "" if self.stopped else self._show(self._new_text(), last=True)

    def _new_text(self) -> str:
        known = self._tokenizer.decode(self._shown_ids, skip_special_tokens=True)
        whole: str = self._tokenizer.decode(
            self._shown_ids + self._new_ids, skip_special_tokens=True
        )
        return whole[len(known) :]

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
