"""A client of nestd: finds a node, sends a request, yields its events, uploads blobs, controls it.

It repeats the request under the same id whenever it or the node had to connect again; the node
answers an id once (docs/mqtt.md, What you can rely on), so nothing is lost or run twice.
"""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

from nestd.bundle.errors import BrokerError, request_error
from nestd.daemon.mqtt.packets import (
    Connected,
    Disconnected,
    GaveUp,
    Message,
    Received,
    Subscription,
    Transport,
    TransportEvent,
)
from nestd.daemon.mqtt.parse import JSON_TYPE
from nestd.daemon.mqtt.topics import CLIENTS, VERSION, Topics, Verb, pool_request

CONNECT_SECONDS = 10.0
# Retained availability comes with the SUBACK; on a slow link it takes a moment.
DISCOVERY_SECONDS = 2.0
GATHERING_SECONDS = 0.3
CONTROL_SECONDS = 10.0
# Large enough to be quick, small enough to be sent again without regret.
CHUNK_BYTES = 256 * 1024
UPLOAD_ROUNDS = 5

Event = dict[str, Any]


def new_client_id() -> str:
    """Return a client id that nobody else has."""
    return f"nestd-client-{uuid.uuid4().hex[:12]}"


@dataclass(frozen=True, slots=True)
class Due:
    """Something that `Client.ask` publishes after `seconds`."""

    seconds: float
    verb: Verb
    fields: dict[str, Any]


