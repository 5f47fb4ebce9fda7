"""docs/reference/messages.md: every topic and every message, from the contract's models."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from schema_words import default_words, words

from nestd.daemon.mqtt.asyncapi import Channel, channels

HEAD = """\
# Messages

Every topic of a node and every JSON message on it, made from the models that the daemon checks
messages with. [MQTT](../mqtt.md) tells what they are for and what can be relied on;
[asyncapi.yaml](../asyncapi.yaml) has the same for programs.

An unknown key is an error. `{prefix}` is `nestd` unless `mqtt.prefix` says otherwise.

## Topics

"In" is from a client to the node, "out" from the node to clients.
"""


def page() -> str:
    """Return the page."""
    table = channels()
    models = dict.fromkeys(model for channel in table.values() for model in channel.models)
    _, schema = models_json_schema([(model, "validation") for model in models])
    lines = [
        HEAD,
        "| topic | direction | QoS | retained | messages | answered by |",
        "|---|---|---|---|---|---|",
        *(_row(channel) for channel in table.values()),
        "",
        "## Models",
        "",
    ]
    for name, model in sorted(schema["$defs"].items()):
        lines += [*_model(name, model), ""]
    return "\n".join(lines)


def _row(channel: Channel) -> str:
    direction = "in" if channel.action == "receive" else "out"
    names = [_link(model) for model in channel.models] + ["a medium's bytes"] * channel.raw
    reply = {"events": "events", "control": "[ControlReply](#controlreply)", None: ""}
    # Without deltas, the only events of a lower quality.
    cells = [f"`{channel.address}`", direction, str(channel.qos), "yes" if channel.retain else "no"]
    return f"| {' | '.join([*cells, ', '.join(names), reply[channel.reply]])} |"


def _link(model: type[BaseModel]) -> str:
    return f"[{model.__name__}](#{model.__name__.lower()})"


def _model(name: str, schema: dict[str, Any]) -> Iterator[str]:
    yield f"### {name}"
    yield ""
    yield inspect.cleandoc(schema.get("description", ""))
    yield ""
    yield "| key | value | default |"
    yield "|---|---|---|"
    required = set(schema.get("required", ()))
    for key, value in schema.get("properties", {}).items():
        default = default_words(value["default"]) if "default" in value else "optional"
        default = "required" if key in required else default
        yield f"| `{key}` | {words(value)} | {default} |"
