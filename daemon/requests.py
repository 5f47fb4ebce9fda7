"""The book of requests: who waits, who runs, what was answered (docs/mqtt.md, rules 3, 4 and 5).

    waiting -> running -> ended          and running -> waiting when the engine has died,
                                         or the remote server has failed

Bookkeeping only: time is an argument, and nothing here sends anything.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Literal

from nestd.bundle.errors import QueueFull
from nestd.daemon.delivery import Entry, Final
from nestd.daemon.elastic.answer_energy import Share
from nestd.daemon.elastic.plan import Choice
from nestd.daemon.engine.messages import ChatMessage
from nestd.daemon.mqtt.contract import Request
from nestd.daemon.mqtt.parse import Envelope

# Ended requests kept for rule 3. Their answers are text of a few kB.
STORED_ANSWERS = 512
# A cancel may overtake its request, which may still be at the broker: remembered for a while.
EARLY_CANCELS = 256


@dataclass(frozen=True, slots=True)
class ReplyTo:
    """Where the events of a request go."""

    response_topic: str
    correlation_data: bytes | None


@dataclass(eq=False, slots=True)
class RequestRecord:
    """One request and what became of it.

    Attributes:
        request: what it asks for, without its messages; None once it has ended.
        messages: as the engine takes them; empty once it has ended, so that prompts are not kept.
        prompt: the same, behind what its conversation knows already.
        blobs: the sha256 of each blob that the messages name.
        number: order of arrival.
        attempt: 1, or more if it had to be run again.
        deaths: how many engine processes ended while they ran it.
        seq: number of the next event.
        passed: no filter has to judge it any more.
        wish: the sub-model that a control request asked for in place of the request's own.
        route: the sub-models that the engine was told to run this attempt on, and why each.
        remote: whether the remote server is to answer, and why or why not; None: it must not.
        remote_trouble: how that server failed to, if it did.
        energy: an answer's share of the board's energy when this attempt started.
        refused: it ended with an error before it could wait; the client may send it again.
    """

    client: str
    id: str
    fingerprint: bytes
    request: Request | None
    reply_to: ReplyTo
    arrived: float
    deadline: float
    messages: tuple[ChatMessage, ...] = ()
    prompt: tuple[ChatMessage, ...] = ()
    blobs: dict[str, str] = field(default_factory=dict)
    number: int = 0
    attempt: int = 1
    deaths: int = 0
    seq: int = 0
    started: float | None = None
    engine_id: str | None = None
    submodel: str | None = None
    passed: bool = True
    wish: str | None = None
    route: list[Choice[str]] = field(default_factory=list)
    remote: Choice[bool] | None = None
    remote_trouble: str | None = None
    energy: Share | None = None
    state: Literal["waiting", "running", "ended"] = "waiting"
    refused: bool = False
    entries: list[Entry] = field(default_factory=list)
    final: Final | None = None

    def next_seq(self) -> int:
        """Return the number for the next event and count on."""
        self.seq += 1
        return self.seq - 1


def new_record(
    envelope: Envelope, request: Request | None, entry: Entry, now: float, expires_in: float
) -> RequestRecord:
    """Return the record of a request that has just come in.

    A message that the broker delivers again (`dup`), and that this process does not know, has been
    seen by an earlier process, which did not live to answer it.
    """
    return RequestRecord(
        client=envelope.client,
        id=envelope.id or uuid.uuid4().hex,
        fingerprint=envelope.fingerprint,
        request=request,
        reply_to=ReplyTo(envelope.response_topic, envelope.correlation_data),
        arrived=now,
        deadline=now + expires_in,
        attempt=2 if entry.received.dup else 1,
        entries=[entry],
    )


class RequestBook:
    """All requests that this process knows."""

    def __init__(self, queue_limit: int) -> None:
        self.queue_limit = queue_limit
        self._records: dict[tuple[str, str], RequestRecord] = {}
        self._waiting: list[RequestRecord] = []
        self._running: dict[str, RequestRecord] = {}
        self._remote: dict[str, RequestRecord] = {}
        self._early_cancels: dict[tuple[str | None, str], float] = {}
        self._arrivals = 0
        self._engine_ids = 0

    # Looking

    @property
    def waiting(self) -> tuple[RequestRecord, ...]:
        """Requests that have not been given to the engine."""
        return tuple(self._waiting)

    @property
    def running(self) -> tuple[RequestRecord, ...]:
        """Requests that the engine has, among them ended ones that it is about to drop."""
        return tuple(self._running.values())

    @property
    def remote(self) -> tuple[RequestRecord, ...]:
        """Requests that the remote server has."""
        return tuple(self._remote.values())

    def find(self, client: str, request_id: str | None) -> RequestRecord | None:
        """Return the record of (client, id), if it is known."""
        return None if request_id is None else self._records.get((client, request_id))

    def by_engine_id(self, engine_id: str) -> RequestRecord | None:
        """Return the record that the engine knows as `engine_id`."""
        return self._running.get(engine_id)

    def by_remote_id(self, question_id: str) -> RequestRecord | None:
        """Return the record that the remote server's thread knows as `question_id`."""
        return self._remote.get(question_id)

    def open_with_id(self, request_id: str, client: str | None) -> list[RequestRecord]:
        """Return the requests with this id that have not ended, of one client or of all."""
        return [
            record
            for record in self._records.values()
            if record.id == request_id
            and record.state != "ended"
            and client in (None, record.client)
        ]

    def has_ended(self, request_id: str, client: str | None) -> bool:
        """Say whether a request with this id is known and has ended."""
        return any(
            record.id == request_id and record.state == "ended" and client in (None, record.client)
            for record in self._records.values()
        )

    def open_records(self) -> Iterator[RequestRecord]:
        """All requests that have not ended."""
        return (r for r in list(self._records.values()) if r.state != "ended")

    def next_deadline(self) -> float | None:
        """When the next request expires."""
        return min((record.deadline for record in self.open_records()), default=None)

    # Changing

    def check_room(self, retry_after_ms: int) -> None:
        """Raise QueueFull if no more requests may wait."""
        if len(self._waiting) >= self.queue_limit:
            raise QueueFull(
                f"{self.queue_limit} requests wait already: try again later or on another node",
                retry_after_ms,
            )

    def add(self, record: RequestRecord) -> None:
        """Let `record` wait."""
        self._arrivals += 1
        record.number = self._arrivals
        self._records[record.client, record.id] = record
        self._waiting.append(record)

    def store(self, record: RequestRecord) -> None:
        """Keep an ended `record` for those who ask again; the oldest give way."""
        record.state, record.request, record.messages, record.prompt = "ended", None, (), ()
        self._records.pop((record.client, record.id), None)
        self._records[record.client, record.id] = record
        surplus = sum(1 for r in self._records.values() if r.state == "ended") - STORED_ANSWERS
        if surplus > 0:
            ended = [r for r in self._records.values() if _is_delivered(r)]
            ended.sort(key=lambda r: not r.refused)  # a refusal is the least loss; else by age
            for old in ended[:surplus]:
                self.forget(old)

    def forget(self, record: RequestRecord) -> None:
        """Drop a record."""
        del self._records[record.client, record.id]

    def next_waiting(self, but: Collection[RequestRecord] = ()) -> RequestRecord | None:
        """Return the first of `startable` that is not among `but`."""
        return next((record for record in self.startable() if record not in but), None)

    def startable(self) -> Iterator[RequestRecord]:
        """Waiting requests that may start, those of higher priority and the older ones first.

        One whose conversation is being answered, or has an earlier request that waits, waits for
        that answer, which is part of its prompt.
        """
        if not self._waiting:
            return
        answered_now = (r for r in self._records.values() if r.state == "running")
        busy = {key for record in answered_now if (key := conversation_of(record))}
        for record in sorted(self._waiting, key=_rank):
            key = conversation_of(record)
            if key in busy:
                continue
            if key is not None:
                busy.add(key)
            if record.passed:
                yield record

    def ahead_of(self, record: RequestRecord) -> int:
        """How many requests run or will run before `record`."""
        before = sum(1 for other in self._waiting if _rank(other) < _rank(record))
        started = (*self._running.values(), *self._remote.values())
        return before + sum(1 for other in started if other.state == "running")

    def start(
        self, record: RequestRecord, choice: Choice[str], now: float, remote: bool = False
    ) -> str:
        """Move `record` from waiting to running and return its id for engine or remote server.

        Clients choose their ids, and the engine may still be dropping a cancelled request, so it
        gets ids of our own.
        """
        self._engine_ids += 1
        engine_id = str(self._engine_ids)
        self._waiting.remove(record)
        (self._remote if remote else self._running)[engine_id] = record
        record.state, record.engine_id = "running", engine_id
        record.started, record.submodel, record.route = now, choice.value, [choice]
        return engine_id

    def leave_engine(self, engine_id: str) -> RequestRecord | None:
        """The engine is through with `engine_id`; return its record."""
        record = self._running.pop(engine_id, None)
        if record is not None:
            record.engine_id = None
        return record

    def leave_remote(self, question_id: str) -> RequestRecord | None:
        """The remote server is through with `question_id`; return its record."""
        record = self._remote.pop(question_id, None)
        if record is not None:
            record.engine_id = None
        return record

    def wait_again(self, record: RequestRecord) -> None:
        """Let a request whose engine died, or whose server failed, wait again in its old place."""
        record.state = "waiting"
        record.attempt += 1
        self._waiting.append(record)

    def end(self, record: RequestRecord, final: Final) -> None:
        """The request is answered by `final`, which settles its entries."""
        if record in self._waiting:
            self._waiting.remove(record)
        record.final = final
        record.entries = []
        self.store(record)

    def expired(self, now: float) -> list[RequestRecord]:
        """Requests past their deadline whose answer has not been taken by the transport."""
        return [
            record
            for record in self._records.values()
            if record.deadline <= now
            and (record.final is None or (_is_unsent(record.final) and not record.refused))
        ]

    def forget_expired(self, now: float) -> None:
        """Drop answers that nobody may ask for any more, and old early cancels."""
        for record in [r for r in self._records.values() if r.deadline <= now and _is_delivered(r)]:
            self.forget(record)
        for key in [key for key, until in self._early_cancels.items() if until <= now]:
            del self._early_cancels[key]

    # Cancels that overtake their request

    def cancel_early(self, client: str | None, request_id: str, until: float) -> None:
        """Remember to cancel a request that has not come in yet."""
        self._early_cancels.pop((client, request_id), None)
        self._early_cancels[client, request_id] = until
        while len(self._early_cancels) > EARLY_CANCELS:
            del self._early_cancels[next(iter(self._early_cancels))]

    def take_early_cancel(self, client: str, request_id: str, now: float) -> bool:
        """Say whether the request was cancelled before it came in, and forget that."""
        until = [self._early_cancels.pop((who, request_id), 0.0) for who in (client, None)]
        return max(until) > now


def conversation_of(record: RequestRecord) -> tuple[str, str] | None:
    """Return the client and its id of the conversation that a request belongs to, or None."""
    if record.request is None or record.request.conversation is None:
        return None
    return (record.client, record.request.conversation)


def _rank(record: RequestRecord) -> tuple[int, int]:
    priority = record.request.priority if record.request is not None else 0
    return (-priority, record.number)


def _is_unsent(final: Final) -> bool:
    return final.mid is None and not final.confirmed


def _is_delivered(record: RequestRecord) -> bool:
    return record.state == "ended" and record.final is not None and record.final.confirmed
