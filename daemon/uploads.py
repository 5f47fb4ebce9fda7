"""Receives blobs over a connection of its own (docs/mqtt.md, Blobs).

MQTT 5 wants PUBACKs in the order of the messages, and a request's comes with its answer: on one
connection every chunk would wait for the answers of the requests before it. A chunk's PUBACK goes
out once the chunk is on the disk.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from nestd.bundle.errors import RequestError
from nestd.daemon.blobs import Blob, Blobs
from nestd.daemon.mqtt.contract import BlobFin, BlobInit, ControlError, ControlReply
from nestd.daemon.mqtt.packets import (
    Connected,
    Disconnected,
    GaveUp,
    Received,
    Subscription,
    Transport,
    TransportEvent,
)
from nestd.daemon.mqtt.parse import (
    Envelope,
    ParseLimits,
    check_size,
    read_control,
    read_envelope,
    transaction_of,
)
from nestd.daemon.mqtt.topics import Topics
from nestd.daemon.replies import reply_message
from nestd.daemon.requests import ReplyTo

log = logging.getLogger(__name__)

# So many missing ranges are told at once.
TOLD_RANGES = 100


class Uploads:
    """The MQTT side of `Blobs`."""

    def __init__(
        self,
        transport: Transport,
        topics: Topics,
        limits: ParseLimits,
        blobs: Blobs,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._transport = transport
        self._topics = topics
        self._limits = limits
        self._blobs = blobs
        self._clock = clock

    def start(self, emit: Callable[[TransportEvent], None]) -> None:
        """Begin to connect; every event given to `emit` must come back to `handle`.

        Nothing bounds how many messages of QoS 0 come at once, so they go no further.
        """

        def emit_bounded(event: TransportEvent) -> None:
            if isinstance(event, Received) and event.qos == 0:
                log.warning("a message on %s was dropped: blobs need QoS 1", event.topic)
            else:
                emit(event)

        self._transport.start(emit_bounded)

    def handle(self, event: TransportEvent) -> None:
        """React to one event of the connection."""
        if isinstance(event, Connected):
            self._transport.subscribe([Subscription(self._topics.blobs, 1)])
        elif isinstance(event, Received):
            self._take(event)
            self._transport.acknowledge(event)
        elif isinstance(event, Disconnected | GaveUp):
            log.warning("no blobs come in: %s", event.reason)

    def tick(self) -> None:
        """Forget blobs that have expired."""
        self._blobs.expire(self._clock())

    def stop(self, timeout: float) -> None:
        """Disconnect."""
        self._transport.stop(timeout)

    def _take(self, received: Received) -> None:
        blob_id, step = self._topics.blob_of(received.topic)
        if step in ("init", "fin"):
            envelope = read_envelope(received, "blob", self._topics, self._limits)
            reply_to = ReplyTo(envelope.response_topic, envelope.correlation_data)
            try:
                data = self._carry_out(blob_id, step, envelope)
            except RequestError as error:
                self._refuse(blob_id, transaction_of(envelope), error, reply_to)
            else:
                reply = ControlReply(transaction=transaction_of(envelope), ok=True, data=data)
                self._publish(reply, reply_to)
            return
        try:
            check_size(received.payload, self._limits)
            self._blobs.chunk(blob_id, step, received.payload)
        except RequestError as error:
            known = self._blobs.find(blob_id)
            topic = known.reply_to if known else None
            reply_to = ReplyTo(topic or self._topics.response("blob"), received.correlation_data)
            self._refuse(blob_id, None, error, reply_to)

    def _carry_out(self, blob_id: str, step: str, envelope: Envelope) -> dict[str, Any]:
        now = self._clock()
        if step == "init":
            wanted = read_control(BlobInit, envelope)
            blob = self._blobs.init(blob_id, wanted, envelope.response_topic, now)
        else:
            blob = self._blobs.fin(blob_id, read_control(BlobFin, envelope))
        return _facts(blob_id, blob) | {"expires_in": round(max(0.0, blob.expires_at - now), 1)}

    def _refuse(
        self, blob_id: str, transaction: str | int | None, error: RequestError, reply_to: ReplyTo
    ) -> None:
        log.info("blob %.64s: %s: %s", blob_id, error.code, error)
        known = self._blobs.find(blob_id)
        reply = ControlReply(
            transaction=transaction,
            ok=False,
            data=None if known is None else _facts(blob_id, known),
            error=ControlError(code=error.code, status=error.status, message=str(error)),
        )
        self._publish(reply, reply_to)

    def _publish(self, reply: ControlReply, reply_to: ReplyTo) -> None:
        self._transport.publish(reply_message(reply, reply_to))


def _facts(blob_id: str, blob: Blob) -> dict[str, Any]:
    """Return what a client may want to know of its blob."""
    missing = [] if blob.sha256 else blob.missing()[:TOLD_RANGES]
    return {"blob": blob_id, "size": blob.size, "sha256": blob.sha256, "missing": missing}
