"""Home Assistant finds the node by itself (docs/home-assistant.md).

One retained message, `<prefix>/device/<id>/config`, describes the node as a device with all of its
entities: Home Assistant's device-based discovery, there since its release 2024.11. What entities
show and send are the topics of docs/mqtt.md, read and written by templates: nothing here is a
second contract. An entity for a fact that this board has never told is left out.

The message is repeated when Home Assistant says `online`, and taken back (an empty retained
message) when the setting is switched off again, which a node notices on its next connect.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from importlib.metadata import version
from typing import Any, get_args

from nestd.bundle.manifest import Manifest
from nestd.daemon.elastic.resources import Snapshot
from nestd.daemon.mqtt.node_contract import Phase
from nestd.daemon.mqtt.packets import Message, Received, Subscription, Transport
from nestd.daemon.mqtt.topics import Topics
from nestd.daemon.settings import HomeAssistantSettings

log = logging.getLogger(__name__)

ORIGIN = "nestd"
MIB = 1048576
_ICONS = {"vision": "mdi:eye", "audio": "mdi:ear-hearing"}

Entities = dict[str, dict[str, Any]]


class HomeAssistant:
    """Publishes the discovery message, or takes it back."""

    def __init__(
        self,
        settings: HomeAssistantSettings,
        topics: Topics,
        manifest: Manifest,
        pressure_percent: float,
        transport: Transport,
    ) -> None:
        """`pressure_percent` is the memory pressure from which the plan shrinks."""
        self._enabled = settings.enabled
        self._status_topic = settings.status_topic
        self._topics = topics
        self._manifest = manifest
        self._pressure_percent = pressure_percent
        self._transport = transport
        self.config_topic = f"{settings.prefix}/device/{device_id(topics.node)}/config"
        self._told: frozenset[str] = frozenset()
        self._published: frozenset[str] | None = None

    def subscriptions(self) -> list[Subscription]:
        """Return what to listen to: Home Assistant's birth, or our own message of earlier days."""
        return [Subscription(self._status_topic if self._enabled else self.config_topic, 0)]

    def connected(self) -> None:
        """The broker is a new one, for all we know."""
        self._published = None

    def hear(self, received: Received) -> None:
        """React to a message on a topic of `subscriptions`."""
        if self._enabled and received.topic == self._status_topic:
            if received.payload == b"online":
                self._published = None
        elif not self._enabled and _is_ours(received.payload):
            log.info("taking back %s: home_assistant.enabled is false", self.config_topic)
            self._transport.publish(Message(self.config_topic, b"", retain=True))

    def tick(self, snapshot: Snapshot) -> None:
        """Publish the message if it has not been, or if the board tells more than it did."""
        if not self._enabled:
            return
        self._told |= told(snapshot)
        if self._told == self._published:
            return
        config = discovery(self._topics, self._manifest, self._told, self._pressure_percent)
        message = Message(self.config_topic, json.dumps(config).encode(), retain=True)
        if self._transport.publish(message) is not None:
            self._published = self._told


def _is_ours(payload: bytes) -> bool:
    try:
        document = json.loads(payload)
    except ValueError:
        return False
    origin = document.get("o") if isinstance(document, dict) else None
    return isinstance(origin, dict) and origin.get("name") == ORIGIN


def device_id(node: str) -> str:
    """Return the node's name in what Home Assistant allows: letters, digits, `_` and `-`.

    A name that had to be changed gets a digest, for another may change to the same.
    """
    plain = re.sub(r"[^a-zA-Z0-9_-]", "_", node)
    if plain == node:
        return node
    return f"{plain}_{hashlib.sha256(node.encode()).hexdigest()[:8]}"


def told(snapshot: Snapshot) -> frozenset[str]:
    """Return the entities whose facts this board can tell, of those that not every board can."""
    power = snapshot.power
    facts = {
        "memory_available": snapshot.memory.free_bytes,
        "memory_pressure": snapshot.memory.pressure_some_percent,
        "temperature": snapshot.thermal.celsius,
        "battery": power.battery_percent,
        "under_voltage": power.under_voltage,
        "throttled": power.throttled,
        # The scope is known from the start; some sources need two samples for watts.
        "watts": power.watts_scope,
        "joules_per_token": power.watts_scope,
    }
    return frozenset(name for name, fact in facts.items() if fact is not None)


def discovery(
    topics: Topics, manifest: Manifest, told: frozenset[str], pressure_percent: float
) -> dict[str, Any]:
    """Return the discovery message; the abbreviated keys are Home Assistant's own.

    Source: home-assistant/core, homeassistant/components/mqtt (abbreviations.py, schemas.py).
    """
    device = device_id(topics.node)
    optional = _board_entities(topics, pressure_percent)
    entities = {
        **_engine_entities(topics),
        **{name: entity for name, entity in optional.items() if name in told},
        **_controls(topics, manifest),
    }
    nestd = version("nestd")
    return {
        "dev": {
            "ids": [f"{ORIGIN}_{device}"],
            "name": f"nestd {topics.node}",
            "mf": ORIGIN,
            "mdl": manifest.name,
            "sw": nestd,
        },
        "o": {"name": ORIGIN, "sw": nestd},
        "avty_t": topics.availability,
        "avty_tpl": "{{ value_json.state }}",
        "qos": 1,
        "cmps": {
            name: {"uniq_id": f"{ORIGIN}_{device}_{name}", **entity}
            for name, entity in entities.items()
        },
    }


