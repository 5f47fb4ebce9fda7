"""A client that keeps the client's side of the contract and writes down everything it gets.

It sends each request with QoS 1, keeps its session over a lost connection, and asks again under the
same id whenever it or the node has connected anew (docs/mqtt.md, What you can rely on);
`repeats=False` leaves that out, to see what is lost without.
"""

from __future__ import annotations

import json
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from nestd.daemon.mqtt.packets import Connected, Message, Received, Subscription, TransportOptions
from nestd.daemon.mqtt.transport import PahoTransport

PATIENCE = 120.0


@dataclass
class Asked:
    """One request and the final events that came for it."""

    fields: dict[str, Any]
    sent: float
    finals: list[dict[str, Any]] = field(default_factory=list)
    first_after: float | None = None


class Witness:
    """See the module."""

    def __init__(
        self, port: int, node: str = "node", name: str = "w", repeats: bool = True
    ) -> None:
        self.asked: dict[str, Asked] = {}
        self.connections = 0
        self.births = 0
        self.sessions_lost = 0
        self.availability: list[tuple[float, str]] = []
        self._birth: tuple[str, int] | None = None
        self.state: dict[str, Any] = {}
        self.health: dict[str, Any] = {}
        self.control: dict[Any, dict[str, Any]] = {}
        self._node = node
        self._topic = f"nestd/v1/{node}"
        self._repeats = repeats
        self._reply = f"clients/{name}/replies"
        self._changed = threading.Condition(threading.RLock())
        options = TransportOptions(
            host="127.0.0.1",
            port=port,
            client_id=name,
            session_expiry_interval=3600,
            receive_maximum=1000,
            max_outgoing=20_000,
            retry_seconds=(0.1, 0.3),
        )
        self._transport = PahoTransport(options)
        self._transport.start(self._take)
        self.wait(lambda: self.connections > 0, "the witness does not connect")

    # What the client does

    def ask(self, request_id: str, **fields: Any) -> None:
        document = {"id": request_id, "temperature": 0, "expires_in": 600} | fields
        with self._changed:
            self.asked[request_id] = Asked(document, time.monotonic())
        self._send(document)

    def ask_raw(self, payload: bytes, request_id: str) -> None:
        """Send bytes that may be no request; correlation data say which answer is theirs."""
        with self._changed:
            self.asked[request_id] = Asked({}, time.monotonic())
        data = request_id.encode()
        self.publish("request/generate", payload, response_topic=self._reply, correlation_data=data)

    def say(self, text: str, request_id: str, **fields: Any) -> None:
        self.ask(request_id, messages=[{"role": "user", "content": text}], **fields)

    def publish(self, topic: str, payload: bytes, **properties: Any) -> None:
        deadline = time.monotonic() + PATIENCE
        message = Message(f"{self._topic}/{topic}", payload, **properties)
        while self._transport.publish(message) is None:
            if time.monotonic() > deadline:
                raise TimeoutError("the broker takes no message")
            time.sleep(0.01)

    def command(self, verb: str, fields: dict[str, Any], transaction: Any) -> dict[str, Any]:
        """Send a control request and return its reply."""
        document = fields | {"transaction": transaction, "reply_to": self._reply}
        self.publish(f"request/{verb}", json.dumps(document).encode(), qos=0)
        self.wait(lambda: transaction in self.control, f"no reply to {verb}")
        return self.control[transaction]

    # What it waits for

    def wait(self, condition: Any, what: str, seconds: float = PATIENCE) -> None:
        with self._changed:
            if not self._changed.wait_for(condition, seconds):
                raise TimeoutError(what)

    def wait_online(self) -> None:
        self.wait(lambda: self.availability and self.availability[-1][1] == "online", "offline")

    def wait_outstanding(self, most: int, seconds: float = PATIENCE) -> None:
        """Wait until at most `most` requests have no answer."""
        self.wait(lambda: self.outstanding <= most, "requests stay without an answer", seconds)

    @property
    def outstanding(self) -> int:
        return sum(1 for item in list(self.asked.values()) if not item.finals)

    # What it has seen

    def verdict(self) -> dict[str, int]:
        """Count requests by what came of them.

        `contradictory` are those whose final events differ: two answers. The same event more than
        once is QoS 1's right, and what asking again under the same id brings.
        """
        counts: dict[str, int] = defaultdict(int)
        for item in self.asked.values():
            different = {json.dumps(event, sort_keys=True) for event in item.finals}
            counts["asked"] += 1
            counts["lost"] += not item.finals
            counts["contradictory"] += len(different) > 1
            counts["delivered_more_than_once"] += len(item.finals) > 1
            if item.finals:
                event = item.finals[0]
                counts[event["event"] if event["event"] == "done" else event["code"]] += 1
                counts["second_attempts"] += event["attempt"] > 1
        return {"lost": 0, "contradictory": 0, "delivered_more_than_once": 0} | dict(counts)

    def close(self) -> None:
        self._transport.stop(2)

    def _send(self, document: dict[str, Any]) -> None:
        self.publish("request/generate", json.dumps(document).encode(), response_topic=self._reply)

    def _take(self, event: object) -> None:
        with self._changed:
            if isinstance(event, Connected):
                self._connected(event)
            elif isinstance(event, Received):
                self._received(event)
            self._changed.notify_all()

    def _connected(self, event: Connected) -> None:
        self.connections += 1
        if self.connections > 1 and not event.session_present:
            self.sessions_lost += 1
        facts = (f"{self._topic}/{name}" for name in ("availability", "health", "state"))
        topics = [self._reply, *facts]
        self._transport.subscribe([Subscription(topic, 1) for topic in topics])
        if self.connections > 1:
            self._ask_again()

    def _ask_again(self) -> None:
        for item in list(self.asked.values()):
            if self._repeats and not item.finals:
                message = Message(
                    f"{self._topic}/request/generate",
                    json.dumps(item.fields).encode(),
                    response_topic=self._reply,
                )
                self._transport.publish(message)

    def _received(self, event: Received) -> None:
        document = json.loads(event.payload)
        if event.topic.endswith("/availability"):
            self.availability.append((time.monotonic(), document["state"]))
            birth = (document["boot"], document["n"])
            if document["state"] == "online" and birth != self._birth:
                self._ask_again()
                self._birth = birth
                self.births += 1
        elif event.topic.endswith("/state"):
            self.state = document
        elif event.topic.endswith("/health"):
            self.health = document
        elif "event" not in document:
            self.control[document["transaction"]] = document
        elif document["event"] in ("done", "error"):
            named = (event.correlation_data or b"").decode() or document["id"]
            item = self.asked[named]
            if item.first_after is None:
                item.first_after = time.monotonic() - item.sent
            item.finals.append(document)
        self._transport.acknowledge(event)
