"""Requests on their way to an answer: those that wait, and those whose pictures are being read.

Pictures and sound are decoded and encoded on a thread of their own, while answers run.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from nestd.bundle.errors import BundleError, InsufficientMemory, RequestError
from nestd.bundle.manifest import Bundle, Modality
from nestd.daemon.engine.generate import check_length
from nestd.daemon.engine.media import EncodedPrompt, MediaReader
from nestd.daemon.engine.messages import EngineOptions, KeepEncoders, Start, media_of
from nestd.daemon.prompt.template import Prompt

log = logging.getLogger("nestd.engine")


@dataclass(slots=True)
class _Reading:
    """A request whose media are being read."""

    start: Start
    began: float
    prompt: Future[EncodedPrompt]
    cancelled: threading.Event


@dataclass(frozen=True, slots=True)
class Admitted:
    """A request that may run now.

    Attributes:
        began: when its prompt began to be read, on the engine's clock.
        context_length: tokens that its prompt and answer may have.
    """

    start: Start
    began: float
    prompt: EncodedPrompt
    context_length: int


@dataclass(frozen=True, slots=True)
class Refused:
    """A request that may not run, and why."""

    start: Start
    error: RequestError


class Admission:
    """Reads prompts, the first come first; `wake` is called from another thread when one is read.

    Attributes:
        crash: what broke the thread for media; the engine cannot go on.
    """

    def __init__(
        self,
        bundle: Bundle,
        prompt: Prompt,
        options: EngineOptions,
        wake: Callable[[], None],
        clock: Callable[[], float],
    ) -> None:
        self._prompt = prompt
        self._full = options.context_length
        self._wake = wake
        self._clock = clock
        self._media = MediaReader(bundle, prompt, options)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="media")
        self._waiting: deque[Start] = deque()
        self._reading: list[_Reading] = []
        self.crash: BaseException | None = None

    @property
    def encoders(self) -> tuple[Modality, ...]:
        """The encoders that are loaded now."""
        return self._media.encoders.loaded

    def add(self, start: Start) -> None:
        """Let a request wait for its turn."""
        self._waiting.append(start)

    def possible(self, places: int) -> bool:
        """Say whether `next` would do something, where so many more answers may run."""
        if any(item.prompt.done() for item in self._reading):
            return True
        return bool(self._waiting) and len(self._reading) < places

    def next(self, places: int) -> Admitted | Refused | None:
        """Return the next request that may run, one that may not and why, or None.

        The same media twice are encoded once, so requests with media are read one by one.
        """
        for reading in self._reading:
            if reading.prompt.done():
                self._reading.remove(reading)
                return self._admitted(reading.start, reading.began, reading.prompt.result)
        if not self._waiting or len(self._reading) >= places:
            return None
        start, began = self._waiting.popleft(), self._clock()
        if not media_of(start.messages):
            return self._admitted(
                start, began, lambda: EncodedPrompt(self._prompt.encode(start.messages))
            )
        cancelled = threading.Event()
        prompt = self._submit(
            self._media.read,
            start.messages,
            lambda tokens: self._check_length(start, tokens),
            cancelled.is_set,
        )
        self._reading.append(_Reading(start, began, prompt, cancelled))
        return None

    def cancel(self, request_id: str) -> bool:
        """Forget a request; False if it is not on its way."""
        for reading in self._reading:
            if reading.start.id == request_id:
                reading.cancelled.set()
                self._reading.remove(reading)
                return True
        for start in self._waiting:
            if start.id == request_id:
                self._waiting.remove(start)
                return True
        return False

    def set_submodel(self, submodel: str, request_id: str | None) -> None:
        """Let one request, or all on their way (None), begin on `submodel`."""
        change = {"submodel": submodel}
        for reading in self._reading:
            if request_id in (None, reading.start.id):
                reading.start = reading.start.model_copy(update=change)
        for index, start in enumerate(self._waiting):
            if request_id in (None, start.id):
                self._waiting[index] = start.model_copy(update=change)

    def keep_encoders(self, command: KeepEncoders) -> None:
        """Unload and load encoders once what is being read has been read."""
        self._submit(self._keep_encoders, command)

    def close(self) -> None:
        """Read no more media."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _admitted(
        self, start: Start, began: float, read: Callable[[], EncodedPrompt]
    ) -> Admitted | Refused:
        try:
            prompt = read()
            self._check_length(start, len(prompt.ids))
        except RequestError as error:
            return Refused(start, error)
        return Admitted(start, began, prompt, self._context_length(start))

    def _context_length(self, start: Start) -> int:
        return min(self._full, start.context_length or self._full)

    def _check_length(self, start: Start, tokens: int) -> None:
        """Raise if a prompt of `tokens` leaves no room for an answer."""
        context_length = self._context_length(start)
        if context_length <= tokens < self._full:
            raise InsufficientMemory(
                f"the prompt has {tokens} tokens and memory is short, which leaves a context of "
                f"{context_length} now: shorten it, or ask again later"
            )
        check_length(tokens, context_length)

    def _keep_encoders(self, command: KeepEncoders) -> None:
        self._media.keep(command.keep)
        for modality in command.load:
            try:
                self._media.encoders.load(modality)
            except BundleError as error:
                log.error("cannot load the %s encoder: %s", modality, error)

    def _submit(self, function: Callable[..., Any], *args: object) -> Future[Any]:
        """Run `function` on the thread for media; what it raises unforeseen ends the engine."""
        future = self._thread.submit(function, *args)
        future.add_done_callback(self._finished)
        return future

    def _finished(self, future: Future[Any]) -> None:
        if not future.cancelled() and not isinstance(future.exception(), RequestError | None):
            self.crash = future.exception()
        self._wake()
