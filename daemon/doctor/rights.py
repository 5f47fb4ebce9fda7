"""What the broker lets this node do: login, rights, packet size, last will.

Asked with the node's own login under the client id `<its client id>-doctor`, so that a daemon that
runs is not thrown out. What is published harms nobody: a request for health figures, messages on
topics that end in `doctor`, and, only while no node of this name is online, its `offline`.

Mosquitto grants every subscription and then sends nothing where its ACL file forbids it, so reading
is tried with a message of our own.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from queue import Empty, SimpleQueue

from nestd.daemon.doctor.finding import Finding, failed, ok, skipped, warning
from nestd.daemon.doctor.reach import is_here
from nestd.daemon.home_assistant import device_id
from nestd.daemon.mqtt.connect import node_options
from nestd.daemon.mqtt.packets import (
    Connected,
    Disconnected,
    GaveUp,
    MakeWill,
    Message,
    Published,
    Received,
    Subscribed,
    Subscription,
    TransportEvent,
)
from nestd.daemon.mqtt.topics import CLIENTS, CONTROL_VERBS, Topics, pool_request
from nestd.daemon.mqtt.transport import PahoTransport
from nestd.daemon.settings import Settings
from nestd.daemon.units import format_bytes

ANSWER_SECONDS = 3.0
# A retained message comes right behind the SUBACK, if there is one.
RETAINED_SECONDS = 0.5
# A payload of this size at most is tried.
PROBE_BYTES = 4 * 2**20
_SILENT = "MQTT 3.1.1 does not tell whether the broker refuses a message"
_ACL = "examples/mosquitto/acl has the rights that a node needs, docs/mqtt.md the list"


class Login:
    """One connection with the node's login, whose events are taken one by one."""

    def __init__(self, settings: Settings, suffix: str, will: Message | None = None) -> None:
        options = node_options(settings)
        self.client_id = f"{options.client_id}-{suffix}"
        self.topics = Topics(settings.mqtt.prefix, settings.node_name)
        self._events: SimpleQueue[TransportEvent] = SimpleQueue()
        self._heard: list[Received] = []
        make_will: MakeWill | None = None if will is None else lambda _connection: will
        session = replace(
            options, client_id=self.client_id, clean_start=True, session_expiry_interval=0
        )
        self._transport = PahoTransport(session, make_will)
        self._transport.start(self._events.put)

    def first(self) -> TransportEvent | None:
        """Return how the first attempt to connect ends, or None if it does not."""
        return self._wait(lambda event: isinstance(event, Connected | Disconnected | GaveUp))

    def subscribe(self, filters: list[str]) -> tuple[str | None, ...] | None:
        """Return why each filter is refused (None: granted), or None if there is no answer."""
        self._transport.subscribe([Subscription(item, 0) for item in filters])
        event = self._wait(lambda event: isinstance(event, Subscribed))
        return event.refusals if isinstance(event, Subscribed) else None

    def publish(self, topic: str, payload: bytes) -> str | None:
        """Return why the broker refuses a message, or None if it takes it."""
        mid = self._transport.publish(Message(topic, payload, qos=1))
        event = self._wait(lambda event: _ends(event, mid))
        if isinstance(event, Published):
            return event.refusal
        return event.reason if isinstance(event, Disconnected) else "there is no answer"

    def hear(self, topic: str, words: bytes, seconds: float = ANSWER_SECONDS) -> Received | None:
        """Return a message on `topic` with these `words`, or None if none comes."""

        def wanted(event: TransportEvent) -> bool:
            return isinstance(event, Received) and event.topic == topic and words in event.payload

        # A broker may deliver a message of ours before it acknowledges it.
        known = next((event for event in self._heard if wanted(event)), None)
        event = known or self._wait(wanted, seconds)
        return event if isinstance(event, Received) else None

    def close(self, will: bool = False) -> None:
        """Disconnect, or break off so that the broker sends the will."""
        self._transport.stop(ANSWER_SECONDS, will)

    def _wait(
        self, wanted: Callable[[TransportEvent], bool], seconds: float = ANSWER_SECONDS
    ) -> TransportEvent | None:
        deadline = time.monotonic() + seconds
        while (remaining := deadline - time.monotonic()) > 0:
            try:
                event = self._events.get(timeout=remaining)
            except Empty:
                break
            if wanted(event):
                return event
            if isinstance(event, Received):
                self._heard.append(event)
        return None


def _ends(event: TransportEvent, mid: int | None) -> bool:
    published = isinstance(event, Published) and event.mid == mid
    return published or isinstance(event, Disconnected)


def examine(settings: Settings) -> list[Finding]:
    """Log in and return the findings; only `login` where that fails."""
    login = Login(settings, "doctor")
    try:
        event = login.first()
        if not isinstance(event, Connected):
            reason = event.reason if isinstance(event, Disconnected | GaveUp) else "no answer"
            return [
                failed(
                    "login",
                    reason,
                    "check mqtt.username, mqtt.password_file and, for TLS, mqtt.cert_file: the "
                    "broker's own log says more",
                )
            ]
        who = settings.mqtt.username or "anonymous"
        found = [ok("login", f"as {who}, MQTT {settings.mqtt.protocol}")]
        found.append(strangers(settings))
        found.append(reading(login, settings))
        online = _online(login)
        found.append(writing(login, settings))
        found.append(last_will(login, settings, online))
        # Last, because a broker may end the connection over it.
        found.append(packets(login, settings, event.maximum_packet_size))
        return found
    finally:
        login.close()


