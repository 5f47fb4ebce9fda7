"""The engine process: reads commands, runs answers step by step, writes events.

Started by `EngineProcess` as `python -m nestd.daemon.engine.worker FD BUNDLE OPTIONS`. One thread
reads commands into a queue; the main thread takes them between two steps, so a cancel or a change
of sub-model takes effect within one step. A third thread decodes and encodes pictures and sound, so
that this holds meanwhile too. The process ends when its socket closes: it never
outlives the daemon. It makes itself the kernel's preferred victim when memory runs out; the daemon
starts another.
"""

from __future__ import annotations

import logging
import queue
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import psutil

from nestd.bundle.errors import BundleError, InsufficientMemory, RequestError
from nestd.bundle.manifest import Bundle, Submodel
from nestd.daemon.engine.generate import Generation, check_length
from nestd.daemon.engine.graphs import Graphs
from nestd.daemon.engine.media import EncodedPrompt, MediaReader
from nestd.daemon.engine.messages import (
    COMMANDS,
    Cancel,
    Command,
    Delta,
    EngineOptions,
    Event,
    Failed,
    Finished,
    KeepEncoders,
    LoadFailed,
    Ready,
    Retain,
    SetSubmodel,
    Start,
    Stats,
    Stop,
    Timings,
    media_of,
)
from nestd.daemon.engine.prefix_cache import PrefixCache
from nestd.daemon.engine.structure import Grammars
from nestd.daemon.logs import configure
from nestd.daemon.prompt.template import Prompt

STATS_SECONDS = 1.0
# Of 1000: killed before the daemon and before most of what else runs on the board.
OOM_SCORE_ADJ = "900"

T = TypeVar("T")

log = logging.getLogger("nestd.engine")


class _Wake:
    """Put into the inbox when the thread for media has done something."""


@dataclass(frozen=True, slots=True)
class _Reading:
    """A request whose media are being read."""

    start: Start
    began: float
    prompt: Future[EncodedPrompt]
    cancelled: threading.Event


