"""A whole daemon on the memory transport and the scripted engine, moved on step by step."""

from __future__ import annotations

import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from nestd.daemon.config import load_settings
from nestd.daemon.elastic.memory import Memory
from nestd.daemon.elastic.resources import Snapshot
from nestd.daemon.mqtt.memory import MemoryTransport
from nestd.daemon.mqtt.packets import MakeWill, Transport
from nestd.daemon.node import Parts
from nestd.daemon.notify import Notifier
from nestd.daemon.service import Daemon
from nestd.daemon.settings import Settings
from support.engine import FakeEngine, small_manifest

REPLY = "clients/me/replies"
PATIENCE = 30.0


def settings_for_tests(**overrides: object) -> Settings:
    """Settings of the generic profile, node `node`, one answer at a time unless told otherwise.

    Keys are dotted, with `__` for the dot.
    """
    dotted = {key.replace("__", "."): value for key, value in overrides.items()}
    return load_settings(
        config=None,
        profile="generic",
        overrides={"node": "node", "limits.queue": 3, "engine.parallel_requests": 1} | dotted,
        environ={},
        root=Path("/nonexistent"),
    )


class FakeBoard:
    """A board whose next snapshots are `facts`, with the time of the clock."""

    def __init__(self) -> None:
        self.facts = Snapshot(time=0.0, memory=Memory(available_bytes=8 * 2**30))
        self.samples = 0
        self.closed = False

    def sample(self, pids: Iterable[int] = (), now: float | None = None) -> Snapshot:
        assert pids
        assert now is not None
        self.samples += 1
        return replace(self.facts, time=now)

    def close(self) -> None:
        self.closed = True


class Node:
    """The daemon, its transport, its engines (the last is `engine`), its board and a clock."""

    def __init__(
        self,
        encoders: bool = False,
        now: float = 1000.0,
        notifier: Notifier | None = None,
        check_configuration: Callable[[], object] = lambda: None,
        **overrides: object,
    ) -> None:
        """With `encoders` the bundle sees and hears. A node has a state directory of its own."""
        directory = tempfile.mkdtemp()
        weakref.finalize(self, shutil.rmtree, directory, ignore_errors=True)
        self.now = now
        self.board = FakeBoard()
        self.engines: list[FakeEngine] = []
        self.transport = MemoryTransport()
        self.uploads = MemoryTransport()
        self.settings = settings_for_tests(**({"state_directory": directory} | overrides))
        parts = Parts(
            make_transport=self._make_transport,
            make_engine=self._make_engine,
            make_blob_transport=lambda: self.uploads,
            board=self.board,
            clock=lambda: self.now,
            wall_clock=lambda: self.now,
            notifier=notifier or Notifier(""),
            check_configuration=check_configuration,
        )
        self.daemon = Daemon(self.settings, small_manifest(encoders), parts)
        self.base = self.daemon.node.topics.base

    def _make_transport(self, make_will: MakeWill) -> Transport:
        self.transport = MemoryTransport(make_will)
        return self.transport

    def _make_engine(self, on_event: Any) -> FakeEngine:
        engine = FakeEngine(on_event)
        self.engines.append(engine)
        return engine

    @property
    def engine(self) -> FakeEngine:
        return self.engines[-1]

    def settle(self) -> None:
        """Let the daemon handle all events that wait."""
        self.daemon.tick()
        while not self.daemon.events.empty():
            self.daemon.step(0)

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.settle()

    def start(self) -> Node:
        """Start, connect, and let the engine be ready."""
        self.daemon.startup()
        self.transport.connect(session_present=False)
        self.uploads.connect(session_present=False)
        self.engine.ready()
        self.settle()
        return self

    def ask(self, qos: int = 1, dup: bool = False, reply: str | None = REPLY, **fields: Any) -> int:
        """Deliver a request (a greeting, if no messages are given) and return its mid."""
        greeting = [{"role": "user", "content": "hello"}]
        fields = {"messages": greeting, "stream": True} | fields
        received = self.transport.deliver(
            f"{self.base}/request/generate", fields, qos=qos, dup=dup, response_topic=reply
        )
        self.settle()
        return received.mid

    def ask_about(self, *parts: dict[str, Any], **fields: Any) -> int:
        """Deliver a request of one turn with these parts, under the id `a`; return its mid."""
        return self.ask(
            **{"id": "a", "messages": [{"role": "user", "content": list(parts)}]} | fields
        )

    def stored_media(self) -> list[Path]:
        """Return the files of media that lie on the disk."""
        return sorted(file for file in self.settings.media_path.glob("*") if file.is_file())

    def control(
        self, verb: str, reply: str = "clients/me/control", **fields: Any
    ) -> dict[str, Any]:
        """Send a control request and return the reply."""
        self.transport.deliver(f"{self.base}/request/{verb}", fields, response_topic=reply)
        self.settle()
        return self.transport.events(reply)[-1]

    def events(self, topic: str = REPLY) -> list[dict[str, Any]]:
        return self.transport.events(topic)

    def kinds(self, topic: str = REPLY) -> list[str]:
        return [event["event"] for event in self.events(topic)]

    def last(self, topic: str = REPLY) -> dict[str, Any]:
        return self.events(topic)[-1]

    def state(self) -> dict[str, Any]:
        return self.last(f"{self.base}/state")


def until(node: Node, wanted: Callable[[], object]) -> None:
    """Let the daemon handle events, which come from another thread, until `wanted`."""
    deadline = time.monotonic() + PATIENCE
    while not wanted():
        assert time.monotonic() < deadline, node.events()
        node.daemon.step(0.05)
