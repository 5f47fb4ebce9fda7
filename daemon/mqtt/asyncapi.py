"""The MQTT contract as an AsyncAPI 3.0 document, made from its models and topics.

docs/asyncapi.yaml is `nestd schema`'s output. What a schema cannot say (who acknowledges when, what
may be sent again) is in docs/mqtt.md.

Source: https://www.asyncapi.com/docs/reference/specification/v3.0.0 and the MQTT bindings 0.2.0.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from nestd.daemon.mqtt import contract
from nestd.daemon.mqtt.node_contract import Availability, Health, Info, State
from nestd.daemon.mqtt.parse import JSON_TYPE
from nestd.daemon.mqtt.topics import CLIENTS, VERSION

NODE, PREFIX = "{node}", "{prefix}"
SCHEMAS = "#/components/schemas"
_PARAMETERS = {
    "prefix": {"description": "First levels of every topic.", "default": "nestd"},
    "node": {"description": "Name of the node, its host name by default."},
    "pool": {"description": "A group of nodes, any of which answers (setting `mqtt.pools`)."},
    "client": {"description": "The client's own id."},
    "reply": {"description": "Chosen by the client; several levels are allowed."},
    "id": {"description": "Id of the blob."},
    "offset": {"description": "First byte of the chunk, decimal."},
}

Reply = Literal["events", "control"]


@dataclass(frozen=True, slots=True)
class Channel:
    """One topic as this document tells it.

    Attributes:
        action: the node's side: it sends or receives.
        models: the messages that are JSON.
        raw: a medium's own bytes, too.
        reply: what answers, for requests.
    """

    address: str
    action: Literal["send", "receive"]
    models: tuple[type[BaseModel], ...]
    qos: int
    retain: bool = False
    reply: Reply | None = None
    raw: bool = False


EVENTS = (contract.Accepted, contract.Delta, contract.Done, contract.Error)


def channels() -> dict[str, Channel]:
    """Return every topic of a node."""
    base = f"{PREFIX}/{VERSION}/{NODE}"
    clients = f"{CLIENTS}/{{client}}/{{reply}}"

    def generate(address: str) -> Channel:
        return Channel(address, "receive", (contract.Request,), 1, reply="events", raw=True)

    def request(verb: str, model: type[BaseModel]) -> Channel:
        address = f"{base}/request/{verb}"
        return Channel(address, "receive", (model,), 0, reply="control")

    return {
        "generate": generate(f"{base}/request/generate"),
        "generate_in_pool": generate(f"{PREFIX}/{VERSION}/pool/{{pool}}/request/generate"),
        "cancel": request("cancel", contract.CancelRequest),
        "submodel": request("submodel", contract.SubmodelRequest),
        "modality": request("modality", contract.ModalityRequest),
        "health_request": request("health", contract.HealthRequest),
        "blob_init": Channel(
            f"{base}/blob/{{id}}/init", "receive", (contract.BlobInit,), 1, reply="control"
        ),
        "blob_chunk": Channel(f"{base}/blob/{{id}}/{{offset}}", "receive", (), 1, raw=True),
        "blob_fin": Channel(
            f"{base}/blob/{{id}}/fin", "receive", (contract.BlobFin,), 1, reply="control"
        ),
        "events": Channel(clients, "send", EVENTS, 1),
        "control": Channel(clients, "send", (contract.ControlReply,), 1),
        "availability": Channel(f"{base}/availability", "send", (Availability,), 1, True),
        "state": Channel(f"{base}/state", "send", (State,), 1, True),
        "info": Channel(f"{base}/info", "send", (Info,), 1, True),
        "health": Channel(f"{base}/health", "send", (Health,), 0),
    }


def document() -> dict[str, Any]:
    """Return the document."""
    table = channels()
    models = dict.fromkeys(model for channel in table.values() for model in channel.models)
    _, schemas = models_json_schema(
        [(model, "validation") for model in models], ref_template=f"{SCHEMAS}/{{model}}"
    )
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "nestd",
            "version": VERSION,
            "description": (
                "How to ask a nestd node over MQTT. Made by `nestd schema` of nestd "
                f"{version('nestd')}; docs/mqtt.md tells what can be relied on."
            ),
            "license": {"name": "Apache-2.0"},
        },
        "defaultContentType": JSON_TYPE,
        "servers": {
            "broker": {
                "host": "localhost:1883",
                "protocol": "mqtt",
                "protocolVersion": "5.0",
                "description": "Your broker; a node and its clients may also speak 3.1.1.",
            }
        },
        "channels": {name: _channel(channel) for name, channel in table.items()},
        "operations": {name: _operation(name, channel) for name, channel in table.items()},
        "components": {
            "messages": {
                "bytes": {"contentType": "application/octet-stream", "payload": {"type": "string"}},
                **{model.__name__: _message(model) for model in models},
            },
            "schemas": _without_discriminators(schemas["$defs"]),
        },
    }


def _channel(channel: Channel) -> dict[str, Any]:
    names = [part[1:-1] for part in channel.address.split("/") if part.startswith("{")]
    return {
        "address": channel.address,
        "parameters": {name: _PARAMETERS[name] for name in names},
        "messages": {name: {"$ref": f"#/components/messages/{name}"} for name in _names(channel)},
    }


def _operation(name: str, channel: Channel) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "action": channel.action,
        "channel": {"$ref": f"#/channels/{name}"},
        "bindings": {"mqtt": {"qos": channel.qos, "retain": channel.retain}},
    }
    if channel.reply is not None:
        operation["reply"] = {
            "address": {
                "description": "The request's Response Topic (MQTT 5), or its `reply_to`.",
                "location": "$message.payload#/reply_to",
            },
            "channel": {"$ref": f"#/channels/{channel.reply}"},
        }
    return operation


def _names(channel: Channel) -> list[str]:
    return [model.__name__ for model in channel.models] + ["bytes"] * channel.raw


def _message(model: type[BaseModel]) -> dict[str, Any]:
    return {
        "contentType": JSON_TYPE,
        "summary": (model.__doc__ or "").strip().splitlines()[0],
        "payload": {"$ref": f"{SCHEMAS}/{model.__name__}"},
    }


def _without_discriminators(schema: Any) -> Any:  # noqa: ANN401  (JSON)
    """Leave out what is OpenAPI's: AsyncAPI's `discriminator` has another form."""
    if isinstance(schema, dict):
        return {
            key: _without_discriminators(value)
            for key, value in schema.items()
            if not (key == "discriminator" and "propertyName" in value)
        }
    if isinstance(schema, list):
        return [_without_discriminators(item) for item in schema]
    return schema
