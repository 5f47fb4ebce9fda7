"""MQTT clients and daemon processes for tests on real Mosquitto."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, Queue
from typing import Any

from nestd.daemon.mqtt.packets import Connected, Message, Received, Subscription, TransportOptions
from nestd.daemon.mqtt.transport import PahoTransport
from support.mosquitto import Mosquitto

PATIENCE = 30.0
ECHO_DAEMON = Path(__file__).with_name("echo_daemon.py")


def nestd(*arguments: str) -> list[str]:
    """Return the command line of the installed `nestd`."""
    return [str(Path(sys.executable).with_name("nestd")), *arguments]


class Listener:
    """A raw MQTT client that queues what it receives."""

    def __init__(self, broker: Mosquitto, *filters: str, protocol: str = "5") -> None:
        self.received: Queue[Received] = Queue()
        self._connected = threading.Event()
        self._filters = [Subscription(topic_filter, 1) for topic_filter in filters]
        self._transport = PahoTransport(
            TransportOptions(
                host="127.0.0.1",
                port=broker.port,
                client_id=f"listener-{id(self)}",
                protocol=protocol,
                clean_start=True,
                retry_seconds=(0.1, 0.2),
            )
        )
        self._transport.start(self._on_event)
        assert self._connected.wait(PATIENCE)

    def _on_event(self, event: object) -> None:
        if isinstance(event, Connected):
            self._transport.subscribe(self._filters)
            self._connected.set()
        elif isinstance(event, Received):
            self._transport.acknowledge(event)
            self.received.put(event)

    def publish(self, topic: str, payload: Any, **properties: Any) -> None:
        data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        assert self._transport.publish(Message(topic, data, **properties)) is not None

    def until(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Return the first JSON object received from now on that is `wanted`."""
        while True:
            document: dict[str, Any] = json.loads(self.received.get(timeout=PATIENCE).payload)
            if wanted(document):
                return document

    def until_event(self, kind: str) -> dict[str, Any]:
        return self.until(lambda document: document.get("event") == kind)

    def nothing_more(self, seconds: float) -> bool:
        try:
            self.received.get(timeout=seconds)
        except Empty:
            return True
        return False

    def close(self) -> None:
        self._transport.stop(2)


@contextmanager
def listening(broker: Mosquitto, *filters: str, protocol: str = "5") -> Iterator[Listener]:
    listener = Listener(broker, *filters, protocol=protocol)
    try:
        yield listener
    finally:
        listener.close()


def _command(broker: Mosquitto, node: str, *settings: str) -> list[str]:
    state = f"state_directory={broker.config.with_name(f'{node}-state')}"
    return [sys.executable, str(ECHO_DAEMON), str(broker.port), node, state, *settings]


@contextmanager
def daemon(
    broker: Mosquitto, node: str = "node", *settings: str
) -> Iterator[subprocess.Popen[bytes]]:
    """A daemon process that is ready."""
    command = _command(broker, node, *settings)
    with listening(broker, f"nestd/v1/{node}/state") as states:
        log = broker.config.with_name(f"{node}.log").open("ab")
        with log, subprocess.Popen(command, stdout=log, stderr=log) as process:
            try:
                states.until(lambda state: state["phase"] == "ready")
                yield process
            finally:
                if process.poll() is None:
                    process.kill()


@contextmanager
def echo_daemon(
    broker: Mosquitto, node: str = "node", *settings: str
) -> Iterator[subprocess.Popen[str]]:
    """A daemon process that has just been started; its log is `stderr`. It is killed in the end."""
    command = _command(broker, node, *settings)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for_line(process: subprocess.Popen[str], words: str) -> None:
    """Read the process's log up to a line with these words."""
    assert process.stderr is not None
    assert any(words in line for line in process.stderr), f"{words!r} is not in the log"


@contextmanager
def running_node(
    directory: Path, config: str, command: Sequence[str] = ()
) -> Iterator[subprocess.Popen[bytes]]:
    """`nestd run` with this configuration; its log is nestd.log in `directory`.

    `command` takes the place of the installed `nestd`.
    """
    path = directory / "nestd.yaml"
    path.write_text(config)
    run = [*(command or nestd()), "run", "--config", str(path)]
    with (
        (directory / "nestd.log").open("wb") as log,
        subprocess.Popen(run, stdout=log, stderr=log) as process,
    ):
        try:
            yield process
        finally:
            process.terminate()
            process.wait(15)
