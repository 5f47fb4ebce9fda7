"""The JSON schemas of all messages that have a topic; `info` publishes them."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from nestd.daemon.mqtt.contract import (
    Accepted,
    BlobFin,
    BlobInit,
    CancelRequest,
    ControlReply,
    Delta,
    Done,
    Error,
    HealthRequest,
    ModalityRequest,
    Request,
    SubmodelRequest,
)
from nestd.daemon.mqtt.node_contract import Availability, Health, Info, State

PUBLIC: tuple[type[BaseModel], ...] = (
    Request, Accepted, Delta, Done, Error,
    CancelRequest, SubmodelRequest, ModalityRequest, HealthRequest, BlobInit, BlobFin, ControlReply,
    Availability, State, Health, Info,
)  # fmt: skip


def schemas() -> dict[str, Any]:
    """Return the JSON schema of every message, by the model's name."""
    return {model.__name__: model.model_json_schema() for model in PUBLIC}
