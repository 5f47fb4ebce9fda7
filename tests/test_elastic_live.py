"""The governor with the real engine on Mosquitto, on a board that a test writes (`sysroot`)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.mosquitto import Mosquitto

from nestd.bundle.manifest import Bundle
from nestd.client.connection import Client
from nestd.daemon.mqtt.packets import TransportOptions
from nestd.daemon.mqtt.transport import PahoTransport

pytestmark = pytest.mark.broker

RECORDED = Path(__file__).parent / "recorded" / "jetson-orin-nano"
PATIENCE = 60.0
LONG = {"max_tokens": 400, "temperature": 0, "stream": True}
OUT_OF_MEMORY = "the board is out of memory (PSI full, or an OOM kill)"
NOTHING = "nothing stands against the top of the ladder"
CONFIG = """
profile: generic
node: tiny
bundle: {bundle}
state_directory: {state}
mqtt: {{port: {port}}}
engine: {{context_length: 480, prefill_chunk: 32, threads: 1}}
elastic:
  pace: {{step_interval_s: 0, grow_after_s: 0.5, grow_after_max_s: 0.5, backoff_reset_s: 60}}
"""


class LiveNode:
    """`nestd run` on a board below `sysroot`, and a client of it."""

    def __init__(
        self, process: subprocess.Popen[bytes], client: Client, port: int, sysroot: Path
    ) -> None:
        self.process, self.client, self._port, self._sysroot = process, client, port, sysroot

    @contextmanager
    def standing_still(self) -> Iterator[None]:
        """Stop the engine: the tiny model would have answered before the board is looked at."""
        engine = psutil.Process(self.process.pid).children()[0]
        engine.suspend()
        yield
        engine.resume()

    def set_pressure(self, percent: float) -> None:
        """Write PSI as a kernel does: a sampler never sees half of it."""
        file = self._sysroot / "proc/pressure/memory"
        file.parent.mkdir(exist_ok=True)
        draft = file.with_name("draft")
        line = f"avg10={percent} avg60=0.00 avg300=0.00 total=0"
        draft.write_text(f"some {line}\nfull {line}\n")
        draft.replace(file)

    def wait_for_largest(self, submodel: str) -> dict[str, Any]:
        """Return the first state that allows just that sub-model."""
        command = ["mosquitto_sub", "-W", "30", "-t", "nestd/v1/tiny/state", "-p", str(self._port)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as states:
            assert states.stdout is not None
            for line in states.stdout:
                state: dict[str, Any] = json.loads(line)
                if state["largest"] == submodel:
                    states.terminate()
                    return state
        raise AssertionError(f"no state that allows just {submodel} came in time")


@pytest.fixture
def endless_bundle(tiny_bundle: Bundle, tmp_path: Path) -> Path:
    """The tiny bundle with an end token that it seldom makes: answers long enough for a test."""
    path = Path(shutil.copytree(tiny_bundle.path, tmp_path / "bundle"))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["tokens"]["eos"] = [manifest["tokens"]["pad"]]
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


@pytest.fixture
def live(mosquitto: Mosquitto, endless_bundle: Path, tmp_path: Path) -> Iterator[LiveNode]:
    sysroot = Path(shutil.copytree(RECORDED, tmp_path / "board"))
    config = tmp_path / "nestd.yaml"
    config.write_text(
        CONFIG.format(bundle=endless_bundle, state=tmp_path / "state", port=mosquitto.port)
    )
    command = [str(Path(sys.executable).with_name("nestd")), "run", "--config", str(config)]
    options = TransportOptions("127.0.0.1", mosquitto.port, client_id="test", clean_start=True)
    client = Client(PahoTransport(options), "test", "nestd")
    environment = os.environ | {"NESTD_SYSROOT": str(sysroot)}
    with (
        (tmp_path / "nestd.log").open("wb") as log,
        subprocess.Popen(command, stdout=log, stderr=log, env=environment) as process,
    ):
        client.connect("tiny", "tiny", PATIENCE)
        assert list(client.ask(question(max_tokens=1), PATIENCE))[-1]["event"] == "done"
        yield LiveNode(process, client, mosquitto.port, sysroot)
        client.close()
        process.terminate()
        process.wait(15)


def question(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "turn the light on"}]} | fields


def caught(live: LiveNode, before: float, after: float) -> dict[str, Any]:
    """Return an answer in the middle of which the pressure changed.

    On a busy machine an answer may be over before its engine stands still: then once more.
    """
    for _ in range(10):
        live.set_pressure(before)
        live.wait_for_largest("nested" if before else "full")
        events = live.client.ask(question(**LONG), PATIENCE)
        next(e for e in events if e["event"] == "delta")
        with live.standing_still():
            live.set_pressure(after)
            state = live.wait_for_largest("nested" if after else "full")
            assert state["memory_reason"] == (OUT_OF_MEMORY if after else None)
        done = list(events)[-1]
        if len(done["switches"]) > 1:
            break
    return done


def test_pressure_steps_a_running_answer_down_and_its_end_steps_it_up(live: LiveNode) -> None:
    down, up = caught(live, 0, 60), caught(live, 60, 0)
    for done in (down, up):
        assert (done["event"], done["attempt"]) == ("done", 1)
        assert done["joules"] > 0
    steps = [("full", NOTHING), ("nested", OUT_OF_MEMORY)]
    assert [(s["submodel"], s["reason"]) for s in down["switches"]] == steps
    assert [(s["submodel"], s["reason"]) for s in up["switches"]] == steps[::-1]
    health = live.client.control("health", {})["data"]
    assert health["watts_scope"] == "module"
    assert health["joules_per_token"] > 0
