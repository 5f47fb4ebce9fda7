"""Keeps an engine process alive: starts it, starts it again with a growing pause, notices hangs.

The engine may die at any time (it is the kernel's preferred victim when memory runs out). What
becomes of the requests it ran is not decided here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from nestd.daemon.engine.messages import Command, Event, Exited, LoadFailed, Ready

log = logging.getLogger(__name__)

# A load may fail for want of memory that comes back; after so many in a row clients are told.
LOADS_BEFORE_DEGRADED = 3
LONGEST_PAUSE_SECONDS = 60.0
# An engine at work sends statistics every second; a prefill chunk of a slow board may take longer.
# One that loads says nothing, and may take minutes; but it uses the processor.
STALL_SECONDS = 180.0


class EngineHandle(Protocol):
    """The daemon's side of one engine process (`nestd.daemon.engine.process.EngineProcess`)."""

    @property
    def pid(self) -> int | None:
        """The process id, None before `start`."""

    @property
    def cpu_seconds(self) -> float | None:
        """Processor time used so far, None where there is no process to ask."""

    def start(self) -> None:
        """Spawn the process."""

    def send(self, command: Command) -> None:
        """Pass a command on; returns at once."""

    def stop(self, timeout: float) -> None:
        """Ask the process to end, and end it after `timeout` seconds."""

    def kill(self) -> None:
        """End the process at once."""


MakeEngine = Callable[[Callable[[Event], None]], EngineHandle]


@dataclass(frozen=True, slots=True)
class EngineEvent:
    """An event of the engine process number `generation`."""

    generation: int
    event: Event


class Supervisor:
    """Owns the engine process."""

    def __init__(self, make_engine: MakeEngine, emit: Callable[[EngineEvent], None]) -> None:
        self._make_engine = make_engine
        self._emit = emit
        self._engine: EngineHandle | None = None
        self._generation = 0
        self._failed_loads = 0
        self._last_event = 0.0
        self._load_cpu_seconds: float | None = None
        self._respawn_at: float | None = None
        self.state: Literal["off", "loading", "ready"] = "off"
        self.exits = 0
        self.context_length: int | None = None
        self.load_error: str | None = None

    @property
    def degraded(self) -> str | None:
        """Why no engine can be expected soon, or None."""
        return self.load_error if self._failed_loads >= LOADS_BEFORE_DEGRADED else None

    @property
    def respawn_at(self) -> float | None:
        """When the next process is due, or None."""
        return self._respawn_at

    @property
    def engine_pid(self) -> int | None:
        """The process id of the engine, None while there is none."""
        return None if self._engine is None else self._engine.pid

    def start(self, now: float) -> None:
        """Start a new process."""
        self._respawn_at = None
        self._generation += 1
        self._last_event, self._load_cpu_seconds = now, None
        generation = self._generation
        self._engine = self._make_engine(lambda event: self._emit(EngineEvent(generation, event)))
        self.state = "loading"
        try:
            self._engine.start()
        except OSError as error:  # no memory or no process left to fork
            log.error("cannot start the engine process: %s", error)
            self.load_error = f"cannot start the engine process: {error}"
            self._gone(now)

    def note(self, item: EngineEvent, now: float) -> bool:
        """Take note of an event; False if it comes from a process that is history."""
        if item.generation != self._generation or self._engine is None:
            return False
        self._last_event = now
        event = item.event
        if isinstance(event, Ready):
            self.state = "ready"
            self.context_length = event.context_length
            self._failed_loads, self.load_error = 0, None
            log.info("engine ready after %.1f s", event.load_seconds)
        elif isinstance(event, LoadFailed):
            self.load_error = event.message
            log.error("the engine cannot load the bundle: %s", event.message)
        elif isinstance(event, Exited):
            log.warning("the engine process ended with status %d", event.returncode)
            if self.load_error is None and self.state == "loading":
                self.load_error = (
                    f"the engine ended with status {event.returncode} while it loaded: see the log"
                )
            self._gone(now)
        return True

    def send(self, command: Command) -> None:
        """Pass a command to the engine."""
        if self._engine is not None:
            self._engine.send(command)

    def tick(self, now: float, busy: bool) -> None:
        """Start a process that is due; kill one that hangs, at work or while it loads."""
        if self._respawn_at is not None and now >= self._respawn_at:
            self.start(now)
            return
        if self._engine is None:
            return
        loading = self.state == "loading"
        if loading and (used := self._engine.cpu_seconds) != self._load_cpu_seconds:
            self._last_event, self._load_cpu_seconds = now, used
        if (busy or loading) and now - self._last_event > STALL_SECONDS:
            log.error("the engine has been silent for %.0f s: killing it", STALL_SECONDS)
            self._last_event = now
            self._engine.kill()

    def stop(self, timeout: float) -> None:
        """End the process for good."""
        engine, self._engine, self.state, self._respawn_at = self._engine, None, "off", None
        if engine is not None:
            engine.stop(timeout)

    def _gone(self, now: float) -> None:
        """The process has ended: plan the next one. Only a process that never got ready waits."""
        self.exits += 1
        if self.state == "loading":
            self._failed_loads += 1
        pause = min(LONGEST_PAUSE_SECONDS, 2.0**self._failed_loads) if self._failed_loads else 0.5
        self._engine, self.state, self._respawn_at = None, "off", now + pause
