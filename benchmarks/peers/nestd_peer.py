"""The nestd side of switch.py: one engine process that is told to go on on the other size.

Commands and events are those between daemon and engine, so times are what a user of the engine
sees: from the command to the text of the first token on the other size.
"""

from __future__ import annotations

import json
import queue
import random
import statistics
import string
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from resident import resident, storage_read

from nestd.daemon.engine.messages import (
    Cancel,
    ChatMessage,
    Delta,
    EngineOptions,
    Event,
    Failed,
    Finished,
    Ready,
    Retain,
    Sampling,
    SetSubmodel,
    Start,
    Structure,
)
from nestd.daemon.engine.process import EngineProcess

POLL_SECONDS = 0.001
# Tokens of the answer that may come before a command is obeyed; it is cancelled before its end.
ROOM = 64
# Memory counts as back when this part of what is given up at all has gone.
BACK = 0.99
# Every token of the answer becomes text at once, so that its time is seen from outside.
LETTERS = json.dumps({"type": "string", "pattern": "^[a-z]{1000}$"})


class Nestd:
    """One engine process, spoken to as the daemon does."""

    def __init__(self, bundle: Path, prepared: Path, threads: int, answer: int, after: int) -> None:
        options = EngineOptions(threads=threads, prepared_directory=prepared)
        self._answer, self._after = answer, after
        self._events: queue.SimpleQueue[tuple[float, Event]] = queue.SimpleQueue()
        self._engine = EngineProcess(
            bundle, options, lambda event: self._events.put((time.perf_counter(), event))
        )
        start = time.perf_counter()
        self._engine.start()
        at, _ = self._wait(lambda event: isinstance(event, Ready))
        self.load_ms = 1000 * (at - start)
        self._random = random.Random(0)

    def close(self) -> None:
        self._engine.stop(10)

    def round(self, prompt_tokens: int) -> dict[str, Any]:
        """Answer on E4B, on E2B and on E4B again, in one answer; return times in ms."""
        text = "".join(self._random.choices(string.ascii_letters, k=prompt_tokens - 1))  # and bos
        assert self._engine.pid is not None
        read = storage_read(self._engine.pid)
        self._engine.send(Retain(submodel="E4B"))
        self._engine.send(
            Start(
                id="round",
                messages=(ChatMessage(role="user", content=text),),
                submodel="E4B",
                sampling=Sampling(max_tokens=ROOM + self._answer + 2 * self._after),
                structure=Structure(json_schema=LETTERS),
            )
        )
        result: dict[str, Any] = {
            "step E4B": self._tokens("E4B", self._answer),
            "memory E4B": self._memory(),
        }
        result["to E2B"] = self._switch("E2B")
        result["step E2B"] = self._tokens("E2B", self._after)
        result["memory after E2B"] = self._memory()
        result["to E4B"] = self._switch("E4B")
        self._tokens("E4B", self._after)
        result["memory after E4B"] = self._memory()
        self._engine.send(Cancel(id="round"))
        _, finished = self._wait(lambda event: isinstance(event, Finished))
        assert isinstance(finished, Finished)
        result["read from storage"] = storage_read(self._engine.pid) - read
        if finished.prompt_tokens - finished.cached_tokens != prompt_tokens:
            raise SystemExit(f"{finished.prompt_tokens} tokens were read, expected {prompt_tokens}")
        return result

    def _switch(self, name: str) -> dict[str, float]:
        """Switch somewhere within a step, as the governor does; time it until the first token."""
        time.sleep(self._random.uniform(0, self._last_step))
        stop = threading.Event()
        samples: list[tuple[float, int]] = []
        poll = threading.Thread(target=self._poll, args=(samples, stop))
        poll.start()
        sent = time.perf_counter()
        self._engine.send(SetSubmodel(submodel=name))
        self._engine.send(Retain(submodel=name))
        effective = sent
        while True:
            at, event = self._wait(lambda event: isinstance(event, Delta))
            assert isinstance(event, Delta)
            if event.submodel == name:
                break
            effective = max(at, sent)
        stop.set()
        poll.join()
        result = {
            "in effect": 1000 * (effective - sent),
            "first token": 1000 * (at - sent),
        }
        if name == "E2B":
            before, least = samples[0][1], min(mapped for _, mapped in samples)
            given = before - (before - least) * BACK
            back = next(at for at, mapped in samples if mapped <= given)
            result["memory back"] = 1000 * (back - sent)
            result["memory back after effect"] = 1000 * (back - effective)
        return result

    def _poll(self, samples: list[tuple[float, int]], stop: threading.Event) -> None:
        while not stop.is_set():
            mapped = self._memory()["file"]
            samples.append((time.perf_counter(), mapped))
            time.sleep(POLL_SECONDS)

    def _tokens(self, name: str, count: int) -> float:
        """Wait for `count` tokens from `name`; return the median milliseconds between two."""
        times: list[float] = []
        while len(times) < count:
            at, event = self._wait(lambda event: isinstance(event, Delta))
            if isinstance(event, Delta) and event.submodel == name:
                times.append(at)
        self._last_step = statistics.median(b - a for a, b in pairwise(times))
        return 1000 * self._last_step

    def _wait(self, wanted: Callable[[Event], bool]) -> tuple[float, Event]:
        while True:
            at, event = self._events.get(timeout=300)
            if isinstance(event, Failed) or event.kind in ("load_failed", "exited"):
                raise SystemExit(f"the engine said {event}")
            if wanted(event):
                return at, event

    def _memory(self) -> dict[str, int]:
        assert self._engine.pid is not None
        return resident(self._engine.pid)
