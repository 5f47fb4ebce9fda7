"""Short forms of benchmarks/faults: what dies, and that every request still has one answer."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.broker

HARNESS = Path(__file__).parents[1] / "benchmarks" / "faults" / "run.py"


def run(scenario: str, scale: float) -> dict[str, Any]:
    if shutil.which("mosquitto") is None:
        pytest.skip("Mosquitto is not installed")
    command = [sys.executable, str(HARNESS), scenario, "--scale", str(scale)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stdout, done.stderr
    figures: dict[str, Any] = json.loads(done.stdout)[scenario]
    assert figures["lost"] == 0, figures
    return figures


def test_requests_survive_restarts_of_the_broker() -> None:
    figures = run("broker_restarts", 0.06)
    assert figures["restarts"] >= 2
    assert figures["done"] == figures["asked"] == 60
    assert figures["contradictory"] == 0


def test_each_request_ends_once_though_engines_are_killed() -> None:
    figures = run("engine_kills", 0.03)
    assert figures["kills"] == 6
    assert figures["contradictory"] == 0


def test_each_request_ends_once_though_daemons_are_killed() -> None:
    figures = run("daemon_kills", 0.08)
    assert figures["kills"] == 4
    assert figures["contradictory"] == 0


def test_a_client_that_asks_again_loses_nothing_when_the_broker_is_killed() -> None:
    figures = run("broker_kills", 0.1)
    assert figures["sessions_lost_by_the_node"] == figures["announced_in_the_log"] >= 2


def test_availability_is_right_after_each_cut_of_the_line() -> None:
    figures = run("link_flaps", 0.05)
    assert figures["offline_not_announced"] == 0
    assert figures["attempts_to_connect_per_flap"] < 10


def test_broken_messages_are_answered_and_break_nothing() -> None:
    figures = run("malformed", 0.05)
    assert figures["daemon_survived"]
    assert figures["answers_due"] > 100


def test_what_is_too_much_is_refused_and_a_cancel_works() -> None:
    figures = run("overload", 0.1)
    assert figures["queue_full"] > 100
    assert figures["done"] + figures["queue_full"] + figures["cancelled"] == figures["asked"]