def _engine_entities(topics: Topics) -> Entities:
    reasons = {
        "reason": "submodel_reason",
        "largest": "largest",
        "largest_reason": "largest_reason",
        "power": "power_reason",
        "memory": "memory_reason",
    }
    attributes = ", ".join(f"'{name}': value_json.{key}" for name, key in reasons.items())
    return {
        "submodel": {
            **_sensor("Sub-model", topics.state, "submodel", icon="mdi:layers-triple"),
            "json_attr_t": topics.state,
            "json_attr_tpl": f"{{{{ {{{attributes}}} | to_json }}}}",
        },
        "phase": {
            **_sensor("Phase", topics.state, "phase", icon="mdi:state-machine"),
            "dev_cla": "enum",
            "ops": list(get_args(Phase)),
            "ent_cat": "diagnostic",
        },
        "queue": _measure("Queue", topics.state, "queue.waiting", "requests", icon="mdi:tray-full"),
        "speed": _measure(
            "Speed",
            topics.health,
            "decode_tokens_per_second",
            "tokens/s",
            icon="mdi:speedometer",
            digits=1,
        ),
        "engine_memory": _mebibytes("Engine memory", topics.health, "engine_rss_bytes"),
    }


def _board_entities(topics: Topics, pressure_percent: float) -> Entities:
    health = topics.health
    pressure = "value_json.memory_pressure_percent"
    return {
        "memory_available": _mebibytes("Memory available", health, "memory_available_bytes"),
        "memory_pressure": _problem(
            "Memory pressure", health, pressure, f"{pressure} >= {pressure_percent}"
        ),
        "temperature": _measure(
            "Temperature", health, "temperature_celsius", "°C", "temperature", digits=1
        ),
        "battery": _measure("Battery", health, "battery_percent", "%", "battery", digits=0),
        "under_voltage": _problem("Under-voltage", health, "value_json.under_voltage"),
        "throttled": _problem("Throttled", health, "value_json.throttled"),
        "watts": _measure("Power", health, "watts", "W", "power", digits=1),
        "joules_per_token": _measure(
            "Energy per token", health, "joules_per_token", "J/token", icon="mdi:leaf", digits=2
        ),
    }


def _controls(topics: Topics, manifest: Manifest) -> Entities:
    controls: Entities = {
        "wanted": {
            "p": "select",
            "name": "Wanted sub-model",
            "ic": "mdi:layers-edit",
            "stat_t": topics.state,
            "val_tpl": "{{ value_json.submodel_wanted }}",
            "cmd_t": topics.request("submodel"),
            "cmd_tpl": "{{ {'submodel': value} | to_json }}",
            "ops": ["auto", *(item.name for item in manifest.submodels)],
        }
    }
    if manifest.modalities != ("text",):
        encoders = "modalities | reject('eq', 'text') | join(', ') or 'none'"
        controls["encoders"] = _sensor("Loaded encoders", topics.state, encoders, "mdi:import")
        controls["unload"] = {
            "p": "button",
            "name": "Unload encoders",
            "ic": "mdi:export",
            "cmd_t": topics.request("modality"),
            "pl_prs": json.dumps({"modality": "all", "unload": True}),
        }
    for modality in manifest.modalities:
        if modality != "text":
            is_off = f"'{modality}' in value_json.modalities_off"
            command = f"{{{{ {{'modality': '{modality}', 'enabled': value == 'ON'}} | to_json }}}}"
            controls[modality] = {
                "p": "switch",
                "name": modality.capitalize(),
                "ic": _ICONS[modality],
                "stat_t": topics.state,
                "val_tpl": f"{{{{ 'OFF' if {is_off} else 'ON' }}}}",
                "cmd_t": topics.request("modality"),
                "cmd_tpl": command,
            }
    return controls


# Null renders as `None`, which Home Assistant's MQTT sensors show as unknown.


def _sensor(name: str, topic: str, key: str, icon: str) -> dict[str, Any]:
    value = f"{{{{ value_json.{key} }}}}"
    return {"p": "sensor", "name": name, "ic": icon, "stat_t": topic, "val_tpl": value}


def _measure(
    name: str,
    topic: str,
    key: str,
    unit: str,
    device_class: str | None = None,
    icon: str | None = None,
    digits: int = 0,
) -> dict[str, Any]:
    """Return a sensor with a unit; it is drawn by its device class or by `icon`."""
    drawn = {"ic": icon} if device_class is None else {"dev_cla": device_class}
    return {
        "p": "sensor",
        "name": name,
        **drawn,
        "stat_t": topic,
        "val_tpl": f"{{{{ value_json.{key} }}}}",
        "unit_of_meas": unit,
        "stat_cla": "measurement",
        "sug_dsp_prc": digits,
    }


def _mebibytes(name: str, topic: str, key: str) -> dict[str, Any]:
    value = f"value_json.{key}"
    return {
        **_measure(name, topic, key, "MiB", "data_size"),
        "val_tpl": f"{{{{ none if {value} is none else {value} / {MIB} }}}}",
        "ent_cat": "diagnostic",
    }


def _problem(name: str, topic: str, value: str, condition: str | None = None) -> dict[str, Any]:
    """Return a binary sensor that is on while there is a problem."""
    state = f"none if {value} is none else 'ON' if {condition or value} else 'OFF'"
    return {
        "p": "binary_sensor",
        "name": name,
        "dev_cla": "problem",
        "stat_t": topic,
        "val_tpl": f"{{{{ {state} }}}}",
        "ent_cat": "diagnostic",
    }