class Worker:
    """The engine's state between two steps: what waits and what runs.

    `wake` is called from another thread when a step has become possible or encoders have changed.
    """

    def __init__(
        self,
        graphs: Graphs,
        prompt: Prompt,
        options: EngineOptions,
        send: Callable[[Event], None],
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        self._graphs = graphs
        self._prompt = prompt
        self._options = options
        self._send = send
        self._wake = wake
        self._grammars = Grammars(graphs.bundle)
        self._known = PrefixCache(options.session_cache_bytes, options.session_cache_seconds)
        self._retained: Submodel | None = None
        self._media = MediaReader(graphs.bundle, prompt, options)
        self._media_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="media")
        self._crash: BaseException | None = None
        self._waiting: deque[Start] = deque()
        self._reading: _Reading | None = None
        self._running: tuple[str, Generation, float] | None = None
        self._rates: tuple[float | None, float | None] = (None, None)
        self.submodel: str | None = None

    @property
    def busy(self) -> bool:
        """A step would do something."""
        if self._running or self._crash:
            return True
        return self._reading.prompt.done() if self._reading else bool(self._waiting)

    def handle(self, command: Command) -> None:
        """Take one command; its effect shows with the next step."""
        if isinstance(command, Start):
            self._waiting.append(command)
        elif isinstance(command, Cancel):
            self._cancel(command.id)
        elif isinstance(command, SetSubmodel):
            self._set_submodel(command)
        elif isinstance(command, Retain):
            self._retain(self._graphs.bundle.manifest.submodel(command.submodel))
        elif isinstance(command, KeepEncoders):
            self._submit(self._keep_encoders, command)

    def step(self) -> None:
        """Admit the next request, or run one step of the running one."""
        if self._crash is not None:
            raise self._crash
        if self._running is not None:
            request_id, generation, _ = self._running
            submodel = generation.submodel.name
            self._emit(request_id, generation, generation.step(), submodel)
        elif self._reading is not None:
            reading, self._reading = self._reading, None
            self._begin(reading.start, reading.began, reading.prompt.result)
        else:
            self._admit(self._waiting.popleft())

    def stats(self) -> Stats:
        """Return memory and speed now; None where nothing has run yet."""
        # Not memory_full_info(): it walks every page of the mapped weights.
        memory = psutil.Process().memory_info()
        if self._running is not None:
            self._measure(self._running[1])
        prefill, decode = self._rates
        return Stats(
            rss_bytes=memory.rss,
            private_bytes=memory.rss - memory.shared,
            decode_tokens_per_second=decode,
            prefill_tokens_per_second=prefill,
            submodel=self.submodel,
            encoders=self._media.encoders.loaded,
        )

    def next_expiry(self) -> float | None:
        """Seconds until `expire` is due, None if never."""
        return self._known.next_expiry()

    def expire(self) -> None:
        """Let go of the keys and values that nobody has come back for."""
        self._known.expire()

    def close(self) -> None:
        """Read no more media."""
        self._media_thread.shutdown(wait=False, cancel_futures=True)

    def _admit(self, start: Start) -> None:
        began = time.monotonic()
        if media_of(start.messages):
            cancelled = threading.Event()
            prompt = self._submit(
                self._media.read,
                start.messages,
                partial(self._check_length, start),
                cancelled.is_set,
            )
            self._reading = _Reading(start, began, prompt, cancelled)
        else:
            self._begin(start, began, lambda: EncodedPrompt(self._prompt.encode(start.messages)))

    def _begin(self, start: Start, began: float, read: Callable[[], EncodedPrompt]) -> None:
        """Let the answer to `start` run, or say why it cannot."""
        try:
            prompt = read()
            self._check_length(start, len(prompt.ids))
            generation = Generation(
                self._graphs,
                self._prompt.tokenizer,
                prompt,
                start.sampling,
                self._graphs.bundle.manifest.submodel(start.submodel),
                self._context_length(start),
                self._options.prefill_chunk,
                self._grammars.compile(start.structure) if start.structure else None,
                self._known,
            )
        except RequestError as error:
            self._send(Failed(id=start.id, code=error.code, message=str(error)))
            return
        self._running = (start.id, generation, time.monotonic() - began)

    def _context_length(self, start: Start) -> int:
        full = self._options.context_length
        return min(full, start.context_length or full)

    def _check_length(self, start: Start, tokens: int) -> None:
        """Raise if a prompt of `tokens` leaves no room for an answer."""
        context_length = self._context_length(start)
        if context_length <= tokens < self._options.context_length:
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

    def _submit(self, function: Callable[..., T], *args: object) -> Future[T]:
        """Run `function` on the thread for media; what it raises unforeseen ends the engine."""
        future = self._media_thread.submit(function, *args)
        future.add_done_callback(self._finished)
        return future

    def _finished(self, future: Future[Any]) -> None:
        if not future.cancelled() and not isinstance(future.exception(), RequestError | None):
            self._crash = future.exception()
        self._wake()

    def _cancel(self, request_id: str) -> None:
        if self._running and self._running[0] == request_id:
            generation = self._running[1]
            self._emit(request_id, generation, generation.cancel(), generation.submodel.name)
        elif self._reading and self._reading.start.id == request_id:
            self._reading.cancelled.set()
            self._reading = None
            self._send(Finished(id=request_id, finish_reason="cancelled"))
        else:
            for start in [start for start in self._waiting if start.id == request_id]:
                self._waiting.remove(start)
                self._send(Finished(id=request_id, finish_reason="cancelled"))

    def _retain(self, submodel: Submodel) -> None:
        shrinks = (
            self._retained is not None and submodel.decoder_bytes < self._retained.decoder_bytes
        )
        if shrinks:
            self._known.clear()
        self._retained = submodel
        self._graphs.retain(submodel)

    def _set_submodel(self, command: SetSubmodel) -> None:
        """Change the running answer and those that wait; an unknown name is the daemon's bug."""
        submodel = self._graphs.bundle.manifest.submodel(command.submodel)
        if self._running and command.id in (None, self._running[0]):
            self._running[1].submodel = submodel
        if self._reading and command.id in (None, self._reading.start.id):
            start = self._reading.start.model_copy(update={"submodel": submodel.name})
            self._reading = replace(self._reading, start=start)
        for index, start in enumerate(self._waiting):
            if command.id in (None, start.id):
                self._waiting[index] = start.model_copy(update={"submodel": submodel.name})

    def _emit(self, request_id: str, generation: Generation, piece: str, submodel: str) -> None:
        self.submodel = submodel
        if piece:
            self._send(
                Delta(
                    id=request_id,
                    text=piece,
                    completion_tokens=generation.completion_tokens,
                    submodel=submodel,
                )
            )
        if generation.finish_reason is None or self._running is None:
            return
        self._measure(generation)
        self._send(
            Finished(
                id=request_id,
                text=generation.text,
                finish_reason=generation.finish_reason,
                prompt_tokens=generation.prompt_tokens,
                completion_tokens=generation.completion_tokens,
                cached_tokens=generation.cached_tokens,
                switches=tuple(generation.switches),
                timings=Timings(
                    encode_ms=1000 * self._running[2],
                    prefill_ms=1000 * generation.prefill_seconds,
                    decode_ms=1000 * generation.decode_seconds,
                ),
            )
        )
        self._running = None

    def _measure(self, generation: Generation) -> None:
        prefill, decode = self._rates
        if generation.prefill_seconds and not generation.prefilling:
            read = generation.prompt_tokens - generation.cached_tokens
            prefill = read / generation.prefill_seconds
        # The first token comes out of the prefill.
        if generation.completion_tokens > 1 and generation.decode_seconds:
            decode = (generation.completion_tokens - 1) / generation.decode_seconds
        self._rates = (prefill, decode)


