"""Events to clients: built from a record, numbered, and sent (docs/mqtt.md, Events and Errors).

`accepted` goes out with QoS 1 and `delta` with QoS 0, both only to requests that stream; `done` and
`error` through `Delivery`, which holds the request's PUBACK back until the broker has them.
"""

from __future__ import annotations

import logging
import math

from pydantic import BaseModel

from nestd.bundle.errors import Expired, RequestError, TooLarge
from nestd.daemon.delivery import Delivery, Final
from nestd.daemon.engine.messages import Delta as EngineDelta
from nestd.daemon.engine.messages import Finished
from nestd.daemon.journal import Journal
from nestd.daemon.logs import about
from nestd.daemon.mqtt import contract, node_contract
from nestd.daemon.mqtt.packets import Message, Transport
from nestd.daemon.mqtt.parse import JSON_TYPE
from nestd.daemon.remote.messages import RemoteFinished
from nestd.daemon.requests import ReplyTo, RequestBook, RequestRecord

log = logging.getLogger(__name__)

# How long the broker keeps an error for a client that is away.
ERROR_EXPIRY_SECONDS = 60


class Replies:
    """Sends events and counts them."""

    def __init__(
        self, transport: Transport, delivery: Delivery, book: RequestBook, journal: Journal
    ) -> None:
        self._journal = journal
        self._transport = transport
        self._delivery = delivery
        self._book = book
        self.maximum_packet_size: int | None = None
        self.counters = node_contract.Counters().model_dump()

    def accepted(self, record: RequestRecord) -> None:
        """Tell a client that streams that its request waits.

        Any other client gets one message, `done` or `error`: so request-response tools that take
        the first message for the answer work.
        """
        if record.request is None or not record.request.stream:
            return
        event = contract.Accepted(
            id=record.id,
            attempt=record.attempt,
            seq=record.next_seq(),
            ahead=self._book.ahead_of(record),
            remote=record.remote is not None and record.remote.value,
            remote_reason=None if record.remote is None else record.remote.reason,
        )
        self._publish(event, record.reply_to, qos=1)

    def delta(self, record: RequestRecord, delta: EngineDelta) -> None:
        """Pass new text on; one that cannot be sent is dropped, as `done` has the whole text."""
        event = contract.Delta(
            id=record.id,
            attempt=record.attempt,
            seq=record.next_seq(),
            text=delta.text,
            completion_tokens=delta.completion_tokens,
            submodel=delta.submodel,
        )
        if not self._publish(event, record.reply_to, qos=0):
            self.counters["dropped_deltas"] += 1

    def done(
        self,
        record: RequestRecord,
        finished: Finished,
        joules: float | None,
        call: contract.ToolCall | None,
        turn: contract.ConversationTurn | None,
        now: float,
    ) -> None:
        """Send the whole answer and end the request."""
        started = record.started if record.started is not None else now
        event = contract.Done(
            id=record.id,
            attempt=record.attempt,
            seq=record.next_seq(),
            text=finished.text,
            finish_reason=finished.finish_reason if call is None else "tool_call",
            tool_call=call,
            conversation=turn,
            submodel=finished.switches[-1].submodel if finished.switches else record.submodel or "",
            remote_model=finished.model if isinstance(finished, RemoteFinished) else None,
            switches=_with_reasons(finished, record),
            usage=_usage(finished),
            timings=contract.Timings(
                queue_ms=round((started - record.arrived) * 1000, 1),
                **finished.timings.model_dump(),
            ),
            joules=None if joules is None else round(joules, 3),
        )
        message = _message(event, record.reply_to, expiry=_remaining(record, now))
        limit = self.maximum_packet_size
        if limit is not None and message.size() > limit:
            sentence = (
                f"the answer has {len(message.payload)} bytes, the broker takes {limit}: ask for "
                "fewer tokens or raise the broker's limit"
            )
            self.error(record, TooLarge(sentence))
            return
        self.counters["done"] += 1
        self.counters["completion_tokens"] += finished.completion_tokens
        log.info(
            "request %s is done: %d tokens on %s in %.0f ms",
            record.id,
            finished.completion_tokens,
            event.submodel,
            (now - record.arrived) * 1000,
            extra=about(record.id),
        )
        self._end(record, message)

    def error(self, record: RequestRecord, error: RequestError) -> None:
        """Send an error and end the request.

        One that names a time to come again is no answer to keep: the same request may then succeed.
        """
        record.refused = record.refused or error.retry_after_ms is not None
        self._count(error)
        sentence = "request %s ends with %s: %s"
        log.info(sentence, record.id, error.code, error, extra=about(record.id))
        event = _error(record.id, record.attempt, record.next_seq(), error)
        self._end(record, _message(event, record.reply_to, expiry=ERROR_EXPIRY_SECONDS))

    def refuse(self, record: RequestRecord, error: RequestError) -> None:
        """Send an error for a request that never came to wait; the client may send it again."""
        record.refused = True
        self.error(record, error)

    def refuse_unnamed(
        self, record: RequestRecord, request_id: str | None, error: RequestError
    ) -> None:
        """Like `refuse`, but leave the book alone: the id is missing or is another request's."""
        self._count(error)
        sentence = "request %s ends with %s: %s"
        log.info(sentence, request_id, error.code, error, extra=about(request_id))
        event = _error(request_id, record.attempt, 0, error)
        message = _message(event, record.reply_to, expiry=ERROR_EXPIRY_SECONDS)
        self._delivery.send(Final(message, record.entries))

    def too_late(self, record: RequestRecord) -> None:
        """The deadline has passed: the answer that could not be sent gives way to an error."""
        error = Expired("the request expired before it was answered: allow more time in expires_in")
        if record.final is None:
            self.error(record, error)
            return
        event = _error(record.id, record.attempt, record.next_seq(), error)
        message = _message(event, record.reply_to, expiry=ERROR_EXPIRY_SECONDS)
        self._delivery.replace(record.final, message)
        record.refused = True  # replaced once, not with every tick

    def again(self, record: RequestRecord) -> None:
        """Send a stored answer once more, to whoever asked again; `record.entries` wait for it."""
        assert record.final is not None
        old = record.final.message
        message = Message(
            topic=record.reply_to.response_topic,
            payload=old.payload,
            content_type=old.content_type,
            correlation_data=record.reply_to.correlation_data,
            message_expiry_interval=old.message_expiry_interval,
        )
        record.final = Final(message, record.entries)
        record.entries = []
        self._delivery.send(record.final)

    def control(self, reply: contract.ControlReply, reply_to: ReplyTo) -> None:
        """Answer a control request."""
        self._transport.publish(reply_message(reply, reply_to))

    def _end(self, record: RequestRecord, message: Message) -> None:
        # The broker will deliver the request again if we die before its PUBACK.
        if not record.refused and any(entry.received.qos > 0 for entry in record.entries):
            self._journal.add(record, message)
        final = Final(message, record.entries)
        self._book.end(record, final)
        self._delivery.send(final)

    def _publish(self, event: BaseModel, reply_to: ReplyTo, qos: int) -> bool:
        message = _message(event, reply_to, expiry=ERROR_EXPIRY_SECONDS, qos=qos)
        return self._transport.publish(message) is not None

    def _count(self, error: RequestError) -> None:
        errors = self.counters["errors"]
        errors[error.code] = errors.get(error.code, 0) + 1