class Client:
    """One connection to a broker, used by one thread.

    Attributes:
        pool: the pool that requests go to, if not to one node.
        maximum_packet_size: what the broker takes at most, None where it does not say.
    """

    def __init__(self, transport: Transport, address: str, prefix: str) -> None:
        """Answers come to `address`, see `nestd.daemon.mqtt.topics.answers_to`."""
        self._transport = transport
        self._prefix = prefix
        self._reply_topic = f"{CLIENTS}/{address}/replies"
        self._events: SimpleQueue[TransportEvent] = SimpleQueue()
        # By node; a node that comes back has another birth, its `boot` and `n`.
        self._availability: dict[str, str] = {}
        self._births: dict[str, tuple[object, object]] = {}
        self._topics: Topics | None = None
        self.pool: str | None = None
        self.maximum_packet_size: int | None = None

    def connect(self, node: str | None, fallback: str, patience: float = DISCOVERY_SECONDS) -> str:
        """Connect and return the node that answers: `node`, or `fallback`, or the only one.

        `patience` is how many seconds a node that is not online is waited for.

        Raises:
            BrokerError: no broker, or no such node is online.
        """
        self._open()
        name = self._discover(node, fallback, patience)
        self._topics = Topics(self._prefix, name)
        return name

    def connect_to_pool(self, pool: str) -> None:
        """Connect, to ask whichever node of `pool` the broker chooses.

        Raises:
            BrokerError: no broker.
        """
        self._open()
        self.pool = pool

    def _open(self) -> None:
        self._transport.start(self._events.put)
        deadline = time.monotonic() + CONNECT_SECONDS
        reason = "no answer"
        while not isinstance(event := self._next(deadline), Connected):
            if isinstance(event, Disconnected | GaveUp):
                reason = event.reason
            if event is None or isinstance(event, GaveUp):
                raise BrokerError(f"no MQTT broker: {reason}")
        self._subscribe()

    def ask(
        self, fields: dict[str, Any], timeout: float, later: tuple[Due, ...] = ()
    ) -> Iterator[Event]:
        """Send a request and yield its events, `done` or `error` last.

        Raises:
            BrokerError: neither came within `timeout` seconds, or the broker threw us out.
        """
        fields = {"id": uuid.uuid4().hex} | fields
        started = time.monotonic()
        deadline = started + timeout
        waiting = sorted(later, key=lambda due: due.seconds)
        self.send("generate", fields)
        while True:
            until = min([deadline, *(started + due.seconds for due in waiting[:1])])
            event = self._next(until)
            while waiting and time.monotonic() >= started + waiting[0].seconds:
                due = waiting.pop(0)
                self.send(due.verb, {"id": fields["id"]} | due.fields)
            if event is None and time.monotonic() >= deadline:
                raise BrokerError(f"no answer came within {timeout:.0f} s: is the node alive?")
            if isinstance(event, GaveUp):
                raise BrokerError(event.reason)
            if isinstance(event, Connected):
                self._subscribe()
            if isinstance(event, Connected) or self._is_back(event):
                self.send("generate", fields)
            answer = self._answer(event)
            if answer is None or answer.get("id") not in (fields["id"], None):
                continue
            if "event" in answer:
                yield answer
                if answer["event"] in ("done", "error"):
                    return

    def control(self, verb: Verb, fields: dict[str, Any]) -> Event:
        """Send a control request and return the reply.

        Raises:
            BrokerError: none came.
        """
        return self._exchange(self._node.request(verb), fields, CONTROL_SECONDS)

    def info(self) -> Event:
        """Return what the node says about itself.

        Raises:
            BrokerError: it says nothing.
        """
        return self._retained(self._node.info)

    def state(self) -> Event:
        """Return what the node does now, and why.

        Raises:
            BrokerError: it says nothing.
        """
        return self._retained(self._node.state)

    def _retained(self, topic: str) -> Event:
        # Each new subscription brings the retained message once more; where the node has not
        # published any yet, its first comes live.
        self._transport.subscribe([Subscription(topic, 1)])
        deadline, live = time.monotonic() + CONTROL_SECONDS, None
        while (event := self._next(deadline)) is not None:
            if not isinstance(event, Received) or event.topic != topic:
                continue
            live = json_object(event.payload)
            if event.retain:
                return live
            deadline = min(deadline, time.monotonic() + GATHERING_SECONDS)
        if live is None:
            raise BrokerError(f"the node {self._node.node} does not publish {topic}")
        return live

    def upload(self, data: bytes, chunk_bytes: int, timeout: float) -> str:
        """Send `data` as a blob and return its id, once the node has all of it.

        Raises:
            BrokerError: no reply came within `timeout` seconds.
            RequestError: the node refuses the blob.
        """
        blob_id = uuid.uuid4().hex
        topic = f"{self._node.base}/blob/{blob_id}"
        stated = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        reply = self._exchange(f"{topic}/init", stated, CONTROL_SECONDS)
        for _ in range(UPLOAD_ROUNDS):
            missing = (reply["data"] or {}).get("missing")
            if not missing:
                break
            for start, end in missing:
                for offset in range(start, end, chunk_bytes):
                    chunk = data[offset : min(end, offset + chunk_bytes)]
                    # One that is not taken will be missing, and so be sent in the next round.
                    self._transport.publish(Message(f"{topic}/{offset}", chunk))
            reply = self._exchange(f"{topic}/fin", stated, timeout)
        if not reply["ok"]:
            raise request_error(reply["error"]["code"], reply["error"]["message"])
        return blob_id

    def close(self) -> None:
        """Disconnect."""
        self._transport.stop(2.0)

    def _discover(self, node: str | None, fallback: str, patience: float) -> str:
        deadline = time.monotonic() + patience
        wanted = node or fallback
        while self._availability.get(wanted) != "online" and (event := self._next(deadline)):
            if isinstance(event, Received):
                self._note_availability(event)
                if node is None:  # any node will do, and retained messages come in one go
                    deadline = min(deadline, time.monotonic() + GATHERING_SECONDS)
        online = sorted(n for n, state in self._availability.items() if state == "online")
        if wanted in online:
            return wanted
        if node is None and len(online) == 1:
            return online[0]
        those = f"online are {', '.join(online)}" if online else "no node is online"
        if node is None and online:
            raise BrokerError(f"several nodes answer, name one with --node: {those}")
        raise BrokerError(f"the node {wanted!r} is not online on this broker: {those}")

    def _note_availability(self, received: Received) -> bool:
        """Take note of a node's availability; True if the node has come back."""
        *_, node, last = received.topic.split("/")
        if last != "availability":
            return False
        event = json_object(received.payload)
        self._availability[node] = str(event.get("state"))
        if self._availability[node] != "online":
            return False
        birth = (event.get("boot"), event.get("n"))
        known, self._births[node] = self._births.get(node, birth), birth
        return known != birth

    def _is_back(self, event: TransportEvent | None) -> bool:
        """Say whether our node has connected anew.

        A broker that lost its data has dropped what came before that, our request perhaps too.
        """
        if not isinstance(event, Received) or self._topics is None:
            return False
        return self._note_availability(event) and event.topic == self._topics.availability

    def _subscribe(self) -> None:
        self._transport.subscribe(
            [
                Subscription(self._reply_topic, 1),
                Subscription(f"{self._prefix}/{VERSION}/+/availability", 1),
            ]
        )

    def send(self, verb: Verb, fields: dict[str, Any]) -> None:
        """Publish a request without waiting for its reply."""
        if self.pool is not None and verb == "generate":
            self._publish(pool_request(self._prefix, self.pool), fields)
        else:
            self._publish(self._node.request(verb), fields)

    @property
    def _node(self) -> Topics:
        assert self._topics is not None, "connect() comes first, and a pool is no node"
        return self._topics

    def _exchange(self, topic: str, fields: dict[str, Any], timeout: float) -> Event:
        """Send a control message or one about a blob, and return its reply."""
        transaction = uuid.uuid4().hex
        fields = {"transaction": transaction} | fields
        self._publish(topic, fields)
        deadline = time.monotonic() + timeout
        while (event := self._next(deadline)) is not None:
            if isinstance(event, GaveUp):
                raise BrokerError(event.reason)
            if isinstance(event, Connected):
                self._subscribe()
                self._publish(topic, fields)
            answer = self._answer(event)
            if answer is not None and answer.get("transaction") == transaction:
                return answer
        raise BrokerError(f"the node did not reply to {topic}")

    def _publish(self, topic: str, fields: dict[str, Any]) -> None:
        # `reply_to` serves MQTT 3.1.1 connections, which have no Response Topic.
        fields = fields | {"reply_to": self._reply_topic}
        self._transport.publish(
            Message(
                topic,
                json.dumps(fields).encode(),
                content_type=JSON_TYPE,
                response_topic=self._reply_topic,
            )
        )

    def _answer(self, event: TransportEvent | None) -> Event | None:
        if not isinstance(event, Received) or event.topic != self._reply_topic:
            return None
        return json_object(event.payload)

    def _next(self, deadline: float) -> TransportEvent | None:
        """Return the next event, acknowledged, or None at the deadline."""
        try:
            event = self._events.get(timeout=max(0.0, deadline - time.monotonic()))
        except Empty:
            return None
        if isinstance(event, Connected):
            self.maximum_packet_size = event.maximum_packet_size
        if isinstance(event, Received) and event.qos > 0:
            self._transport.acknowledge(event)
        return event


def json_object(payload: bytes) -> Event:
    """Return a JSON object, empty where the payload is none."""
    try:
        document = json.loads(payload)
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}