def serve(channel: socket.socket, bundle_path: Path, options: EngineOptions) -> int:
    """Load the bundle and answer commands until `Stop` or the end of the socket."""
    reader = channel.makefile("rb")
    writer = channel.makefile("wb")

    def send(event: Event) -> None:
        writer.write(event.model_dump_json().encode() + b"\n")
        writer.flush()

    began = time.monotonic()
    inbox: queue.SimpleQueue[Command | _Wake | None] = queue.SimpleQueue()
    try:
        bundle = Bundle.open(bundle_path)
        worker = Worker(
            Graphs(bundle, options), Prompt(bundle), options, send, lambda: inbox.put(_Wake())
        )
    except BundleError as error:
        send(LoadFailed(message=str(error)))
        return 1
    send(Ready(load_seconds=time.monotonic() - began, context_length=options.context_length))

    threading.Thread(target=_read, args=(reader, inbox), daemon=True).start()
    next_stats = 0.0
    while True:
        idle = not worker.busy
        if idle or time.monotonic() >= next_stats:
            send(worker.stats())
            next_stats = time.monotonic() + STATS_SECONDS
        while idle or not inbox.empty():
            try:
                command = inbox.get(timeout=worker.next_expiry() if idle else None)
            except queue.Empty:
                worker.expire()
                break
            if command is None or isinstance(command, Stop):
                worker.close()
                return 0
            if not isinstance(command, _Wake):
                worker.handle(command)
            idle = False
        if worker.busy:
            worker.step()


def _read(reader: BinaryIO, inbox: queue.SimpleQueue[Command | _Wake | None]) -> None:
    try:
        for line in reader:
            inbox.put(COMMANDS.validate_json(line))
    except ConnectionResetError:
        pass  # the daemon died with events of ours unread: the same end
    finally:
        inbox.put(None)


def _prefer_as_oom_victim() -> None:
    try:
        Path("/proc/self/oom_score_adj").write_text(OOM_SCORE_ADJ, encoding="ascii")
    except OSError as error:
        log.warning("cannot become the preferred victim when memory runs out: %s", error)


def main() -> int:
    """Entry point of the engine process."""
    descriptor, bundle, json_options = sys.argv[1:]
    options = EngineOptions.model_validate_json(json_options)
    configure("info", options.log_format)
    _prefer_as_oom_victim()
    with socket.socket(fileno=int(descriptor)) as channel:
        try:
            return serve(channel, Path(bundle), options)
        except (BrokenPipeError, ConnectionResetError):
            return 0  # the daemon has gone


if __name__ == "__main__":
    sys.exit(main())
