"""Watch nodes live: memory, heat, power, sub-model and why, queue, speed.

Exit status: 0 ended by Ctrl-C or after --once, 1 no node was seen, 2 no broker.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from nestd.cli.arguments import add_broker, add_config, client_transport
from nestd.cli.main import Subparsers

if TYPE_CHECKING:
    from nestd.cli.frame import NodeView
    from nestd.daemon.mqtt.packets import Received, Transport, TransportEvent

REFRESH_SECONDS = 1.0
# How long --once waits for nodes that are online to tell everything.
ONCE_SECONDS = 3.0
GATHERING_SECONDS = 0.5
TOPICS = ("availability", "state", "info", "health")


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    """Add `nestd watch`."""
    summary = "Watch nodes live: memory, heat, power, sub-model and why, queue, speed."
    parser = subparsers.add_parser("watch", help=summary, description=__doc__)
    parser.add_argument("nodes", nargs="*", metavar="NODE", help="default: all on the broker")
    parser.add_argument(
        "--once", action="store_true", help="print one frame and end, as without a terminal"
    )
    add_broker(parser)
    add_config(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Watch until Ctrl-C."""
    settings, address, transport = client_transport(args)
    watcher = Watcher(transport, address, settings.mqtt.prefix, frozenset(args.nodes))
    try:
        watcher.connect()
        if args.once or not sys.stdout.isatty():
            return print_once(watcher)
        with screen():
            while True:
                watcher.ask_health()
                watcher.listen(time.monotonic() + REFRESH_SECONDS)
                redraw(watcher)
    except KeyboardInterrupt:
        return 0
    finally:
        transport.stop(2.0)


class Watcher:
    """Collects what nodes say about themselves.

    Attributes:
        trouble: why there is no connection, or None.
    """

    def __init__(
        self, transport: Transport, address: str, prefix: str, only: frozenset[str]
    ) -> None:
        from nestd.daemon.mqtt.topics import CLIENTS

        self._transport = transport
        self._prefix = prefix
        self._only = only
        self._reply_topic = f"{CLIENTS}/{address}/replies"
        self._events: SimpleQueue[TransportEvent] = SimpleQueue()
        self._nodes: dict[str, NodeView] = {}
        self._heard: dict[str, float] = {}
        self.trouble: str | None = None

    def connect(self) -> None:
        """Connect and subscribe.

        Raises:
            BrokerError: there is no broker.
        """
        from nestd.bundle.errors import BrokerError
        from nestd.client.connection import CONNECT_SECONDS

        self.trouble = "no answer"
        self._transport.start(self._events.put)
        self.listen(time.monotonic() + CONNECT_SECONDS, lambda: self.trouble is None)
        if self.trouble is not None:
            raise BrokerError(f"no MQTT broker: {self.trouble}")

    def ask_health(self) -> None:
        """Ask every node that is online for its figures; the answers come in with `listen`."""
        from nestd.daemon.mqtt.packets import Message
        from nestd.daemon.mqtt.parse import JSON_TYPE
        from nestd.daemon.mqtt.topics import Topics

        for node in self.nodes():
            if node.online:
                # The transaction comes back: it says which node the figures are of.
                fields = {"transaction": node.name, "reply_to": self._reply_topic}
                self._transport.publish(
                    Message(
                        Topics(self._prefix, node.name).request("health"),
                        json.dumps(fields).encode(),
                        qos=0,
                        content_type=JSON_TYPE,
                        response_topic=self._reply_topic,
                    )
                )

    def listen(self, until: float, enough: Callable[[], bool] = lambda: False) -> None:
        """Take in what comes until then, or until it is `enough`.

        Raises:
            BrokerError: the broker refuses us for good.
        """
        from nestd.bundle.errors import BrokerError
        from nestd.daemon.mqtt.packets import Connected, Disconnected, GaveUp, Received

        while not enough() and (remaining := until - time.monotonic()) > 0:
            try:
                event = self._events.get(timeout=remaining)
            except Empty:
                return
            if isinstance(event, Received):
                self._take(event)
            elif isinstance(event, Connected):
                self.trouble = None
                self._subscribe()
            elif isinstance(event, Disconnected):
                self.trouble = event.reason
            elif isinstance(event, GaveUp):
                raise BrokerError(event.reason)

    def nodes(self) -> list[NodeView]:
        """Return all nodes by name, with the time since each was heard."""
        now = time.monotonic()
        for name, node in self._nodes.items():
            node.silent_s = now - self._heard[name]
        return [node for _, node in sorted(self._nodes.items())]

    def told_all(self) -> bool:
        """Say whether every node that is online has said everything."""
        online = [node for node in self._nodes.values() if node.online]
        return bool(online) and all(node.state and node.info and node.health for node in online)

    def _subscribe(self) -> None:
        from nestd.daemon.mqtt.packets import Subscription
        from nestd.daemon.mqtt.topics import VERSION

        self._transport.subscribe(
            [
                *(Subscription(f"{self._prefix}/{VERSION}/+/{topic}", 0) for topic in TOPICS),
                Subscription(self._reply_topic, 0),
            ]
        )

    def _take(self, received: Received) -> None:
        from nestd.cli.frame import NodeView
        from nestd.client.connection import json_object

        document = json_object(received.payload)
        if received.topic == self._reply_topic:
            name, topic = str(document.get("transaction")), "health"
            data = document.get("data")
            if name not in self._nodes or not isinstance(data, dict):
                return
            document = data
        else:
            *_, name, topic = received.topic.split("/")
            if self._only and name not in self._only:
                return
        node = self._nodes.setdefault(name, NodeView(name))
        self._heard[name] = time.monotonic()
        if topic == "availability":
            node.availability = str(document.get("state"))
        else:
            setattr(node, topic, document)


def print_once(watcher: Watcher) -> int:
    """Print one frame."""
    watcher.listen(time.monotonic() + GATHERING_SECONDS)
    watcher.ask_health()
    watcher.listen(time.monotonic() + ONCE_SECONDS, watcher.told_all)
    if not watcher.nodes():
        print("nestd: no node has been seen on this broker", file=sys.stderr)
        return 1
    print("\n".join(draw(watcher, sys.stdout.isatty(), height=10_000)))
    return 0


def draw(watcher: Watcher, color: bool, height: int | None = None) -> list[str]:
    """Return the lines of a frame that fits the terminal."""
    from nestd.cli.frame import DIM, RED, frame, paint

    size = shutil.get_terminal_size((100, 24))
    foot = paint([("Ctrl-C ends", DIM)], size.columns, color)
    if watcher.trouble is not None:
        foot = paint([(f"no connection: {watcher.trouble}", RED)], size.columns, color)
    elif not watcher.nodes():
        foot = paint([("no node has been seen on this broker yet", DIM)], size.columns, color)
    lines = frame(watcher.nodes(), size.columns, height or size.lines - 2, color)
    return lines if height else [*lines, "", foot]


def redraw(watcher: Watcher) -> None:
    """Draw over the last frame without flicker: clear the rest of each line, then below."""
    lines = draw(watcher, color=True)
    sys.stdout.write("\x1b[H" + "\x1b[K\r\n".join(lines) + "\x1b[K\x1b[J")
    sys.stdout.flush()


@contextmanager
def screen() -> Iterator[None]:
    """Use the terminal's other screen, without a cursor, and leave the first as it was."""
    sys.stdout.write("\x1b[?1049h\x1b[?25l\x1b[2J")
    try:
        yield
    finally:
        sys.stdout.write("\x1b[?25h\x1b[?1049l")
        sys.stdout.flush()
