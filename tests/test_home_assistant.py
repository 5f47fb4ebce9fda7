"""Home Assistant gets one device with working entities, and is rid of it when that is switched off.

HASS is what Home Assistant 2026.2 accepts (home-assistant/core, homeassistant/components/mqtt:
abbreviations.py, schemas.py, and the platforms' DISCOVERY_SCHEMA), as far as nestd uses it.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import jinja2
import pytest
from support.clients import daemon, listening
from support.engine import small_manifest
from support.mosquitto import Mosquitto
from support.node import Node

from nestd.daemon.elastic.memory import Memory
from nestd.daemon.elastic.power import Power
from nestd.daemon.elastic.thermal import Thermal
from nestd.daemon.engine.messages import KeepEncoders
from nestd.daemon.home_assistant import device_id, discovery
from nestd.daemon.mqtt.contract import ModalityRequest
from nestd.daemon.mqtt.topics import Topics

CONFIG = "homeassistant/device/node/config"
STATUS = "homeassistant/status"
# Abbreviation -> allowed values (None: any) of each platform; then the keys that must be there.
COMMON = {"p", "name", "uniq_id", "ic", "ent_cat", "json_attr_t", "json_attr_tpl", "val_tpl"}
HASS: dict[str, tuple[set[str], set[str]]] = {
    "sensor": (
        COMMON | {"stat_t", "dev_cla", "unit_of_meas", "stat_cla", "sug_dsp_prc", "ops"},
        {"uniq_id", "stat_t"},
    ),
    "binary_sensor": (COMMON | {"stat_t", "dev_cla"}, {"uniq_id", "stat_t"}),
    "select": (COMMON | {"stat_t", "cmd_t", "cmd_tpl", "ops"}, {"uniq_id", "cmd_t", "ops"}),
    "button": (COMMON - {"val_tpl"} | {"cmd_t", "pl_prs"}, {"uniq_id", "cmd_t"}),
    "switch": (COMMON | {"stat_t", "cmd_t", "cmd_tpl"}, {"uniq_id", "cmd_t"}),
}
# Device class -> the unit that it goes with.
UNITS = {"temperature": "°C", "power": "W", "battery": "%", "data_size": "MiB"}

TEMPLATES = jinja2.Environment(autoescape=False)
TEMPLATES.filters["to_json"] = json.dumps


def render(template: str, **names: Any) -> str:
    """Render as Home Assistant does: to text."""
    return TEMPLATES.from_string(template).render(**names)


def node(**overrides: Any) -> Node:
    return Node(**{"home_assistant__enabled": True} | overrides)


def config(node: Node) -> dict[str, Any]:
    message = [m for m in node.transport.published if m.topic == CONFIG][-1]
    assert message.retain
    assert message.qos == 1
    document: dict[str, Any] = json.loads(message.payload)
    return document


def shown(node: Node, name: str) -> str:
    """Return what Home Assistant shows for an entity after the node's last messages."""
    entity = config(node)["cmps"][name]
    return render(entity["val_tpl"], value_json=node.last(entity["stat_t"]))


def a_telling_board(node: Node) -> None:
    node.board.facts = replace(
        node.board.facts,
        memory=Memory(available_bytes=3 * 2**30, pressure_some_percent=0.5),
        thermal=Thermal(celsius=61.25),
        power=Power(under_voltage=False, throttled=True, watts=7.5, watts_scope="board"),
    )


def test_the_message_is_what_home_assistant_accepts() -> None:
    item = node()
    a_telling_board(item)
    item.start()
    item.pass_time(1.1)
    document = config(item)
    assert set(document) == {"dev", "o", "avty_t", "avty_tpl", "qos", "cmps"}
    assert document["dev"]["ids"] == ["nestd_node"]
    assert document["o"]["name"] == "nestd"
    for entity in document["cmps"].values():
        allowed, required = HASS[entity["p"]]
        assert required <= set(entity) <= allowed
        unit = UNITS.get(entity.get("dev_cla", ""))
        assert entity.get("unit_of_meas") == unit or unit is None
        for key in ("val_tpl", "cmd_tpl", "json_attr_tpl"):
            TEMPLATES.from_string(entity.get(key, ""))
    ids = [entity["uniq_id"] for entity in document["cmps"].values()]
    assert len(set(ids)) == len(ids)


