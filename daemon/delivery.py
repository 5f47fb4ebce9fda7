"""When PUBACKs and final events go out (docs/mqtt.md, delivery rules 2, 5 and 9).

A request's PUBACK goes out only once the broker has acknowledged the request's `done` or `error`,
and in the order in which requests came in (MQTT 5, section 4.6). So whatever dies in between, the
broker still has the request or the answer. Final events that cannot be sent wait here for the next
connection; the transport never holds more of them than the broker has left unacknowledged.

This file knows neither JSON nor requests.
"""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass, field, replace

from nestd.daemon.mqtt.packets import Message, Received, Transport

log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class Entry:
    """One request message that came in, without its payload, which may be a large medium.

    It is `settled` once nothing stands against its PUBACK.
    """

    received: Received
    settled: bool = False


@dataclass(eq=False, slots=True)
class Final:
    """A `done` or `error` on its way, and the entries that it settles.

    Attributes:
        mid: set while the transport has the message.
        confirmed: the broker has acknowledged the message.
    """

    message: Message
    entries: list[Entry] = field(default_factory=list)
    mid: int | None = None
    confirmed: bool = False


class Delivery:
    """Holds back PUBACKs and final events until their time has come."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._order: deque[Entry] = deque()
        self._in_flight: dict[int, Final] = {}
        self._unsent: list[Final] = []

    @property
    def open_finals(self) -> int:
        """Final events that the broker has not acknowledged yet."""
        return len(self._in_flight) + len(self._unsent)

    @property
    def open_entries(self) -> int:
        """Request messages of this connection that have had no PUBACK yet."""
        return len(self._order)

    def is_open(self, entry: Entry) -> bool:
        """Say whether the broker still waits for the PUBACK of `entry`, and so has the request."""
        return entry in self._order

    def receive(self, received: Received) -> Entry:
        """Take note of a request message; of QoS 0 there is nothing to acknowledge."""
        entry = Entry(replace(received, payload=b""))
        if received.qos > 0:
            self._order.append(entry)
        return entry

    def send(self, final: Final) -> None:
        """Publish `final` now, or as soon as there is a connection."""
        final.mid = self._transport.publish(final.message)
        if final.mid is None:
            self._unsent.append(final)
        else:
            self._in_flight[final.mid] = final

    def replace(self, final: Final, message: Message) -> bool:
        """Send another message instead, if the transport has not taken the first yet."""
        if final.mid is not None:
            return False
        final.message = message
        return True

    def join(self, final: Final, entry: Entry) -> None:
        """Let `entry` be settled by a final event that exists already."""
        if final.confirmed:
            self.settle(entry)
        else:
            final.entries.append(entry)

    def settle(self, entry: Entry) -> None:
        """Nothing stands against the PUBACK of `entry` any more; send all whose turn it is."""
        entry.settled = True
        while self._order and self._order[0].settled:
            received = self._order.popleft().received
            if not self._transport.acknowledge(received):
                log.debug("PUBACK %d belongs to an older connection", received.mid)

    def connected(self, connection: int) -> None:
        """A new connection: older PUBACKs are void, and what waited can be sent.

        The broker delivers again what had no PUBACK. Messages that the transport had taken stay
        with it: it sends them again itself.
        """
        self._order = deque(e for e in self._order if e.received.connection == connection)
        self.send_waiting()

    def send_waiting(self) -> None:
        """Try again to send final events that the transport did not take."""
        waiting, self._unsent = self._unsent, []
        for final in waiting:
            self.send(final)

    def published(self, mid: int, refusal: str | None) -> None:
        """The broker has acknowledged the message `mid`, or has refused it for good."""
        final = self._in_flight.pop(mid, None)
        if final is None:
            return
        if refusal is not None:
            log.warning("the broker refuses an answer on %s: %s", final.message.topic, refusal)
        final.confirmed = True
        for entry in final.entries:
            self.settle(entry)
        final.entries.clear()
