"""A message on `request/generate` -> a waiting request, a stored answer or a refusal.

Deduplication, expiry and the queue limit are judged here (docs/mqtt.md, delivery rules 3, 4, 5).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from nestd.bundle.errors import Cancelled, IdReused, RequestError
from nestd.bundle.manifest import Manifest
from nestd.daemon.content import Contents
from nestd.daemon.conversations import Conversations
from nestd.daemon.delivery import Delivery, Entry
from nestd.daemon.elastic.plan import Choice
from nestd.daemon.filter import Filter
from nestd.daemon.mqtt.contract import Request
from nestd.daemon.mqtt.packets import Received
from nestd.daemon.mqtt.parse import Envelope, ParseLimits, read_envelope, read_request
from nestd.daemon.mqtt.topics import Topics
from nestd.daemon.replies import Replies
from nestd.daemon.requests import ReplyTo, RequestBook, RequestRecord, new_record
from nestd.daemon.selection import canonical, sampling_of
from nestd.daemon.settings import LimitSettings
from nestd.daemon.tools import structure_of

# Before the first answer nobody knows how long one takes; this is what a client waits after a 429.
FIRST_RETRY_MS = 2000


@dataclass(frozen=True, slots=True)
class IntakeRules:
    """The limits that requests are judged by."""

    topics: Topics
    parse: ParseLimits
    limits: LimitSettings
    manifest: Manifest


class Intake:
    """Takes requests in."""

    def __init__(
        self,
        rules: IntakeRules,
        book: RequestBook,
        delivery: Delivery,
        replies: Replies,
        contents: Contents,
        conversations: Conversations,
        judge: Filter,
        admit: Callable[[Request, float], Choice[bool] | None],
    ) -> None:
        self._rules = rules
        self._book = book
        self._delivery = delivery
        self._replies = replies
        self._contents = contents
        self._conversations = conversations
        self._filter = judge
        # Says whether the remote server is to answer, or raises why nobody can (`Node.admit`).
        self._admit = admit
        self._answer_ms: float | None = None

    def take(self, received: Received, now: float) -> None:
        """Judge one message; whatever is in it, it gets an answer or a place in the queue."""
        entry = self._delivery.receive(received)
        envelope = read_envelope(received, "generate", self._rules.topics, self._rules.parse)
        known = self._book.find(envelope.client, envelope.id)
        if known is not None and self._repeat(known, envelope, entry):
            return
        record = new_record(envelope, None, entry, now, self._expires_in(None, received))
        try:
            request = self._judge(envelope)
            record.remote = self._admit(request, now)
            self._book.check_room(self._retry_after_ms())
            self._contents.take(record, request, envelope.medium)
            self._conversations.recall(record, now)
        except RequestError as error:
            if envelope.id is None:
                self._replies.refuse_unnamed(record, None, error)
            else:
                self._replies.refuse(record, error)
            return
        record.deadline = now + self._expires_in(request.expires_in, received)
        self._book.add(record)
        self._replies.counters["accepted"] += 1
        self._replies.accepted(record)
        if self._book.take_early_cancel(record.client, record.id, now):
            self._replies.error(record, Cancelled("the client cancelled the request"))
        elif self._filter.judges("request"):
            record.passed = False
            self._filter.request(record, request)

    def answered_in(self, milliseconds: float) -> None:
        """Learn after how long a place becomes free, for `retry_after_ms`."""
        old = self._answer_ms if self._answer_ms is not None else milliseconds
        self._answer_ms = 0.7 * old + 0.3 * milliseconds

    def _judge(self, envelope: Envelope) -> Request:
        """Return the request, or raise why it cannot be run here."""
        request = read_request(envelope, self._rules.parse)
        canonical(request.submodel, self._rules.manifest)
        sampling_of(request, self._rules.manifest.generation, self._rules.limits.max_tokens)
        structure_of(request)
        return request

    def _repeat(self, known: RequestRecord, envelope: Envelope, entry: Entry) -> bool:
        """Answer a request whose (client, id) is known; False if it is to be judged anew."""
        redelivered = entry.received.dup
        told = known.final is not None and known.final.confirmed
        if known.refused and told and not redelivered:
            self._book.forget(known)
            return False
        if known.fingerprint != envelope.fingerprint or self._contents.is_other(known):
            stranger = new_record(envelope, None, entry, known.arrived, 1.0)
            error = IdReused(
                f"the id {known.id!r} was used for another request: take a new one, or wait until "
                "that one has expired"
            )
            self._replies.refuse_unnamed(stranger, known.id, error)
            return True
        known.reply_to = ReplyTo(envelope.response_topic, envelope.correlation_data)
        if known.final is None:
            known.entries.append(entry)
            if not redelivered:
                self._replies.accepted(known)
        elif redelivered or not known.final.confirmed:
            self._delivery.join(known.final, entry)
        else:
            known.entries.append(entry)
            self._replies.again(known)
        return True

    def _expires_in(self, asked: float | None, received: Received) -> float:
        """Seconds until the request expires: what it says itself, its message, or the default."""
        limits = self._rules.limits
        said = [float(s) for s in (asked, received.message_expiry_interval) if s is not None]
        return min([*said, limits.max_expiry_s] if said else [limits.default_expiry_s])

    def _retry_after_ms(self) -> int:
        """When a place in the queue is likely to be free."""
        return round(self._answer_ms) if self._answer_ms is not None else FIRST_RETRY_MS