def test_it_says_nothing_to_home_assistant_unless_told_to() -> None:
    item = Node().start()
    assert not [m for m in item.transport.published if m.topic.startswith("homeassistant/")]


def test_entities_show_what_the_node_says() -> None:
    item = node(health_interval_s=5)
    a_telling_board(item)
    item.start()
    item.ask()
    item.engine.stats()
    item.settle()
    item.pass_time(6)
    assert shown(item, "submodel") == "small"  # it is throttled
    assert shown(item, "phase") == "ready"
    assert shown(item, "queue") == "0"
    assert shown(item, "speed") == "20.0"
    assert shown(item, "memory_available") == "3072.0"
    assert shown(item, "memory_pressure") == "OFF"
    assert shown(item, "temperature") == "61.25"
    assert shown(item, "watts") == "7.5"
    assert shown(item, "under_voltage") == "OFF"
    assert shown(item, "throttled") == "ON"
    entity = config(item)["cmps"]["submodel"]
    attributes = render(entity["json_attr_tpl"], value_json=item.state())
    assert json.loads(attributes)["reason"] == item.state()["submodel_reason"]


def test_memory_pressure_that_shrinks_the_plan_is_a_problem() -> None:
    item = node(health_interval_s=5, elastic__memory__pressure_percent=10)
    a_telling_board(item)
    item.board.facts = replace(item.board.facts, memory=Memory(pressure_some_percent=10.0))
    item.start().pass_time(6)
    assert shown(item, "memory_pressure") == "ON"


def test_availability_follows_birth_and_will() -> None:
    item = node().start()
    document = config(item)
    availability = item.last(document["avty_t"])
    assert render(document["avty_tpl"], value_json=availability) == "online"
    assert item.transport.will is not None
    assert item.transport.will.topic == document["avty_t"]


def test_what_a_board_cannot_tell_is_no_entity_until_it_can() -> None:
    item = node().start()
    boards = {"temperature", "watts", "joules_per_token", "battery", "under_voltage", "throttled"}
    assert not boards & set(config(item)["cmps"])
    a_telling_board(item)
    item.pass_time(1.1)
    assert boards - {"battery"} <= set(config(item)["cmps"])
    item.board.facts = replace(item.board.facts, power=Power())
    item.pass_time(1.1)
    assert "watts" in config(item)["cmps"], "a sensor that fails for a while does not vanish"


def test_a_figure_that_is_not_known_yet_is_unknown() -> None:
    item = node().start()
    # Home Assistant's MQTT sensors take `None` for unknown.
    assert shown(item, "speed") == "None"
    assert shown(item, "engine_memory") == "None"


def test_the_select_sets_the_submodel_and_shows_what_was_set() -> None:
    item = node().start()
    select = config(item)["cmps"]["wanted"]
    assert select["ops"] == ["auto", "small", "half", "full"]
    assert shown(item, "wanted") == "auto"
    item.transport.deliver(select["cmd_t"], render(select["cmd_tpl"], value="half").encode(), qos=0)
    item.settle()
    assert shown(item, "wanted") == "half"
    assert shown(item, "submodel") == "half"


def test_a_text_bundle_has_neither_switches_nor_a_button() -> None:
    item = node().start()
    assert not {"switch", "button"} & {entity["p"] for entity in config(item)["cmps"].values()}


def test_the_button_unloads_encoders_that_are_idle() -> None:
    item = node(encoders=True).start()
    button = config(item)["cmps"]["unload"]
    allowed, required = HASS["button"]
    assert required <= set(button) <= allowed
    item.control("modality", modality="vision", enabled=True)
    item.transport.deliver(button["cmd_t"], button["pl_prs"].encode(), qos=0)
    item.settle()
    assert item.engine.keeps[-1] == KeepEncoders(keep=())


