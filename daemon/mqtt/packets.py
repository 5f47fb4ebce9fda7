"""What passes between the daemon and an MQTT transport, in the words of the MQTT specification.

A transport (`transport.py` on paho, `memory.py` in memory) puts events of this file on the daemon's
queue and takes `Message`s. Nothing here knows paho, topics of nestd or JSON.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Message:
    """One PUBLISH to send. The properties are left out on an MQTT 3.1.1 connection."""

    topic: str
    payload: bytes
    qos: int = 1
    retain: bool = False
    content_type: str | None = None
    correlation_data: bytes | None = None
    message_expiry_interval: int | None = None
    response_topic: str | None = None
    user_properties: tuple[tuple[str, str], ...] = ()

    def size(self) -> int:
        """Return an upper bound of the packet's bytes, for the broker's Maximum Packet Size."""
        properties = sum(
            len(value.encode()) + 5
            for pair in ((self.content_type, self.response_topic), *self.user_properties)
            for value in pair
            if value is not None
        )
        correlation = len(self.correlation_data or b"")
        return len(self.topic.encode()) + len(self.payload) + properties + correlation + 32


@dataclass(frozen=True, slots=True)
class Received:
    """One PUBLISH that came in; `mid` and `connection` together name it for its PUBACK."""

    topic: str
    payload: bytes
    qos: int = 0
    retain: bool = False
    dup: bool = False
    mid: int = 0
    connection: int = 0
    content_type: str | None = None
    correlation_data: bytes | None = None
    message_expiry_interval: int | None = None
    response_topic: str | None = None
    user_properties: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Connected:
    """The broker accepted connection number `connection` (1, 2, ... since the start)."""

    connection: int
    session_present: bool
    maximum_packet_size: int | None = None


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The connection is gone, or could not be made; the transport tries again by itself."""

    reason: str


@dataclass(frozen=True, slots=True)
class GaveUp:
    """The transport has ended and will not connect again; `reason` says what to do."""

    reason: str


@dataclass(frozen=True, slots=True)
class Published:
    """The broker acknowledged the message with this `mid`, or refused it for good (`refusal`)."""

    mid: int
    refusal: str | None = None


@dataclass(frozen=True, slots=True)
class Subscribed:
    """The broker answers a SUBSCRIBE: why it refuses each filter, in their order, or None.

    A broker may also grant a filter and then send nothing: Mosquitto does so with an ACL file.
    """

    refusals: tuple[str | None, ...]


TransportEvent = Received | Connected | Disconnected | GaveUp | Published | Subscribed


@dataclass(frozen=True, slots=True)
class Subscription:
    """One topic filter."""

    topic_filter: str
    qos: int


@dataclass(frozen=True, slots=True)
class TransportOptions:
    """How to reach the broker.

    Attributes:
        receive_maximum: requests that the broker may have open with us at once (MQTT 5).
        maximum_packet_size: what the broker may send us at most (MQTT 5).
        max_outgoing: messages of QoS 1, and as many of QoS 0, that may wait to be sent.
        retry_seconds: shortest and longest pause between two attempts to connect.
    """

    host: str
    port: int = 1883
    client_id: str = ""
    protocol: str = "5"
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    tls: bool = False
    ca_file: str | None = None
    certificate_file: str | None = None
    key_file: str | None = None
    clean_start: bool = False
    session_expiry_interval: int = 0
    receive_maximum: int = 20
    maximum_packet_size: int | None = None
    keepalive: int = 30
    max_outgoing: int = 1000
    retry_seconds: tuple[float, float] = (0.5, 60.0)


class Transport(Protocol):
    """One MQTT connection that lasts: it connects, stays connected and reports what happens."""

    def start(self, emit: Callable[[TransportEvent], None]) -> None:
        """Begin to connect; `emit` is called from another thread for every event."""

    def subscribe(self, subscriptions: list[Subscription]) -> None:
        """Send a SUBSCRIBE."""

    def unsubscribe(self, topic_filters: list[str]) -> None:
        """Send an UNSUBSCRIBE."""

    def publish(self, message: Message) -> int | None:
        """Send `message` and return its mid, or None if it was not taken (no connection, full)."""

    def acknowledge(self, received: Received) -> bool:
        """Send the PUBACK of `received`; False if it came over an older connection."""

    def stop(self, timeout: float) -> None:
        """Disconnect cleanly, within `timeout` seconds."""


# The will is asked for anew before each connection, because it carries the connection's number.
MakeWill = Callable[[int], Message]
