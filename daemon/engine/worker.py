"""The engine process: reads commands, runs answers step by step, writes events.

Started by `EngineProcess` as `python -m nestd.daemon.engine.worker FD BUNDLE OPTIONS`. One thread
reads commands into a queue; the main thread takes them between two steps, so a cancel or a change
of sub-model takes effect within one step. The process ends when its socket closes: it never
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
from pathlib import Path
from typing import BinaryIO

import psutil

from nestd.bundle.errors import BundleError, InsufficientMemory, RequestError
from nestd.bundle.manifest import Bundle
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
    LoadFailed,
    Ready,
    Retain,
    SetSubmodel,
    Start,
    Stats,
    Stop,
    Timings,
)
from nestd.daemon.logs import configure
from nestd.daemon.prompt.template import Prompt

STATS_SECONDS = 1.0
# Of 1000: killed before the daemon and before most of what else runs on the board.
OOM_SCORE_ADJ = "900"

_log = logging.getLogger("nestd.engine")


class Worker:
    """The engine's state between two steps: what waits and what runs."""

    def __init__(
        self, graphs: Graphs, prompt: Prompt, options: EngineOptions, send: Callable[[Event], None]
    ) -> None:
        self._graphs = graphs
        self._prompt = prompt
        self._options = options
        self._send = send
        self._waiting: deque[Start] = deque()
        self._running: tuple[str, Generation, float] | None = None
        self._rates: tuple[float | None, float | None] = (None, None)
        self.submodel: str | None = None

    @property
    def busy(self) -> bool:
        """A step would do something."""
        return bool(self._running or self._waiting)

    def handle(self, command: Command) -> None:
        """Take one command; its effect shows with the next step."""
        if isinstance(command, Start):
            self._waiting.append(command)
        elif isinstance(command, Cancel):
            self._cancel(command.id)
        elif isinstance(command, SetSubmodel):
            self._set_submodel(command)
        elif isinstance(command, Retain):
            self._graphs.retain(self._graphs.bundle.manifest.submodel(command.submodel))

    def step(self) -> None:
        """Admit the next request, or run one step of the running one."""
        if self._running is None:
            self._admit(self._waiting.popleft())
        else:
            request_id, generation, _ = self._running
            submodel = generation.submodel.name
            self._emit(request_id, generation, generation.step(), submodel)

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
        )

    def _admit(self, start: Start) -> None:
        began = time.monotonic()
        full = self._options.context_length
        context_length = min(full, start.context_length or full)
        try:
            prompt_ids = self._prompt.encode(start.messages)
            if context_length <= len(prompt_ids) < full:
                raise InsufficientMemory(
                    f"the prompt has {len(prompt_ids)} tokens and memory is short, which leaves a "
                    f"context of {context_length} now: shorten it, or ask again later"
                )
            generation = Generation(
                self._graphs,
                self._prompt.tokenizer,
                prompt_ids,
                start.sampling,
                self._graphs.bundle.manifest.submodel(start.submodel),
                context_length,
                self._options.prefill_chunk,
            )
        except RequestError as error:
            self._send(Failed(id=start.id, code=error.code, message=str(error)))
            return
        self._running = (start.id, generation, time.monotonic() - began)

    def _cancel(self, request_id: str) -> None:
        if self._running and self._running[0] == request_id:
            generation = self._running[1]
            self._emit(request_id, generation, generation.cancel(), generation.submodel.name)
            return
        for start in self._waiting:
            if start.id == request_id:
                self._waiting.remove(start)
                timings = Timings(encode_ms=0, prefill_ms=0, decode_ms=0)
                self._send(
                    Finished(
                        id=request_id,
                        text="",
                        finish_reason="cancelled",
                        prompt_tokens=0,
                        completion_tokens=0,
                        switches=(),
                        timings=timings,
                    )
                )
                return

    def _set_submodel(self, command: SetSubmodel) -> None:
        """Change the running answer and those that wait; an unknown name is the daemon's bug."""
        submodel = self._graphs.bundle.manifest.submodel(command.submodel)
        if self._running and command.id in (None, self._running[0]):
            self._running[1].submodel = submodel
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
            prefill = generation.prompt_tokens / generation.prefill_seconds
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
    try:
        bundle = Bundle.open(bundle_path)
        worker = Worker(Graphs(bundle, options), Prompt(bundle), options, send)
    except BundleError as error:
        send(LoadFailed(message=str(error)))
        return 1
    send(Ready(load_seconds=time.monotonic() - began, context_length=options.context_length))

    inbox: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(reader, inbox), daemon=True).start()
    next_stats = 0.0
    while True:
        idle = not worker.busy
        if idle or time.monotonic() >= next_stats:
            send(worker.stats())
            next_stats = time.monotonic() + STATS_SECONDS
        while idle or not inbox.empty():
            command = inbox.get()
            if command is None or isinstance(command, Stop):
                return 0
            worker.handle(command)
            idle = False
        if worker.busy:
            worker.step()


def _read(reader: BinaryIO, inbox: queue.SimpleQueue[Command | None]) -> None:
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
        _log.warning("cannot become the preferred victim when memory runs out: %s", error)


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
