"""Availability: birth, last will, and what to do when another says it (docs/mqtt.md, rule 8).

All three carry the process's `boot` id and the number of the connection. A node that hears its own
`offline` while it lives says `online` again. A node that hears another process say `online` in its
name has a rival; Mosquitto 2.0 does not tell the loser why it was disconnected (0x8E), so this is
how two daemons with one name are kept from throwing each other out for ever: who hears its rival
three times in a row leaves, which is the one that was there first.
"""

from __future__ import annotations

import json
import logging

from nestd.daemon.mqtt.node_contract import Availability
from nestd.daemon.mqtt.packets import Message, Received, Transport
from nestd.daemon.mqtt.parse import JSON_TYPE

log = logging.getLogger(__name__)

# A broker that comes back with old data shows an earlier process once; a rival insists.
RIVAL_LIMIT = 3
RIVAL_MEMORY_SECONDS = 300.0


class Presence:
    """Says that this process is there, and hears who else says so."""

    def __init__(self, topic: str, boot: str) -> None:
        self._topic = topic
        self._boot = boot
        self._connection = 0
        self._connects = 0
        self._rival_heard = 0
        self._last_rival = float("-inf")

    def will(self, connection: int) -> Message:
        """Return the last will of a connection that is about to be made."""
        return self._message("offline", connection)

    def connected(self, transport: Transport, connection: int) -> None:
        """Publish the birth message of a new connection."""
        self._connection = connection
        self._connects += 1
        self.say(transport, "online")

    def say(self, transport: Transport, state: str) -> int | None:
        """Publish the availability, and return the message's mid."""
        return transport.publish(self._message(state, self._connection))

    def hear(self, transport: Transport, received: Received, now: float) -> str | None:
        """React to a message on our own availability topic; return why to leave, or None.

        A retained message is from before our birth: our own will, or a rival's birth.
        """
        state, boot = _read(received.payload)
        rival = state == "online" and boot != self._boot
        if rival and (self._connects > 1 or not received.retain):
            recent = now - self._last_rival <= RIVAL_MEMORY_SECONDS
            self._rival_heard = self._rival_heard + 1 if recent else 1
            self._last_rival = now
            log.warning("another process says it is this node (%d)", self._rival_heard)
            if self._rival_heard >= RIVAL_LIMIT:
                return (
                    f"another process answers on {self._topic}: give each node its own node name "
                    "and mqtt.client_id"
                )
        if not received.retain and (rival or state != "online"):
            log.info("something else was said about this node: saying online again")
            self.say(transport, "online")
        return None

    def _message(self, state: str, connection: int) -> Message:
        event = Availability.model_validate({"state": state, "boot": self._boot, "n": connection})
        payload = event.model_dump_json().encode()
        return Message(self._topic, payload, qos=1, retain=True, content_type=JSON_TYPE)


def _read(payload: bytes) -> tuple[object, object]:
    """Return state and boot of an availability message, None for what it does not have."""
    try:
        event = json.loads(payload)
    except ValueError:
        return None, None
    return (event.get("state"), event.get("boot")) if isinstance(event, dict) else (None, None)
