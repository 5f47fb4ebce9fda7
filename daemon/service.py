"""The daemon: startup, main loop, shutdown.

One thread, one queue. The transport, the engine process and signals put events on the queue; the
main loop takes them off one by one, so nothing here needs a lock. What each event means is in
`intake`, `dispatch`, `control` and `status`; this file wires them and knows the order of things.
"""

from __future__ import annotations

import logging
import signal
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Any

from nestd.bundle.errors import BrokerError, Loading, RequestError
from nestd.bundle.manifest import Manifest, Modality
from nestd.daemon.blobs import Blobs
from nestd.daemon.content import Contents
from nestd.daemon.control import Control
from nestd.daemon.conversations import Conversations
from nestd.daemon.delivery import Delivery
from nestd.daemon.dispatch import Dispatch
from nestd.daemon.elastic.governor import Board, Governor
from nestd.daemon.elastic.resources import Sampler
from nestd.daemon.home_assistant import HomeAssistant
from nestd.daemon.intake import Intake, IntakeRules
from nestd.daemon.journal import Journal
from nestd.daemon.media_store import MediaStore
from nestd.daemon.metrics import Metrics
from nestd.daemon.mqtt.packets import (
    Connected,
    Disconnected,
    GaveUp,
    MakeWill,
    Published,
    Received,
    Subscription,
    Transport,
    TransportEvent,
)
from nestd.daemon.mqtt.topics import CONTROL_VERBS, Topics
from nestd.daemon.notify import Notifier
from nestd.daemon.presence import Presence
from nestd.daemon.replies import Replies
from nestd.daemon.requests import RequestBook, RequestRecord
from nestd.daemon.settings import Settings
from nestd.daemon.status import Status, parse_limits
from nestd.daemon.supervisor import EngineEvent, MakeEngine, Supervisor
from nestd.daemon.uploads import Uploads

log = logging.getLogger(__name__)

# A stopped daemon is gone within 10 s: running answers get most of them.
DRAIN_SECONDS = 7.0
ENGINE_STOP_SECONDS = 1.0
GOODBYE_SECONDS = 1.0
LONGEST_WAIT_SECONDS = 1.0
SHORTEST_SWEEP_SECONDS = 0.05
# Control topics come with QoS 0, so no broker limits them; more waiting events than this are a
# flood, and further control requests are dropped.
FLOOD = 10_000


@dataclass(frozen=True, slots=True)
class StopRequested:
    """SIGTERM or SIGINT came."""


@dataclass(frozen=True, slots=True)
class UploadEvent:
    """An event of the connection on which blobs come in."""

    event: TransportEvent


DaemonEvent = TransportEvent | EngineEvent | UploadEvent | StopRequested
MakeTransport = Callable[[MakeWill], Transport]


@dataclass(frozen=True, slots=True)
class Parts:
    """What a daemon is made of; tests put in other transports, engines and clocks.

    Attributes:
        make_blob_transport: a second connection, for blobs; None where none are taken.
        board: makes snapshots; None reads this machine, below the setting `sysroot`.
        config: the settings without secrets, for `info`.
    """

    make_transport: MakeTransport
    make_engine: MakeEngine
    make_blob_transport: Callable[[], Transport] | None = None
    board: Board | None = None
    config: dict[str, Any] = field(default_factory=dict)
    clock: Callable[[], float] = time.monotonic
    wall_clock: Callable[[], float] = time.time
    notifier: Notifier = field(default_factory=Notifier)


