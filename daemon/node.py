"""The parts of a node, made and connected to each other; `service.py` moves them.

A request's way: intake -> book -> dispatch -> engine -> replies -> delivery. What an earlier
process has left on the disk is read here; nothing is started.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from nestd.bundle.errors import Loading
from nestd.bundle.manifest import Manifest
from nestd.daemon.blobs import Blobs
from nestd.daemon.content import Contents
from nestd.daemon.control import Control
from nestd.daemon.conversations import Conversations
from nestd.daemon.delivery import Delivery
from nestd.daemon.dispatch import Dispatch
from nestd.daemon.elastic.governor import Board, Governor
from nestd.daemon.elastic.plan import Choice
from nestd.daemon.elastic.resources import Sampler
from nestd.daemon.filter import Filter, Judged
from nestd.daemon.home_assistant import HomeAssistant
from nestd.daemon.intake import Intake, IntakeRules
from nestd.daemon.journal import Journal
from nestd.daemon.media_store import MediaStore
from nestd.daemon.metrics import Metrics
from nestd.daemon.mqtt.contract import Request
from nestd.daemon.mqtt.packets import MakeWill, Transport
from nestd.daemon.mqtt.topics import Topics
from nestd.daemon.notify import Notifier
from nestd.daemon.presence import Presence
from nestd.daemon.remote.messages import RemoteEvent
from nestd.daemon.remote.rung import RemoteRung, with_reason
from nestd.daemon.replies import Replies
from nestd.daemon.requests import RequestBook
from nestd.daemon.selection import modalities_of
from nestd.daemon.settings import Settings
from nestd.daemon.status import Status, parse_limits
from nestd.daemon.supervisor import EngineEvent, MakeEngine, Supervisor
from nestd.daemon.uploads import Uploads

MakeTransport = Callable[[MakeWill], Transport]


@dataclass(frozen=True, slots=True)
class Parts:
    """What a daemon is made of; tests put in other transports, engines and clocks.

    Attributes:
        make_blob_transport: a second connection, for blobs; None where none are taken.
        board: makes snapshots; None reads this machine, below the setting `sysroot`.
        config: the settings without secrets, for `info`.
        check_configuration: raises NestdError if what is on the disk now would not start.
    """

    make_transport: MakeTransport
    make_engine: MakeEngine
    make_blob_transport: Callable[[], Transport] | None = None
    board: Board | None = None
    config: dict[str, Any] = field(default_factory=dict)
    check_configuration: Callable[[], object] = lambda: None
    clock: Callable[[], float] = time.monotonic
    wall_clock: Callable[[], float] = time.time
    notifier: Notifier = field(default_factory=Notifier)


class Node:
    """One node; each attribute is documented at its class."""

    def __init__(
        self,
        settings: Settings,
        manifest: Manifest,
        parts: Parts,
        put_event: Callable[[EngineEvent | Judged | RemoteEvent], None],
    ) -> None:
        """`put_event` takes the events of engine, filter and remote server, in any thread.

        Raises:
            ConfigError: the configuration names a sub-model that the bundle does not have, or a
                remote server that cannot be asked.
        """
        self._clock = parts.clock
        mqtt = settings.mqtt
        self.topics = Topics(mqtt.prefix, settings.node_name, mqtt.response_topics, mqtt.pools)
        limits = parse_limits(settings)
        boot = uuid.uuid4().hex[:12]
        self.presence = Presence(self.topics.availability, boot)
        self.transport = parts.make_transport(self.presence.will)
        self.delivery = Delivery(self.transport)
        self.book = RequestBook(settings.limits.queue)
        self.journal = Journal(settings.journal_path, self._clock, parts.wall_clock)
        for record in self.journal.load():
            self.book.store(record)
            if record.final is not None and not record.final.confirmed:
                self.delivery.send(record.final)
        self.replies = Replies(self.transport, self.delivery, self.book, self.journal)
        self.filter = Filter(settings.filter, settings.node_name, put_event)
        self.supervisor = Supervisor(parts.make_engine, put_event)
        self.governor = Governor(
            settings,
            manifest,
            parts.board or Sampler(settings.sysroot),
            self.book,
            self.supervisor,
            self._clock(),
        )
        self.remote = RemoteRung(settings, manifest, self.book, self.governor, put_event)
        media = settings.media
        self.store = MediaStore(settings.media_path, media.store_bytes)
        self.blobs = Blobs(
            settings.media_path / "blobs", self.store, media, settings.limits.max_expiry_s
        )
        self.blobs.load(parts.wall_clock())
        self.store.clear()
        contents = Contents(media, manifest, self.store, self.blobs)
        rules = settings.limits
        self.conversations = Conversations(
            rules.conversations, rules.conversation_expiry_s, rules.max_prompt_chars, self.store
        )
        self.uploads: Uploads | None = None
        if parts.make_blob_transport is not None and manifest.modalities != ("text",):
            transport = parts.make_blob_transport()
            self.uploads = Uploads(transport, self.topics, limits, self.blobs, parts.wall_clock)
        self.intake = Intake(
            IntakeRules(self.topics, limits, settings.limits, manifest),
            self.book,
            self.delivery,
            self.replies,
            contents,
            self.conversations,
            self.filter,
            self.admit,
        )
        self.dispatch = Dispatch(
            self.book,
            self.supervisor,
            self.replies,
            self.governor,
            self.intake,
            self.conversations,
            self.filter,
            self.remote,
            manifest,
            settings.limits.max_tokens,
        )
        self.status = Status(
            settings,
            self.topics,
            manifest,
            boot,
            self.transport,
            self.book,
            self.dispatch,
            self.supervisor,
            self.replies,
            self.governor,
            self.remote,
            contents,
            parts.config,
            self._clock(),
        )
        self.metrics = Metrics(
            settings.metrics, self.topics.node, manifest.name, self.status, self.book
        )
        self.home_assistant = HomeAssistant(
            settings.home_assistant,
            self.topics,
            manifest,
            settings.elastic.memory.pressure_percent,
            self.transport,
        )
        self.control = Control(
            self.topics,
            limits,
            self.book,
            self.dispatch,
            self.replies,
            self.governor,
            self.health_data,
        )

    def admit(self, request: Request, now: float) -> Choice[bool] | None:
        """Say whether the remote server is to answer, and why; None: it must not.

        Raises:
            RequestError: neither it nor the engine can take the request now.
        """
        if self.status.draining:
            raise Loading("the node is stopping: send the request again later")
        remote = self.remote.choose(request, request.messages, now)
        if remote is None or not remote.value:
            unavailable = (
                self.governor.forbidden(modalities_of(request.messages))
                or self.governor.refusal()
                or self.dispatch.unavailable()
            )
            if unavailable is not None:
                raise with_reason(unavailable, remote)
        return remote

    def health_data(self) -> dict[str, Any]:
        """The health figures of the moment, for a control reply."""
        return self.status.health(self._clock()).model_dump(mode="json")
