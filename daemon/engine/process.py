"""The daemon's handle on the engine process: start, send commands, receive events, stop, kill.

Events arrive on a thread of this module; the callback should only pass them on. Whatever ends the
process, `Exited` is the last event.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import psutil

from nestd.daemon.engine.messages import EVENTS, Command, EngineOptions, Event, Exited, Stop


class EngineProcess:
    """One engine process, from start to exit; make a new object for the next one."""

    def __init__(
        self, bundle: Path, options: EngineOptions, on_event: Callable[[Event], None]
    ) -> None:
        self._bundle = bundle
        self._options = options
        self._on_event = on_event
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._reader: threading.Thread | None = None

    @property
    def pid(self) -> int | None:
        """The process id, None before `start`."""
        return self._process.pid if self._process else None

    @property
    def alive(self) -> bool:
        """The process has been started and has not ended."""
        return self._process is not None and self._process.poll() is None

    @property
    def cpu_seconds(self) -> float | None:
        """Processor time used so far, None where there is no process to ask."""
        if self._process is None:
            return None
        try:
            times = psutil.Process(self._process.pid).cpu_times()
        except psutil.NoSuchProcess:
            return None
        return float(times.user + times.system)

    def start(self) -> None:
        """Start the process; `Ready` or `LoadFailed` follows."""
        ours, theirs = socket.socketpair()
        command = [
            sys.executable,
            "-m",
            "nestd.daemon.engine.worker",
            str(theirs.fileno()),
            str(self._bundle),
            self._options.model_dump_json(),
        ]
        with theirs:
            # In a session of its own, so that Ctrl-C reaches the daemon only, which then drains.
            self._process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=environment(),
                start_new_session=True,
            )
        self._channel = ours
        self._reader = threading.Thread(
            target=self._read, args=(ours, self._process), name="engine-events", daemon=True
        )
        self._reader.start()

    def send(self, command: Command) -> None:
        """Send a command; to a process that has ended it is lost, and `Exited` says so."""
        if self._channel is None:
            raise RuntimeError("the engine process has not been started")
        # Commands are small and the engine's reader thread always reads, so this does not block.
        with contextlib.suppress(OSError):
            self._channel.sendall(command.model_dump_json().encode() + b"\n")

    def stop(self, timeout: float) -> None:
        """End the process after its current step; kill it after `timeout` seconds."""
        if self._process is None:
            return
        self.send(Stop())
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._join()

    def kill(self) -> None:
        """End the process at once."""
        if self._process is not None:
            self._process.kill()
            self._join()

    def _join(self) -> None:
        if self._reader is not None:
            self._reader.join()

    def _read(self, channel: socket.socket, process: subprocess.Popen[bytes]) -> None:
        with channel, channel.makefile("rb") as lines:
            with contextlib.suppress(ConnectionResetError):
                for line in lines:
                    if line.endswith(b"\n"):  # a line cut short by the process's death says nothing
                        self._on_event(EVENTS.validate_json(line))
            self._on_event(Exited(returncode=process.wait()))


def environment() -> dict[str, str]:
    """Return the environment that an engine process runs in."""
    # Large buffers come from mmap and go back to the system when they are freed; glibc otherwise
    # raises this threshold by itself and keeps hundreds of megabytes after loading.
    return {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}