def reply_message(reply: contract.ControlReply, reply_to: ReplyTo) -> Message:
    """Return the message that answers a control request or an upload."""
    return _message(reply, reply_to, expiry=ERROR_EXPIRY_SECONDS)


def _with_reasons(finished: Finished, record: RequestRecord) -> tuple[contract.Switch, ...]:
    """Return the switches with their reasons.

    The engine tells where it switched, the route tells why. A stretch of the route may have been
    too short for a token and is then no switch.
    """
    route = iter(record.route)
    switches = []
    for switch in finished.switches:
        reason = next((item.reason for item in route if item.value == switch.submodel), None)
        switches.append(contract.Switch(**switch.model_dump(), reason=reason))
    return tuple(switches)


def _usage(finished: Finished) -> contract.Usage | None:
    if isinstance(finished, RemoteFinished) and not finished.counted:
        return None
    return contract.Usage(
        prompt_tokens=finished.prompt_tokens,
        completion_tokens=finished.completion_tokens,
        cached_tokens=finished.cached_tokens,
        guessed_tokens=finished.guessed_tokens,
    )


def _error(request_id: str | None, attempt: int, seq: int, error: RequestError) -> contract.Error:
    return contract.Error(
        id=request_id,
        attempt=attempt,
        seq=seq,
        code=error.code,
        status=error.status,
        message=str(error),
        retry_after_ms=error.retry_after_ms,
    )


def _message(event: BaseModel, reply_to: ReplyTo, expiry: int, qos: int = 1) -> Message:
    return Message(
        topic=reply_to.response_topic,
        payload=event.model_dump_json().encode(),
        qos=qos,
        content_type=JSON_TYPE,
        correlation_data=reply_to.correlation_data,
        message_expiry_interval=expiry,
    )


def _remaining(record: RequestRecord, now: float) -> int:
    return max(1, math.ceil(record.deadline - now))
