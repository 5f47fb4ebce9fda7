"""The clients in examples/ work against a node on real Mosquitto."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.clients import PATIENCE, daemon, listening
from support.mosquitto import Mosquitto

EXAMPLES = Path(__file__).parents[1] / "examples"
FLOW = EXAMPLES / "node-red" / "ask.json"
ANSWERS = "clients/node-red/answer"

pytestmark = pytest.mark.broker


def command(name: str) -> str:
    """Return the path of a command, or skip."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def run(*words: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, cwd=cwd, timeout=PATIENCE)


# mosquitto_rr


def test_the_shell_script_prints_the_answer_or_the_error(mosquitto: Mosquitto) -> None:
    command("jq")
    script, port = EXAMPLES / "mosquitto_rr.sh", str(mosquitto.port)
    with daemon(mosquitto, "kitchen", "limits.max_prompt_chars=40"):
        done = run(script, "kitchen", 'say "hi" to $USER', "-p", port)
        assert (done.returncode, done.stdout) == (0, 'say "hi" to $USER\n')
        refused = run(script, "kitchen", "x" * 50, "-p", port)
    assert refused.returncode == 1
    assert refused.stderr.startswith("413 too_large:")


# Node.js


@pytest.fixture
def ask(tmp_path: Path) -> Path:
    """The Node.js example with its library, which npm brings once and the user's cache keeps."""
    command("node")
    npm = command("npm")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    kept = cache / "nestd-tests" / "example-node"
    if not (kept / "node_modules" / "mqtt").is_dir():
        kept.mkdir(parents=True, exist_ok=True)
        shutil.copy(EXAMPLES / "node" / "package.json", kept)
        done = subprocess.run(
            [npm, "install", "--no-audit", "--no-fund"], cwd=kept, capture_output=True, text=True
        )
        if done.returncode:
            pytest.fail(f"npm could not fetch mqtt: {done.stderr.strip()}", pytrace=False)
    for name in ("ask.mjs", "package.json"):
        shutil.copy(EXAMPLES / "node" / name, tmp_path)
    (tmp_path / "node_modules").symlink_to(kept / "node_modules")
    return tmp_path / "ask.mjs"


def test_the_nodejs_client_streams_an_answer(mosquitto: Mosquitto, ask: Path) -> None:
    broker = f"mqtt://127.0.0.1:{mosquitto.port}"
    with daemon(mosquitto, "kitchen"):
        done = run("node", ask, "--broker", broker, "turn the light on")
        refused = run("node", ask, "--broker", broker, "--submodel", "nonsense", "hello")
    # The echo ends its deltas with a blank that `done` does not have, so the whole text follows.
    assert (done.returncode, done.stdout) == (0, "turn the light on \nturn the light on\n")
    assert done.stderr == "[full, 2 tokens, stop]\n"
    assert refused.returncode == 1
    assert refused.stderr.startswith("404 model_not_found:")


def test_the_nodejs_client_shows_a_second_attempt_from_its_start(
    mosquitto: Mosquitto, ask: Path
) -> None:
    with daemon(mosquitto, "kitchen"):
        broker = f"mqtt://127.0.0.1:{mosquitto.port}"
        done = run("node", ask, "--broker", broker, "die once")
    assert done.stdout == "die once \ndie once\n"
    assert done.stderr == "[full, 2 tokens, stop]\n"


def test_the_nodejs_client_gives_up(mosquitto: Mosquitto, ask: Path) -> None:
    broker = f"mqtt://127.0.0.1:{mosquitto.port}"
    done = run("node", ask, "--broker", broker, "--timeout", "1", "is anybody there?")
    assert done.returncode == 2
    assert "no answer came" in done.stderr


# Node-RED


def flow() -> list[dict[str, Any]]:
    nodes: list[dict[str, Any]] = json.loads(FLOW.read_text(encoding="utf-8"))
    return nodes


def test_the_flow_is_wired_from_the_question_to_the_answer() -> None:
    nodes = {node["id"]: node for node in flow()}
    tabs = {node["id"] for node in nodes.values() if node["type"] == "tab"}
    brokers = {node["id"] for node in nodes.values() if node["type"] == "mqtt-broker"}
    for node in nodes.values():
        assert node.get("z", next(iter(tabs))) in tabs
        assert node.get("broker", "") in brokers or not node["type"].startswith("mqtt ")
        for wire in node.get("wires", []):
            assert set(wire) <= set(nodes)

    def behind(name: str) -> Iterator[str]:
        yield nodes[name]["type"]
        for wire in nodes[name].get("wires", []):
            for target in wire:
                yield from behind(target)

    starts = {node["type"]: node["id"] for node in nodes.values() if "wires" in node}
    assert list(behind(starts["inject"])) == ["inject", "function", "mqtt out"]
    assert list(behind(starts["mqtt in"])) == ["mqtt in", "switch", "debug", "debug"]
    assert nodes[starts["mqtt in"]]["topic"] == ANSWERS
    (function,) = (node for node in nodes.values() if node["type"] == "function")
    assert ANSWERS in function["func"]


def test_node_red_runs_the_flow(mosquitto: Mosquitto, tmp_path: Path) -> None:
    node_red = command("node-red")
    nodes = flow()
    for node in nodes:
        if node["type"] == "mqtt-broker":
            node |= {"broker": "127.0.0.1", "port": str(mosquitto.port)}
        elif node["type"] == "inject":
            node |= {"once": True, "onceDelay": 1}
        elif node["type"] == "debug":
            node["console"] = True
    (tmp_path / "flows.json").write_text(json.dumps(nodes), encoding="utf-8")
    settings = tmp_path / "settings.js"
    settings.write_text(
        "module.exports = {httpAdminRoot: false, httpNodeRoot: false, uiHost: '127.0.0.1', "
        "uiPort: 0, flowFile: 'flows.json', telemetry: {enabled: false}}"
    )
    words = [node_red, "--userDir", str(tmp_path), "--settings", str(settings)]
    with (
        daemon(mosquitto, "kitchen"),
        listening(mosquitto, ANSWERS) as answers,
        (tmp_path / "log").open("wb") as log,
        subprocess.Popen(words, stdout=log, stderr=log) as process,
    ):
        try:
            done = answers.received.get(timeout=PATIENCE)
            shown = tmp_path / "log"
            while "turn the light on" not in shown.read_text(encoding="utf-8"):
                assert process.poll() is None
        finally:
            process.terminate()
    event = json.loads(done.payload)
    assert event["event"] == "done"
    assert done.correlation_data == event["id"].encode()
