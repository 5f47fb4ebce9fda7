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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import psutil

from nestd.bundle.errors import BundleError, RequestError
from nestd.bundle.manifest import Bundle, Submodel
from nestd.daemon.engine.admission import Admission, Admitted, Refused
from nestd.daemon.engine.generate import Generation
from nestd.daemon.engine.graphs import Graphs
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
)
from nestd.daemon.engine.prefix_cache import PrefixCache
from nestd.daemon.engine.prompt_lookup import PromptLookup
from nestd.daemon.engine.scheduler import Scheduler
from nestd.daemon.engine.structure import Grammars
from nestd.daemon.logs import configure
from nestd.daemon.prompt.template import Prompt

STATS_SECONDS = 1.0
# Of 1000: killed before the daemon and before most of what else runs on the board.
OOM_SCORE_ADJ = "900"

log = logging.getLogger("nestd.engine")


class _Wake:
    """Put into the inbox when the thread for media has done something."""


@dataclass(slots=True)
class _Answer:
    """A running request: when its prompt began to be read, was read, and gave its first token."""

    id: str
    generation: Generation
    began: float
    ready: float
    first_token: float | None = None

    def timings(self, now: float) -> Timings:
        """Return where the time until `now` went."""
        first = now if self.first_token is None else self.first_token
        return Timings(
            encode_ms=1000 * (self.ready - self.began),
            prefill_ms=1000 * (first - self.ready),
            decode_ms=1000 * (now - first),
        )


class Worker:
    """The engine's state between two steps: what waits and what runs.

    `wake` is called from another thread when a step has become possible or encoders have changed;
    `clock` gives seconds.
    """

    def __init__(
        self,
        graphs: Graphs,
        prompt: Prompt,
        options: EngineOptions,
        send: Callable[[Event], None],
        wake: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._graphs = graphs
        self._prompt = prompt
        self._options = options
        self._send = send
        self._clock = clock
        self._grammars = Grammars(graphs.bundle)
        self._known = PrefixCache(options.session_cache_bytes, options.session_cache_seconds)
        self._caches = graphs.new_caches(options.parallel_requests, options.context_length)
        self._admission = Admission(graphs.bundle, prompt, options, wake, clock)
        self._scheduler = Scheduler(graphs, options.prefill_chunk, options.max_stall_seconds, clock)
        self._answers: dict[Generation, _Answer] = {}
        self._retained: Submodel | None = None
        self.submodel: str | None = None

    @property
    def busy(self) -> bool:
        """A step would do something."""
        if self._answers or self._admission.crash:
            return True
        return self._admission.possible(self._places)

    def handle(self, command: Command) -> None:
        """Take one command; its effect shows with the next step."""
        if isinstance(command, Start):
            self._admission.add(command)
        elif isinstance(command, Cancel):
            self._cancel(command.id)
        elif isinstance(command, SetSubmodel):
            self._set_submodel(command)
        elif isinstance(command, Retain):
            self._retain(self._graphs.bundle.manifest.submodel(command.submodel))
        elif isinstance(command, KeepEncoders):
            self._admission.keep_encoders(command)

    def step(self) -> None:
        """Admit the next request, if one may run, and run one step of those that do."""
        if self._admission.crash is not None:
            raise self._admission.crash
        if self._places:
            self._admit()
        if self._answers:
            for progress in self._scheduler.step():
                answer = self._answers[progress.generation]
                self.submodel = progress.submodel
                self._emit(answer, progress.piece, progress.submodel)

    def stats(self) -> Stats:
        """Return memory and speed now; None where nothing has run yet."""
        # Not memory_full_info(): it walks every page of the mapped weights.
        memory = psutil.Process().memory_info()
        return Stats(
            rss_bytes=memory.rss,
            private_bytes=memory.rss - memory.shared,
            decode_tokens_per_second=self._scheduler.decode.read(),
            prefill_tokens_per_second=self._scheduler.prefill.read(),
            submodel=self.submodel,
            encoders=self._admission.encoders,
        )

    def next_expiry(self) -> float | None:
        """Seconds until `expire` is due, None if never."""
        return self._known.next_expiry()

    def expire(self) -> None:
        """Let go of the keys and values that nobody has come back for."""
        self._known.expire()

    def close(self) -> None:
        """Read no more media."""
        self._admission.close()

    @property
    def _places(self) -> int:
        """How many more answers may run."""
        return self._options.parallel_requests - len(self._answers)

    def _admit(self) -> None:
        """Let the next request run, or say why it cannot."""
        admitted = self._admission.next(self._places)
        if admitted is None:
            return
        try:
            if isinstance(admitted, Refused):
                raise admitted.error
            self._begin(admitted)
        except RequestError as error:
            self._send(Failed(id=admitted.start.id, code=error.code, message=str(error)))

    def _begin(self, admitted: Admitted) -> None:
        start = admitted.start
        grammar = self._grammars.compile(start.structure) if start.structure else None
        generation = Generation(
            self._graphs,
            self._prompt.tokenizer,
            admitted.prompt,
            start.sampling,
            self._graphs.bundle.manifest.submodel(start.submodel),
            self._caches.new(),
            admitted.context_length,
            grammar,
            self._known,
            PromptLookup() if self._options.prompt_lookup else None,
        )
        self._scheduler.add(generation)
        self._answers[generation] = _Answer(start.id, generation, admitted.began, self._clock())

    def _cancel(self, request_id: str) -> None:
        if self._admission.cancel(request_id):
            self._send(Finished(id=request_id, finish_reason="cancelled"))
            return
        for answer in self._answers.values():
            if answer.id == request_id:
                generation = answer.generation
                self._emit(answer, generation.cancel(), generation.submodel.name)
                return

    def _retain(self, submodel: Submodel) -> None:
        shrinks = (
            self._retained is not None and submodel.decoder_bytes < self._retained.decoder_bytes
        )
        if shrinks:
            self._known.clear()
        self._retained = submodel
        self._graphs.retain(submodel)

    def _set_submodel(self, command: SetSubmodel) -> None:
        """Change running answers and those that wait; an unknown name is the daemon's bug."""
        submodel = self._graphs.bundle.manifest.submodel(command.submodel)
        for answer in self._answers.values():
            if command.id in (None, answer.id):
                answer.generation.submodel = submodel
        self._admission.set_submodel(submodel.name, command.id)

    def _emit(self, answer: _Answer, piece: str, submodel: str) -> None:
        """Tell the daemon what is new of an answer, and let it go if it has ended."""
        generation = answer.generation
        if answer.first_token is None and not generation.prefilling:
            answer.first_token = self._clock()
        if piece:
            self._send(
                Delta(
                    id=answer.id,
                    text=piece,
                    completion_tokens=generation.completion_tokens,
                    submodel=submodel,
                )
            )
        if generation.finish_reason is None:
            return
        self._send(
            Finished(
                id=answer.id,
                text=generation.text,
                finish_reason=generation.finish_reason,
                prompt_tokens=generation.prompt_tokens,
                completion_tokens=generation.completion_tokens,
                cached_tokens=generation.cached_tokens,
                guessed_tokens=generation.guessed_tokens,
                switches=tuple(generation.switches),
                timings=answer.timings(self._clock()),
            )
        )
        del self._answers[generation]
        self._scheduler.remove(generation)


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