def test_each_encoder_of_the_bundle_has_a_switch() -> None:
    manifest = small_manifest().model_copy(update={"modalities": ("text", "vision", "audio")})
    topics = Topics("nestd", "node")
    entities = discovery(topics, manifest, frozenset(), pressure_percent=10)["cmps"]
    switches = {name: entity for name, entity in entities.items() if entity["p"] == "switch"}
    assert set(switches) == {"vision", "audio"}
    vision = switches["vision"]
    allowed, required = HASS["switch"]
    assert required <= set(vision) <= allowed
    assert render(vision["val_tpl"], value_json={"modalities_off": ["audio"]}) == "ON"
    assert render(vision["val_tpl"], value_json={"modalities_off": ["vision"]}) == "OFF"
    loaded = entities["encoders"]["val_tpl"]
    assert render(loaded, value_json={"modalities": ["text", "audio"]}) == "audio"
    assert render(loaded, value_json={"modalities": ["text"]}) == "none"
    assert vision["cmd_t"] == topics.request("modality")
    wanted = ModalityRequest.model_validate_json(render(vision["cmd_tpl"], value="ON"))
    assert (wanted.modality, wanted.enabled) == ("vision", True)
    wanted = ModalityRequest.model_validate_json(render(vision["cmd_tpl"], value="OFF"))
    assert not wanted.enabled


def test_it_is_repeated_when_home_assistant_has_started() -> None:
    item = node().start()
    count = sum(m.topic == CONFIG for m in item.transport.published)
    item.transport.deliver(STATUS, b"offline", qos=0)
    item.settle()
    assert sum(m.topic == CONFIG for m in item.transport.published) == count
    item.transport.deliver(STATUS, b"online", qos=0)
    item.settle()
    assert sum(m.topic == CONFIG for m in item.transport.published) == count + 1


def test_it_is_repeated_on_a_new_connection() -> None:
    item = node().start()
    item.transport.disconnect()
    item.transport.connect()
    item.settle()
    assert sum(m.topic == CONFIG for m in item.transport.published) == 2


def test_switched_off_it_takes_back_its_own_message_and_no_others() -> None:
    item = Node().start()
    item.transport.deliver(CONFIG, {"o": {"name": "something else"}}, qos=0, retain=True)
    item.transport.deliver(CONFIG, b"not JSON", qos=0, retain=True)
    item.settle()
    assert not [m for m in item.transport.published if m.topic == CONFIG]
    item.transport.deliver(CONFIG, {"o": {"name": "nestd"}}, qos=0, retain=True)
    item.settle()
    (message,) = [m for m in item.transport.published if m.topic == CONFIG]
    assert message.payload == b""
    assert message.retain


def test_names_that_home_assistant_does_not_take_are_changed_and_stay_different() -> None:
    assert device_id("kitchen-2") == "kitchen-2"
    names = {device_id("küche.lan"), device_id("küche lan"), device_id("k_che_lan")}
    assert len(names) == 3
    assert all(name.isascii() and "." not in name for name in names)


@pytest.mark.broker
def test_over_a_broker_it_is_retained_repeated_obeyed_and_taken_back(mosquitto: Mosquitto) -> None:
    with (
        daemon(mosquitto, "node", "home_assistant.enabled=true"),
        listening(mosquitto, CONFIG, "nestd/v1/node/state") as hass,
    ):
        first = hass.until(lambda document: "cmps" in document)
        hass.publish(STATUS, b"online")
        assert hass.until(lambda document: "cmps" in document) == first
        select = first["cmps"]["wanted"]
        hass.publish(select["cmd_t"], render(select["cmd_tpl"], value="small").encode())
        state = hass.until(lambda document: document.get("submodel") == "small")
        assert render(select["val_tpl"], value_json=state) == "small"
    with listening(mosquitto, CONFIG) as hass, daemon(mosquitto, "node"):
        assert json.loads(hass.received.get(timeout=10).payload) == first
        assert hass.received.get(timeout=10).payload == b""
    with listening(mosquitto, CONFIG) as hass:
        assert hass.nothing_more(0.5)
