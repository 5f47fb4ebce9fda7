"""The daemon: startup, main loop, shutdown.

One thread, one queue. The transport, the engine process and signals put events on the queue; the
main loop takes them off one by one, so nothing here needs a lock. What each event means is in
`intake`, `dispatch`, `control` and `status`, which `node` puts together; this file knows the order
of things.
"""

from __future__ import annotations

import logging
import signal
from dataclasses import dataclass
from itertools import chain
from queue import Empty, SimpleQueue
from types import FrameType

from nestd.bundle.errors import BrokerError, Loading, NestdError
from nestd.bundle.manifest import Manifest
from nestd.daemon.filter import Judged
from nestd.daemon.mqtt.packets import (
    Connected,
    Disconnected,
    GaveUp,
    Published,
    Received,
    Subscribed,
    Subscription,
    TransportEvent,
)
from nestd.daemon.mqtt.topics import CONTROL_VERBS
from nestd.daemon.node import Node, Parts
from nestd.daemon.remote.messages import RemoteEvent
from nestd.daemon.requests import RequestRecord
from nestd.daemon.settings import Settings
from nestd.daemon.supervisor import EngineEvent

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
class ReloadRequested:
    """SIGHUP came."""


@dataclass(frozen=True, slots=True)
class UploadEvent:
    """An event of the connection on which blobs come in."""

    event: TransportEvent


DaemonEvent = (
    TransportEvent
    | EngineEvent
    | UploadEvent
    | Judged
    | RemoteEvent
    | StopRequested
    | ReloadRequested
)