class Daemon:
    """One node."""

    def __init__(self, settings: Settings, manifest: Manifest, parts: Parts) -> None:
        self._settings = settings
        self._clock = parts.clock
        self._notifier = parts.notifier
        # SimpleQueue, because its put() may be called from a signal handler.
        self.events: SimpleQueue[DaemonEvent] = SimpleQueue()
        self._online = False
        self._next_sweep = float("-inf")
        self._stop_requests = 0
        self._gave_up: str | None = None

        mqtt = settings.mqtt
        self.topics = Topics(mqtt.prefix, settings.node_name, mqtt.response_topics, mqtt.pools)
        limits = parse_limits(settings)
        boot = uuid.uuid4().hex[:12]
        self._presence = Presence(self.topics.availability, boot)
        self._transport = parts.make_transport(self._presence.will)
        self.delivery = Delivery(self._transport)
        self.book = RequestBook(settings.limits.queue)
        self._journal = Journal(settings.journal_path, self._clock, parts.wall_clock)
        for record in self._journal.load():
            self.book.store(record)
            if record.final is not None and not record.final.confirmed:
                self.delivery.send(record.final)
        self._replies = Replies(self._transport, self.delivery, self.book, self._journal)
        self._supervisor = Supervisor(parts.make_engine, self.events.put)
        self._governor = Governor(
            settings,
            manifest,
            parts.board or Sampler(settings.sysroot),
            self.book,
            self._supervisor,
            self._clock(),
        )
        media = settings.media
        self._store = MediaStore(settings.media_path, media.store_bytes)
        self._blobs = Blobs(
            settings.media_path / "blobs", self._store, media, settings.limits.max_expiry_s
        )
        self._blobs.load(parts.wall_clock())
        self._store.clear()
        contents = Contents(media, manifest, self._store, self._blobs)
        rules = settings.limits
        self._conversations = Conversations(
            rules.conversations, rules.conversation_expiry_s, rules.max_prompt_chars, self._store
        )
        self._uploads: Uploads | None = None
        if parts.make_blob_transport is not None and manifest.modalities != ("text",):
            transport = parts.make_blob_transport()
            self._uploads = Uploads(transport, self.topics, limits, self._blobs, parts.wall_clock)
        self._intake = Intake(
            IntakeRules(self.topics, limits, settings.limits, manifest),
            self.book,
            self.delivery,
            self._replies,
            contents,
            self._conversations,
            self._unavailable,
        )
        self._dispatch = Dispatch(
            self.book,
            self._supervisor,
            self._replies,
            self._governor,
            self._intake,
            self._conversations,
            manifest,
            settings.limits.max_tokens,
        )
        self.status = Status(
            settings,
            self.topics,
            manifest,
            boot,
            self._transport,
            self.book,
            self._dispatch,
            self._supervisor,
            self._replies,
            self._governor,
            contents,
            parts.config,
            self._clock(),
        )
        self._metrics = Metrics(
            settings.metrics, self.topics.node, manifest.name, self.status, self.book
        )
        self._home_assistant = HomeAssistant(
            settings.home_assistant,
            self.topics,
            manifest,
            settings.elastic.memory.pressure_percent,
            self._transport,
        )
        self._control = Control(
            self.topics,
            limits,
            self.book,
            self._dispatch,
            self._replies,
            self._governor,
            self._health_data,
        )

    # The three parts of a life

    def run(self) -> None:
        """Live until SIGTERM.

        Raises:
            BrokerError: the broker refuses us for good.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        self.startup()
        try:
            self.main_loop()
        finally:
            self.shutdown()
        self.raise_if_gave_up()

    def raise_if_gave_up(self) -> None:
        """Raise BrokerError if the transport has ended for good."""
        if self._gave_up is not None:
            raise BrokerError(self._gave_up)

    def startup(self) -> None:
        """Start to connect and to load; neither is waited for."""
        self._metrics.start()
        self._supervisor.start(self._clock())
        self._transport.start(self._take_in)
        if self._uploads is not None:
            self._uploads.start(lambda event: self.events.put(UploadEvent(event)))
        self._notifier.send("READY=1")

    def main_loop(self) -> None:
        """Handle events until someone asks to stop."""
        while not self._stop_requests and self._gave_up is None:
            self.step(self._wait_seconds())

    def shutdown(self) -> None:
        """Finish what runs, hand back the rest, say goodbye; ten seconds at most.

        Requests without a PUBACK stay with the broker, which delivers them to the next process.
        """
        self._notifier.send("STOPPING=1")
        self.status.draining = True
        if self.topics.shared:
            self._transport.unsubscribe(list(self.topics.shared))
        self._hand_back(self.book.waiting)
        deadline = self._clock() + DRAIN_SECONDS
        while self._online and (self._is_running() or self.delivery.open_finals):
            remaining = deadline - self._clock()
            if remaining <= 0 or self._stop_requests > 1:
                break
            self.step(min(remaining, self._wait_seconds()))
        self._hand_back(self.book.running)
        self._supervisor.stop(ENGINE_STOP_SECONDS)
        self._governor.close()
        self._metrics.close()
        goodbye = self._presence.say(self._transport, "offline") if self._online else None
        self._wait_for(goodbye, self._clock() + GOODBYE_SECONDS)
        self._journal.tick()
        self._transport.stop(GOODBYE_SECONDS)
        if self._uploads is not None:
            self._uploads.stop(GOODBYE_SECONDS)
        log.info("stopped")

    # One turn of the loop

    def step(self, timeout: float) -> None:
        """Handle the next event, if one comes in time, and what the clock says."""
        try:
            event = self.events.get(timeout=max(0.0, timeout))
        except Empty:
            self.tick()
        else:
            self.handle(event)
            self.tick()

    def handle(self, event: DaemonEvent) -> None:
        """React to one event."""
        now = self._clock()
        if isinstance(event, Received):
            self._received(event, now)
        elif isinstance(event, EngineEvent):
            if self._supervisor.note(event, now):
                self._metrics.note(event.event, now)
                self._dispatch.handle(event.event, now)
        elif isinstance(event, UploadEvent):
            if self._uploads is not None:
                self._uploads.handle(event.event)
        elif isinstance(event, Published):
            self.delivery.published(event.mid, event.refusal)
        elif isinstance(event, Connected):
            self._connected(event, now)
        elif isinstance(event, Disconnected):
            self._online = False
            log.warning("%s", event.reason)
        elif isinstance(event, GaveUp):
            self._gave_up = event.reason
        else:
            self._stop_requests += 1

    def tick(self) -> None:
        """Do what the clock or the last event has made due."""
        now = self._clock()
        self._governor.tick(now)
        if now >= self._next_sweep:
            self._dispatch.expire(now)
            self._journal.sweep()
            if self._uploads is not None:
                self._uploads.tick()
            self._next_sweep = self._sweep_after(now)
        self._supervisor.tick(now, busy=bool(self.book.running))
        if not self.status.draining:
            self._dispatch.start_next(now)
        owners = (self.book.waiting, self.book.running, self._conversations.owners)
        self._store.release_all_but({*chain(*owners), *self._blobs.ids})
        self.delivery.send_waiting()
        self._journal.tick()
        if self._online:
            self.status.tick(now)
            self._home_assistant.tick(self._governor.snapshot)
        self._metrics.tick(now)
        phase, reason = self.status.phase()
        self._notifier.status(phase if reason is None else f"{phase}: {reason}")
        self._notifier.alive(now)

    # What events mean

    def _received(self, received: Received, now: float) -> None:
        verb = self.topics.verb_of(received.topic)
        if received.topic == self.topics.availability:
            if not self.status.draining:
                self._gave_up = self._presence.hear(self._transport, received, now)
        elif verb == "generate" and self.status.draining and received.qos > 0:
            log.info("a request stays with the broker: the node is stopping")
        elif verb == "generate":
            self._intake.take(received, now)
        elif verb is not None:
            self._control.take(received, verb, now)
        else:
            self._home_assistant.hear(received)

    def _connected(self, event: Connected, now: float) -> None:
        self._online = True
        self._replies.maximum_packet_size = event.maximum_packet_size
        counters = self._replies.counters
        first = counters["connections"] == 0
        counters["connections"] += 1
        if not event.session_present and not first:
            counters["sessions_lost"] += 1
            log.warning(
                "the broker has lost our session: requests that it held for this node are gone, "
                "their clients have to send them again"
            )
        log.info("connected (connection %d)", event.connection)
        generate = self.topics.request("generate")
        self._transport.subscribe(
            [
                *(Subscription(topic, 1) for topic in (generate, *self.topics.shared)),
                *(Subscription(self.topics.request(verb), 0) for verb in CONTROL_VERBS),
                Subscription(self.topics.availability, 0),
                *self._home_assistant.subscriptions(),
            ]
        )
        self._presence.connected(self._transport, event.connection)
        self.status.announce(now)
        self._home_assistant.connected()
        self.delivery.connected(event.connection)

    def _take_in(self, event: TransportEvent) -> None:
        """Put an event of the transport on the queue (called in the transport's thread)."""
        if isinstance(event, Received) and event.qos == 0 and self.events.qsize() > FLOOD:
            log.warning("dropping a message on %s: too many are waiting", event.topic)
            return
        self.events.put(event)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self.events.put(StopRequested())

    # Helpers

    def _unavailable(self, needed: frozenset[Modality]) -> RequestError | None:
        if self.status.draining:
            return Loading("the node is stopping: send the request again later")
        return (
            self._governor.forbidden(needed)
            or self._governor.refusal()
            or self._dispatch.unavailable()
        )

    def _health_data(self) -> dict[str, Any]:
        return self.status.health(self._clock()).model_dump(mode="json")

    def _is_running(self) -> bool:
        return any(record.state == "running" for record in self.book.running)

    def _hand_back(self, records: tuple[RequestRecord, ...]) -> None:
        """Leave requests to the broker, and answer those that it has not kept (QoS 0)."""
        for record in records:
            kept = any(self.delivery.is_open(entry) for entry in record.entries)
            if record.state != "ended" and not kept:
                self._replies.refuse(record, Loading("the node is stopping: send it again later"))

    def _wait_seconds(self) -> float:
        due = (self._next_sweep, self._supervisor.respawn_at, self._governor.next_sample)
        return max(0.0, min(at for at in due if at is not None) - self._clock())

    def _sweep_after(self, now: float) -> float:
        """When to look for expired requests again: seldom, for it looks at every one."""
        deadline = self.book.next_deadline()
        latest = now + LONGEST_WAIT_SECONDS
        if deadline is None:
            return latest
        return min(latest, max(deadline, now + SHORTEST_SWEEP_SECONDS))

    def _wait_for(self, mid: int | None, deadline: float) -> None:
        """Wait until the broker has acknowledged one message."""
        while mid is not None and (remaining := deadline - self._clock()) > 0:
            try:
                event = self.events.get(timeout=remaining)
            except Empty:
                return
            if isinstance(event, Published):
                self.delivery.published(event.mid, event.refusal)
                if event.mid == mid:
                    return
