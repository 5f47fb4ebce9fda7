"""`nestd watch`: what a frame says, and a whole run against real nodes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.mosquitto import Mosquitto

from nestd.bundle.errors import BrokerError
from nestd.cli.frame import BAR, NodeView, frame, paint
from nestd.cli.watch import Watcher
from nestd.daemon.mqtt.memory import MemoryTransport
from nestd.daemon.mqtt.packets import TransportEvent

GIB = 2**30
STATE: dict[str, Any] = {
    "phase": "ready",
    "phase_reason": None,
    "submodel": "E2B",
    "submodel_reason": "the request asks for low effort",
    "largest": "E2.69B",
    "largest_reason": "no more fits in the memory that is free",
    "context_length": 4096,
    "queue": {"running": 1, "waiting": 3, "limit": 16},
    "power_reason": "the battery is below 50 %",
    "memory_reason": "no more fits in the memory that is free",
}
INFO = {
    "bundle": "gemma-3n-e4b",
    "submodels": [
        {"name": "E2B", "effective_params": 1, "rung": True},
        {"name": "E2.43B", "effective_params": 2, "rung": False},
        {"name": "E2.69B", "effective_params": 3, "rung": True},
        {"name": "E3.59B", "effective_params": 4, "rung": True},
    ],
}
HEALTH = {
    "uptime_seconds": 93784.0,
    "rss_bytes": 60 * 2**20,
    "engine_rss_bytes": 2 * GIB,
    "memory_available_bytes": 2 * GIB,
    "memory_total_bytes": 8 * GIB,
    "memory_pressure_percent": 1.5,
    "temperature_celsius": 62.0,
    "throttle_celsius": 82.0,
    "watts": 6.25,
    "watts_scope": "module",
    "joules_per_token": 1.234,
    "volts": 5.1,
    "battery_percent": None,
    "under_voltage": True,
    "decode_tokens_per_second": 19.6,
    "prefill_tokens_per_second": 145.2,
}


def view(name: str = "kitchen", **changes: Any) -> NodeView:
    whole: dict[str, Any] = {"availability": "online", "state": STATE, "info": INFO}
    return NodeView(name, **(whole | {"health": HEALTH} | changes))


def words(node: NodeView, width: int = 200) -> list[str]:
    return [" ".join(line.split()) for line in frame([node], width, 50, color=False)]


def test_a_frame_tells_everything_about_a_node() -> None:
    memory, heat = ("█" * full + "░" * (BAR - full) for full in (BAR * 3 // 4, 15))
    used = "2.00 GB of 8.00 GB available pressure 1.5 % daemon 60 MB engine 2.00 GB"
    power = "62 of 82 °C 6.2 W (module) 1.23 J/token 5.10 V under-voltage"
    assert words(view()) == [
        "kitchen ready gemma-3n-e4b up 1 d 2:03:04",
        f"memory {memory} {used}",
        f"heat, power {heat} {power}",
        "ladder [E2B] E2.69B | E3.59B",
        "runs E2B the request asks for low effort",
        "largest E2.69B no more fits in the memory that is free",
        "held by power: the battery is below 50 %",
        "queue 1 running, 3 waiting (of 16) 19.6 tokens/s, prompts 145 context 4096",
    ]


def test_what_a_board_cannot_tell_is_a_dash() -> None:
    lines = words(view(health=dict.fromkeys(HEALTH)))
    assert "memory - available pressure - %" in lines
    assert "heat, power - °C - W - J/token" in lines


def test_a_sub_model_in_use_is_on_the_ladder_though_no_rung() -> None:
    assert "ladder E2B [E2.43B] E2.69B | E3.59B" in words(
        view(state=STATE | {"submodel": "E2.43B"})
    )


def test_offline_silent_and_refusing_nodes_are_marked() -> None:
    assert words(view(availability="offline")) == ["kitchen offline gemma-3n-e4b"]
    assert "no answer for 9 s" in words(view(silent_s=9.0))[0]
    refusing = STATE | {"phase": "degraded", "phase_reason": "the battery is below 5 %"}
    lines = words(view(state=refusing | {"submodel": None, "largest": None}))
    assert lines[0].startswith("kitchen degraded the battery is below 5 %")
    assert "largest - no more fits in the memory that is free" in lines


def test_many_nodes_become_rows() -> None:
    nodes = [view(f"node{number}") for number in range(5)]
    assert len(frame(nodes, 100, 60, color=False)) > 40
    rows = frame(nodes, 200, 20, color=False)
    assert len(rows) == 6
    assert rows[1].split()[:4] == ["node0", "ready", "E2B", "E2.69B"]
    assert rows[1].endswith("the request asks for low effort")
    assert len(frame(nodes, 200, 3, color=False)) == 3


def test_lines_are_cut_to_the_terminal_colours_not_counted() -> None:
    line = [("abc", "1"), ("def", ""), ("ghi", "2")]
    assert paint(line, 5, color=False) == "abcde"
    assert paint(line, 5, color=True) == "\x1b[1mabc\x1b[0mde"


def test_a_node_cannot_write_escape_sequences_to_the_terminal() -> None:
    evil = view("evil\x1b[2J", state=STATE | {"submodel_reason": "\x1b]0;owned\x07"})
    assert "\x1b" not in "".join(frame([evil], 200, 50, color=False))
    assert "\x07" not in "".join(frame([evil], 200, 50, color=True))


@pytest.mark.parametrize("junk", [None, 7, "text", [], {}, [1]])
def test_nonsense_in_messages_does_no_harm(junk: Any) -> None:
    broken = view(
        state={"phase": junk, **dict.fromkeys(list(STATE)[1:], junk)},
        info={"bundle": junk, "submodels": junk},
        health=dict.fromkeys(HEALTH, junk),
    )
    assert frame([broken], 80, 50, color=True)
    assert frame([broken, broken], 80, 3, color=True)


class Connecting(MemoryTransport):
    """Connects as soon as it is started."""

    def start(self, emit: Callable[[TransportEvent], None]) -> None:
        super().start(emit)
        self.connect()


def test_the_watcher_collects_what_nodes_say_and_asks_them_for_health() -> None:
    transport = Connecting()
    watcher = Watcher(transport, "me", "nestd", frozenset({"kitchen"}))
    watcher.connect()
    for name in ("kitchen", "cellar"):
        base = f"nestd/v1/{name}"
        transport.deliver(f"{base}/availability", {"state": "online"})
        transport.deliver(f"{base}/state", STATE)
        transport.deliver(f"{base}/info", INFO)
    transport.deliver("nestd/v1/kitchen/health", b"no JSON")
    watcher.listen(time.monotonic() + 5, lambda: len(watcher.nodes()) == 1)
    watcher.listen(time.monotonic() + 5, lambda: bool(watcher.nodes()[0].info))
    assert [node.name for node in watcher.nodes()] == ["kitchen"]
    assert not watcher.told_all()

    watcher.ask_health()
    (request,) = transport.published
    assert request.topic == "nestd/v1/kitchen/request/health"
    document = json.loads(request.payload)
    reply = {"transaction": document["transaction"], "ok": True, "data": HEALTH, "error": None}
    transport.deliver(document["reply_to"], reply)
    watcher.listen(time.monotonic() + 5, watcher.told_all)
    assert watcher.nodes()[0].health == HEALTH

    transport.disconnect("the broker has gone")
    watcher.listen(time.monotonic() + 5, lambda: watcher.trouble is not None)
    assert watcher.trouble == "the broker has gone"
    transport.give_up("another client has our id")
    with pytest.raises(BrokerError, match="another client"):
        watcher.listen(time.monotonic() + 5)


@pytest.mark.broker
def test_one_frame_of_the_nodes_on_a_broker(mosquitto: Mosquitto) -> None:
    watch = [
        str(Path(sys.executable).with_name("nestd")),
        *("watch", "--once", "--port", str(mosquitto.port)),
    ]
    nobody = subprocess.run(watch, capture_output=True, text=True, timeout=60)
    assert nobody.returncode == 1
    assert "no node" in nobody.stderr
    daemon = [sys.executable, str(Path(__file__).parent / "support" / "echo_daemon.py")]
    command = [*daemon, str(mosquitto.port), "echo"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert any("connected" in line for line in process.stderr)
        result = subprocess.run(watch, capture_output=True, text=True, timeout=60)
        process.terminate()
        process.stderr.read()
    assert result.returncode == 0, result.stderr
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert lines[0].startswith("echo ready fake up 0:00:")
    assert "ladder small half [full]|" in lines
    assert "largest full nothing stands against the top of the ladder" in lines
    assert "\x1b" not in result.stdout