class Daemon:
    """The life of one node."""

    def __init__(self, settings: Settings, manifest: Manifest, parts: Parts) -> None:
        """Put the node together.

        Raises:
            ConfigError: the configuration names a sub-model that the bundle does not have, or a
                remote server that cannot be asked.
        """
        # SimpleQueue, because its put() may be called from a signal handler.
        self.events: SimpleQueue[DaemonEvent] = SimpleQueue()
        self.node = Node(settings, manifest, parts, self.events.put)
        self._clock = parts.clock
        self._notifier = parts.notifier
        self._check_configuration = parts.check_configuration
        self._online = False
        self._next_sweep = float("-inf")
        self._stop_requests = 0
        self._reloads = False
        self._gave_up: str | None = None
        self._filters: list[str] = []

    # The three parts of a life

    def run(self) -> bool:
        """Live until SIGTERM, or SIGHUP from systemd.

        Returns:
            True where the process is to start again, with the configuration of now.

        Raises:
            BrokerError: the broker refuses us for good.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        # Without systemd SIGHUP says that the terminal has gone, and ends the process.
        if self._notifier.supervised:
            signal.signal(signal.SIGHUP, self._on_hangup)
        self.startup()
        try:
            self.main_loop()
        finally:
            self.shutdown()
        self.raise_if_gave_up()
        return self._reloads and not self._stop_requests

    def raise_if_gave_up(self) -> None:
        """Raise BrokerError if the transport has ended for good."""
        if self._gave_up is not None:
            raise BrokerError(self._gave_up)

    def startup(self) -> None:
        """Start to connect and to load; neither is waited for."""
        node = self.node
        node.metrics.start()
        node.supervisor.start(self._clock())
        node.remote.start()
        node.transport.start(self._take_in)
        if node.uploads is not None:
            node.uploads.start(lambda event: self.events.put(UploadEvent(event)))

    def main_loop(self) -> None:
        """Handle events until someone asks to stop or to reload."""
        while not (self._stop_requests or self._reloads) and self._gave_up is None:
            self.step(self._wait_seconds())

    def shutdown(self) -> None:
        """Finish what runs, hand back the rest, say goodbye; ten seconds at most.

        Requests without a PUBACK stay with the broker, which delivers them to the next process.
        """
        node = self.node
        if not self._reloads:
            self._notifier.send("STOPPING=1")
        node.status.draining = True
        if node.topics.shared:
            node.transport.unsubscribe(list(node.topics.shared))
        self._hand_back(node.book.waiting)
        deadline = self._clock() + DRAIN_SECONDS
        while self._online and (self._running() or node.delivery.open_finals):
            remaining = deadline - self._clock()
            if remaining <= 0 or self._stop_requests > 1:
                break
            self.step(min(remaining, self._wait_seconds()))
        self._hand_back(self._running())
        node.supervisor.stop(ENGINE_STOP_SECONDS)
        node.governor.close()
        node.filter.close()
        node.remote.close()
        node.metrics.close()
        goodbye = node.presence.say(node.transport, "offline") if self._online else None
        self._wait_for(goodbye, self._clock() + GOODBYE_SECONDS)
        node.journal.tick()
        node.transport.stop(GOODBYE_SECONDS)
        if node.uploads is not None:
            node.uploads.stop(GOODBYE_SECONDS)
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
        node = self.node
        now = self._clock()
        if isinstance(event, Received):
            self._received(event, now)
        elif isinstance(event, EngineEvent):
            if node.supervisor.note(event, now):
                node.metrics.note(event.event, now)
                node.dispatch.handle(event.event, now)
        elif isinstance(event, UploadEvent):
            if node.uploads is not None:
                node.uploads.handle(event.event)
        elif isinstance(event, Judged):
            node.dispatch.judged(event, now)
        elif isinstance(event, RemoteEvent):
            node.dispatch.handle_remote(event.event, now)
        elif isinstance(event, Published):
            node.delivery.published(event.mid, event.refusal)
        elif isinstance(event, Subscribed):
            for topic, refusal in zip(self._filters, event.refusals, strict=False):
                if refusal is not None:
                    log.error("the broker refuses the subscription to %s: %s", topic, refusal)
        elif isinstance(event, Connected):
            self._connected(event, now)
        elif isinstance(event, Disconnected):
            self._online = False
            log.warning("%s", event.reason)
        elif isinstance(event, GaveUp):
            self._gave_up = event.reason
        elif isinstance(event, ReloadRequested):
            self._reload()
        else:
            self._stop_requests += 1

    def tick(self) -> None:
        """Do what the clock or the last event has made due."""
        node = self.node
        now = self._clock()
        node.governor.tick(now)
        if now >= self._next_sweep:
            node.dispatch.expire(now)
            node.journal.sweep()
            if node.uploads is not None:
                node.uploads.tick()
            self._next_sweep = self._sweep_after(now)
        node.supervisor.tick(now, busy=bool(node.book.running))
        if not node.status.draining:
            node.dispatch.start_next(now)
        judging = node.dispatch.judging
        book = node.book
        owners = (book.waiting, book.running, book.remote, judging, node.conversations.owners)
        node.store.release_all_but({*chain(*owners), *node.blobs.ids})
        node.delivery.send_waiting()
        node.journal.tick()
        if self._online:
            node.status.tick(now)
            node.home_assistant.tick(node.governor.snapshot)
        node.metrics.tick(now)
        self._tell_systemd(now)

    def _tell_systemd(self, now: float) -> None:
        """Ready is who can answer or say why not: with an engine, or known to get none soon.

        A connection to the broker is not waited for. This is called once a turn of the loop, which
        stands still where an engine that hangs cannot even be killed: then the watchdog bites.
        """
        phase, reason = self.node.status.phase()
        text = phase if reason is None else f"{phase}: {reason}"
        self._notifier.status(text if self._online else f"{text}; not connected to the broker")
        if phase in ("ready", "degraded") and not self._reloads:
            self._notifier.ready()
        elif phase != "draining":
            self._notifier.extend(now)
        self._notifier.alive(now)

    # What events mean

    def _received(self, received: Received, now: float) -> None:
        node = self.node
        verb = node.topics.verb_of(received.topic)
        if received.topic == node.topics.availability:
            if not node.status.draining:
                self._gave_up = node.presence.hear(node.transport, received, now)
        elif verb == "generate" and node.status.draining and received.qos > 0:
            log.info("a request stays with the broker: the node is stopping")
        elif verb == "generate":
            node.intake.take(received, now)
        elif verb is not None:
            node.control.take(received, verb, now)
        else:
            node.home_assistant.hear(received)

    def _connected(self, event: Connected, now: float) -> None:
        node = self.node
        self._online = True
        node.replies.maximum_packet_size = event.maximum_packet_size
        counters = node.replies.counters
        first = counters["connections"] == 0
        counters["connections"] += 1
        if not event.session_present and not first:
            counters["sessions_lost"] += 1
            log.warning(
                "the broker has lost our session: requests that it held for this node are gone, "
                "their clients have to send them again"
            )
        log.info("connected (connection %d)", event.connection)
        generate = node.topics.request("generate")
        subscriptions = [
            *(Subscription(topic, 1) for topic in (generate, *node.topics.shared)),
            *(Subscription(node.topics.request(verb), 0) for verb in CONTROL_VERBS),
            Subscription(node.topics.availability, 0),
            *node.home_assistant.subscriptions(),
        ]
        self._filters = [item.topic_filter for item in subscriptions]
        node.transport.subscribe(subscriptions)
        node.presence.connected(node.transport, event.connection)
        node.status.announce(now)
        node.home_assistant.connected()
        node.delivery.connected(event.connection)

    def _take_in(self, event: TransportEvent) -> None:
        """Put an event of the transport on the queue (called in the transport's thread)."""
        if isinstance(event, Received) and event.qos == 0 and self.events.qsize() > FLOOD:
            log.warning("dropping a message on %s: too many are waiting", event.topic)
            return
        self.events.put(event)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self.events.put(StopRequested())

    def _on_hangup(self, _number: int, _frame: FrameType | None) -> None:
        self.events.put(ReloadRequested())

    def _reload(self) -> None:
        """Leave the main loop if the configuration on the disk is right, else say what is wrong."""
        self._notifier.reloading()
        try:
            self._check_configuration()
        except NestdError as error:
            log.error("not reloaded, what was in force stays so: %s", error)
            self._notifier.ready()
        else:
            log.info("reloading: the node starts again with the new configuration")
            self._reloads = True

    # Helpers

    def _running(self) -> tuple[RequestRecord, ...]:
        """Return what engine and remote server have, and the answers that the filter judges."""
        book = self.node.book
        records = (*book.running, *book.remote, *self.node.dispatch.judging)
        return tuple(record for record in records if record.state == "running")

    def _hand_back(self, records: tuple[RequestRecord, ...]) -> None:
        """Leave requests to the broker, and answer those that it has not kept (QoS 0)."""
        for record in records:
            kept = any(self.node.delivery.is_open(entry) for entry in record.entries)
            if record.state != "ended" and not kept:
                self.node.replies.refuse(
                    record, Loading("the node is stopping: send it again later")
                )

    def _wait_seconds(self) -> float:
        due = (self._next_sweep, self.node.supervisor.respawn_at, self.node.governor.next_sample)
        return max(0.0, min(at for at in due if at is not None) - self._clock())

    def _sweep_after(self, now: float) -> float:
        """When to look for expired requests again: seldom, for it looks at every one."""
        deadline = self.node.book.next_deadline()
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
                self.node.delivery.published(event.mid, event.refusal)
                if event.mid == mid:
                    return
