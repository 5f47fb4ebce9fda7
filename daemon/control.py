"""Control requests: cancel, submodel, modality, health (docs/mqtt.md, Control).

They come in with QoS 0 on topics of their own, so they never stand behind queued work.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from nestd.bundle.errors import BadRequest, RequestError
from nestd.daemon.dispatch import Dispatch
from nestd.daemon.elastic.governor import Governor
from nestd.daemon.elastic.plan import Choice
from nestd.daemon.mqtt.contract import (
    CancelRequest,
    ControlError,
    ControlReply,
    HealthRequest,
    ModalityRequest,
    SubmodelRequest,
)
from nestd.daemon.mqtt.packets import Received
from nestd.daemon.mqtt.parse import (
    Envelope,
    ParseLimits,
    read_control,
    read_envelope,
    transaction_of,
)
from nestd.daemon.mqtt.topics import Topics, Verb
from nestd.daemon.replies import Replies
from nestd.daemon.requests import ReplyTo, RequestBook, RequestRecord

log = logging.getLogger(__name__)

# How long a cancel is remembered whose request has not come in yet.
EARLY_CANCEL_SECONDS = 300.0


class Control:
    """Carries out control requests and replies to each."""

    def __init__(
        self,
        topics: Topics,
        limits: ParseLimits,
        book: RequestBook,
        dispatch: Dispatch,
        replies: Replies,
        governor: Governor,
        health: Callable[[], dict[str, Any]],
    ) -> None:
        self._topics = topics
        self._limits = limits
        self._book = book
        self._dispatch = dispatch
        self._replies = replies
        self._governor = governor
        self._health = health

    def take(self, received: Received, verb: Verb, now: float) -> None:
        """Carry out one control request."""
        envelope = read_envelope(received, verb, self._topics, self._limits)
        transaction = transaction_of(envelope)
        try:
            data = self._carry_out(verb, envelope, now)
            reply = ControlReply(transaction=transaction, ok=True, data=data)
        except RequestError as error:
            log.info("control request %s fails with %s: %s", verb, error.code, error)
            reply = ControlReply(
                transaction=transaction,
                ok=False,
                error=ControlError(code=error.code, status=error.status, message=str(error)),
            )
        reply_to = ReplyTo(envelope.response_topic, envelope.correlation_data)
        self._replies.control(reply, reply_to)

    def _carry_out(self, verb: Verb, envelope: Envelope, now: float) -> dict[str, Any]:
        if verb == "cancel":
            return self._cancel(read_control(CancelRequest, envelope), now)
        if verb == "submodel":
            return self._submodel(read_control(SubmodelRequest, envelope))
        if verb == "modality":
            return self._modality(read_control(ModalityRequest, envelope))
        read_control(HealthRequest, envelope)
        return self._health()

    def _cancel(self, wanted: CancelRequest, now: float) -> dict[str, Any]:
        record = self._the_one(wanted.id, wanted.client)
        if record is None and self._book.has_ended(wanted.id, wanted.client):
            return {"id": wanted.id, "was": "ended"}
        if record is None:
            # It may have overtaken its request, which may still be at the broker.
            self._book.cancel_early(wanted.client, wanted.id, now + EARLY_CANCEL_SECONDS)
            return {"id": wanted.id, "was": "unknown"}
        was = record.state
        self._dispatch.cancel(record)
        return {"id": wanted.id, "was": was}

    def _submodel(self, wanted: SubmodelRequest) -> dict[str, Any]:
        choice: Choice[str] | Choice[str | None]
        if wanted.id is None:
            choice = self._governor.prefer(wanted.submodel)
        else:
            record = self._the_one(wanted.id, wanted.client)
            if record is None or record not in self._book.running:
                raise BadRequest(f"no request with the id {wanted.id!r} runs on this board now")
            choice = self._governor.prefer_for(record, wanted.submodel)
        return {"submodel": choice.value, "reason": choice.reason}

    def _modality(self, wanted: ModalityRequest) -> dict[str, Any]:
        if wanted.modality == "all" or wanted.enabled is None:
            choice = self._governor.unload(wanted.modality)
        else:
            choice = self._governor.set_modality(wanted.modality, wanted.enabled)
        said = wanted.model_dump(include={"modality", "enabled", "unload"}, exclude_defaults=True)
        return said | {"planned": choice.value, "reason": choice.reason}

    def _the_one(self, request_id: str, client: str | None) -> RequestRecord | None:
        found = self._book.open_with_id(request_id, client)
        if len(found) > 1:
            raise BadRequest(
                f"{len(found)} clients have a request with the id {request_id!r}: name one with "
                "`client`"
            )
        return found[0] if found else None
