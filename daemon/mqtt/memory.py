"""An MQTT transport in memory: the daemon on one side, a test or an embedding program on the other.

It behaves as one connection to a broker that keeps its session: what had no PUBACK is delivered
again (`dup`) by the next `connect()`, and what the broker had not acknowledged is sent again.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from nestd.daemon.mqtt.packets import (
    Connected,
    Disconnected,
    GaveUp,
    MakeWill,
    Message,
    Published,
    Received,
    Subscription,
    TransportEvent,
)
from nestd.daemon.mqtt.topics import SHARE, matches


class MemoryTransport:
    """See `nestd.daemon.mqtt.packets.Transport`; the methods after `stop` are the broker's side.

    Attributes:
        published: every message that was taken, in order.
        acknowledged: mids of the PUBACKs, in order.
        confirming: the broker acknowledges messages at once; else `confirm()` does.
        accepting: messages are taken; False stands for a full outgoing queue.
    """

    def __init__(self, make_will: MakeWill | None = None) -> None:
        self._make_will = make_will
        self._emit: Callable[[TransportEvent], None] = lambda _event: None
        self._connection = 0
        self._online = False
        self._last_mid = 0
        self._last_incoming = 0
        self._open: dict[int, Received] = {}
        self.unconfirmed: dict[int, Message] = {}
        self.subscriptions: list[Subscription] = []
        self.published: list[Message] = []
        self.acknowledged: list[int] = []
        self.will: Message | None = None
        self.confirming = True
        self.accepting = True
        self.stopped = False

    def start(self, emit: Callable[[TransportEvent], None]) -> None:
        """Take `emit`; nothing connects before `connect()`."""
        self._emit = emit

    def subscribe(self, subscriptions: list[Subscription]) -> None:
        """Remember the filters; `deliver` keeps to them."""
        self.subscriptions = list(subscriptions)

    def unsubscribe(self, topic_filters: list[str]) -> None:
        """Forget filters."""
        self.subscriptions = [s for s in self.subscriptions if s.topic_filter not in topic_filters]

    def publish(self, message: Message) -> int | None:
        """Take `message` and return its mid, or None if offline or full."""
        if not self._online or not self.accepting:
            return None
        self._last_mid += 1
        self.published.append(message)
        if message.qos > 0:
            self.unconfirmed[self._last_mid] = message
            if self.confirming:
                self.confirm(self._last_mid)
        return self._last_mid

    def acknowledge(self, received: Received) -> bool:
        """Take a PUBACK; False if it belongs to an older connection."""
        if received.connection != self._connection or not self._online:
            return False
        if received.qos > 0:
            del self._open[received.mid]
            self.acknowledged.append(received.mid)
        return True

    def stop(self, timeout: float) -> None:
        """Disconnect."""
        del timeout
        self._online = False
        self.stopped = True

    def connect(
        self, *, session_present: bool = True, maximum_packet_size: int | None = None
    ) -> None:
        """Accept the node's connection and go on with its session, or with a new one."""
        self._connection += 1
        self._online = True
        if self._make_will is not None:
            self.will = self._make_will(self._connection)
        self._emit(Connected(self._connection, session_present, maximum_packet_size))
        if not session_present:
            self._open.clear()
        for mid, received in list(self._open.items()):
            self._open[mid] = replace(received, dup=True, connection=self._connection)
            self._emit(self._open[mid])
        if self.confirming:
            for mid in list(self.unconfirmed):
                self.confirm(mid)

    def disconnect(self, reason: str = "the connection was lost") -> None:
        """Break the connection."""
        self._online = False
        self._emit(Disconnected(reason))

    def give_up(self, reason: str) -> None:
        """End for good, as after a session taken over."""
        self.disconnect(reason)
        self._emit(GaveUp(reason))

    def confirm(self, mid: int | None = None) -> None:
        """Acknowledge one message of the node, or all."""
        for number in list(self.unconfirmed) if mid is None else [mid]:
            del self.unconfirmed[number]
            self._emit(Published(number))

    def deliver(self, topic: str, payload: Any, qos: int = 1, **properties: Any) -> Received:  # noqa: ANN401  (JSON)
        """Deliver a message to the node, if it has subscribed to the topic.

        Raises:
            LookupError: it has not.
        """
        granted = [s.qos for s in self.subscriptions if matches(_plain(s.topic_filter), topic)]
        if not granted:
            raise LookupError(f"no subscription matches {topic}")
        data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        qos = min(qos, max(granted))
        mid = 0
        if qos > 0:
            self._last_incoming += 1
            mid = self._last_incoming
        received = Received(
            topic, data, qos=qos, mid=mid, connection=self._connection, **properties
        )
        if qos > 0:
            self._open[mid] = received
        self._emit(received)
        return received

    def events(self, topic: str) -> list[dict[str, Any]]:
        """Return the JSON objects that the node has published on `topic`."""
        return [json.loads(m.payload) for m in self.published if m.topic == topic]


def _plain(topic_filter: str) -> str:
    """Return the filter of a shared subscription without its group."""
    return topic_filter.split("/", 2)[2] if topic_filter.startswith(f"{SHARE}/") else topic_filter