def strangers(settings: Settings) -> Finding:
    """Whether the broker lets in whoever has no login."""
    mqtt = settings.mqtt
    if mqtt.cert_file is not None:
        return skipped("strangers", "our client certificate may stand for a login")
    let_in = mqtt.username is None
    if not let_in:
        nobody = mqtt.model_copy(update={"username": None, "password_file": None})
        login = Login(settings.model_copy(update={"mqtt": nobody}), "doctor-stranger")
        let_in = isinstance(login.first(), Connected)
        login.close()
    if not let_in:
        return ok("strangers", "nobody comes in without a login")
    seen = "the broker lets in everybody without a login"
    if is_here(mqtt.host):
        return ok("strangers", f"{seen}; it is on this machine: see that it listens here only")
    return warning(
        "strangers",
        f"{seen}, who can read prompts and answers",
        "allow_anonymous false and a password_file in mosquitto.conf (examples/mosquitto)",
    )


def reading(login: Login, settings: Settings) -> Finding:
    """Whether requests reach this login."""
    topics, mqtt = login.topics, settings.mqtt
    filters = [
        topics.availability,
        *(topics.request(verb) for verb in ("generate", *CONTROL_VERBS)),
        topics.blobs,
        # Not the shared subscription: it would take requests from the nodes.
        *(pool_request(mqtt.prefix, pool) for pool in mqtt.pools),
    ]
    ours = settings.home_assistant
    config_topic = f"{ours.prefix}/device/{device_id(topics.node)}/config"
    filters.append(ours.status_topic if ours.enabled else config_topic)
    refusals = login.subscribe(filters)
    if refusals is None:
        return failed("read rights", "the broker does not answer a SUBSCRIBE", "see its log")
    refused = [topic for topic, why in zip(filters, refusals, strict=False) if why is not None]
    if refused:
        return failed("read rights", f"subscriptions are refused: {', '.join(refused)}", _ACL)
    token = uuid.uuid4().hex
    reply_to = f"{CLIENTS}/{login.client_id}/doctor"
    question = json.dumps({"transaction": token, "reply_to": reply_to}).encode()
    topic = topics.request("health")
    refusal = login.publish(topic, question)
    if refusal is not None:
        return skipped(
            "read rights",
            f"subscriptions are granted; no message can be sent to see whether it comes through: "
            f"this login may not write {topic} ({refusal})",
        )
    if login.hear(topic, token.encode()) is None:
        return failed(
            "read rights",
            f"what this login publishes on {topic} does not come back, though it may subscribe",
            f"give it read and write on {topics.base}/#: {_ACL}",
        )
    return ok("read rights", f"{len(filters)} subscriptions granted, a request comes through")


def writing(login: Login, settings: Settings) -> Finding:
    """Whether answers and state may be published."""
    topics = (f"{login.topics.response('generate')}/doctor", f"{CLIENTS}/{login.client_id}/doctor")
    if settings.mqtt.protocol != "5":
        return skipped("write rights", _SILENT)
    refused = []
    for topic in topics:
        refusal = login.publish(topic, b"{}")
        if refusal is not None:
            refused.append(f"{topic} ({refusal})")
    if refused:
        return failed("write rights", f"the broker refuses {', '.join(refused)}", _ACL)
    return ok("write rights", f"{' and '.join(topics)} are taken")


def packets(login: Login, settings: Settings, announced: int | None) -> Finding:
    """Whether messages of the largest payload that is allowed get through."""
    limit = settings.mqtt.max_payload_bytes
    wanted = min(limit, PROBE_BYTES)
    remedy = (
        "raise max_packet_size (or message_size_limit) in mosquitto.conf, or lower "
        "mqtt.max_payload_bytes; large media go in pieces that fit"
    )
    if announced is not None and announced < limit:
        return warning(
            "packet limit",
            f"the broker takes {format_bytes(announced)}, mqtt.max_payload_bytes is "
            f"{format_bytes(limit)}: larger requests are lost before they reach the node",
            remedy,
        )
    refusal = login.publish(f"{login.topics.response('generate')}/doctor", bytes(wanted))
    if refusal is not None:
        seen = f"a message of {format_bytes(wanted)} is refused: {refusal}"
        return warning("packet limit", seen, remedy)
    if settings.mqtt.protocol != "5":
        return skipped("packet limit", _SILENT)
    named = "no limit" if announced is None else f"a limit of {format_bytes(announced)}"
    return ok("packet limit", f"the broker names {named} and takes {format_bytes(wanted)}")


def last_will(login: Login, settings: Settings, online: bool) -> Finding:
    """Whether the broker says `offline` for a node that breaks off."""
    if online:
        return skipped("last will", "a node of this name is online, and is not disturbed")
    topic = login.topics.availability
    boot = f"doctor-{uuid.uuid4().hex[:8]}"
    payload = json.dumps({"state": "offline", "boot": boot, "n": 0}).encode()
    dying = Login(settings, "doctor-will", Message(topic, payload, qos=1))
    event = dying.first()
    dying.close(will=True)
    if not isinstance(event, Connected):
        reason = event.reason if isinstance(event, Disconnected | GaveUp) else "no answer"
        return failed("last will", f"no connection with a will on {topic}: {reason}", _ACL)
    if login.hear(topic, boot.encode()) is None:
        return failed(
            "last will",
            f"nothing came on {topic} when a connection broke off",
            f"give this login write and read on it: {_ACL}",
        )
    return ok("last will", f"the broker publishes it on {topic}")


def _online(login: Login) -> bool:
    """Say whether a node of this name is online now."""
    retained = login.hear(login.topics.availability, b"online", RETAINED_SECONDS)
    return retained is not None and json.loads(retained.payload).get("state") == "online"
