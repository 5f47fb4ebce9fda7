"""What the daemon costs: memory and processor while idle, its start, and MQTT's part of an answer.

    python benchmarks/overhead.py BUNDLE WORK --submodel E2B

A node (`nestd run`) on real Mosquitto, with everything on this machine. For MQTT's part the same
requests go, in turn, to the node and straight to an engine process with the node's own options; the
model's own time is in both. Answers are a string of letters, so that each token is seen when it
comes. Writes benchmarks/results/overhead.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import random
import statistics
import string
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from peers.resident import resident
from real_shape import RESULTS, machine

from nestd.bundle.manifest import Bundle
from nestd.client import Broker as Address
from nestd.client import Client, connect
from nestd.daemon.config import load_settings
from nestd.daemon.engine.messages import (
    ChatMessage,
    Delta,
    EngineOptions,
    Event,
    Finished,
    Ready,
    Sampling,
    Start,
    Structure,
)
from nestd.daemon.engine.process import EngineProcess

sys.path.append(str(Path(__file__).parent / "faults"))
from processes import Broker, Node
from witness import Witness

NAME = "bench"
GOALS = {
    "daemon RSS, MB": 80,
    "daemon idle, % of a core": 1,
    "node idle, % of a core": 1,
    "start to ready, s": 10,
    "MQTT adds to the first token, ms": 5,
    "MQTT adds to a token, %": 3,
}
LOAD_SECONDS = 600.0
LETTERS = {"type": "string", "pattern": "^[a-z]{1000}$"}


@dataclass(frozen=True, slots=True)
class Answer:
    """Seconds from the request to the first token's text, and from there for each token."""

    first_token: float
    token: float


def answer(begin: float, deltas: list[tuple[float, int]]) -> Answer:
    """Return the times of an answer from (time, tokens so far) of its deltas."""
    (first_at, first), (last_at, last) = deltas[0], deltas[-1]
    if last == first:
        raise SystemExit("the answer came in one piece: its tokens cannot be timed")
    return Answer(first_at - begin, (last_at - first_at) / (last - first))


class Direct:
    """An engine process of its own, without a daemon."""

    def __init__(self, bundle: Path, options: EngineOptions) -> None:
        self._events: queue.SimpleQueue[tuple[float, Event]] = queue.SimpleQueue()
        self._engine = EngineProcess(
            bundle, options, lambda event: self._events.put((time.perf_counter(), event))
        )
        self._engine.start()
        list(self._until(Ready))

    def ask(self, request: dict[str, Any]) -> Answer:
        start = Start(
            id=request["id"],
            messages=tuple(ChatMessage(**message) for message in request["messages"]),
            submodel=request["submodel"],
            sampling=Sampling(max_tokens=request["max_tokens"]),
            structure=Structure(json_schema=json.dumps(LETTERS)),
        )
        begin = time.perf_counter()
        self._engine.send(start)
        events = self._until(Finished)
        return answer(
            begin, [(at, e.completion_tokens) for at, e in events if isinstance(e, Delta)]
        )

    def close(self) -> None:
        self._engine.stop(10)

    def _until(self, last: type[Event]) -> Iterator[tuple[float, Event]]:
        while True:
            at, event = self._events.get(timeout=LOAD_SECONDS)
            if event.kind in ("load_failed", "failed", "exited"):
                raise SystemExit(f"the engine said {event}")
            yield at, event
            if isinstance(event, last):
                return


def ask_over_mqtt(client: Client, request: dict[str, Any]) -> Answer:
    fields = request | {"stream": True, "temperature": 0}
    fields["response_format"] = {"type": "json_schema", "json_schema": LETTERS}
    deltas = []
    begin = time.perf_counter()
    for event in client.ask(fields, timeout=LOAD_SECONDS):
        if event["event"] == "delta":
            deltas.append((time.perf_counter(), event["completion_tokens"]))
        if event["event"] == "error":
            raise SystemExit(f"the node said {event}")
    return answer(begin, deltas)


@contextmanager
def running(work: Path, bundle: Path, wanted: str) -> Iterator[tuple[Node, Client, float]]:
    """Yield a node in phase `wanted`, a client of it, and the seconds from its start until then."""
    broker = Broker(work / f"broker-{time.monotonic_ns()}")  # knows nothing of an earlier node
    broker.start()
    node = Node(work, bundle, broker.port, NAME)
    start = time.perf_counter()
    node.start()
    try:
        witness = Witness(broker.port, NAME)
        witness.wait(
            lambda: witness.state.get("phase") == wanted,
            f"the node does not become {wanted}, see {work / NAME}.log",
            LOAD_SECONDS,
        )
        seconds = time.perf_counter() - start
        witness.close()
        with connect(Address(port=broker.port), node=NAME) as client:
            yield node, client, seconds
    finally:
        node.stop()
        broker.stop()


def idle(process: psutil.Process, seconds: float) -> float:
    """Return the percent of one core that a process uses while nothing is asked of it."""
    before = process.cpu_times()
    time.sleep(seconds)
    after = process.cpu_times()
    used = (after.user - before.user) + (after.system - before.system)
    return 100 * used / seconds


def idle_without_model(work: Path, bundle: Bundle, seconds: float) -> dict[str, float]:
    """Return what the daemon alone uses while no model is loaded: its engine cannot load this."""
    broken = work / "broken"
    broken.mkdir(parents=True, exist_ok=True)
    for name in ("manifest.json", *bundle.manifest.files):
        (broken / name).unlink(missing_ok=True)
        (broken / name).symlink_to((bundle.path / name).resolve())
    graph = broken / "decoder.onnx"
    graph.unlink()
    graph.write_bytes(bytes(bundle.manifest.files[graph.name].bytes))
    with running(work / "without", broken, "degraded") as (node, _, _):
        daemon = node.process()
        percent = idle(daemon, seconds)
        return {"rss_bytes": resident(daemon.pid)["rss"], "idle_percent": percent}


def what_mqtt_adds(client: Client, direct: Direct, submodel: str, args: Any) -> dict[str, Any]:
    """Ask the same questions over MQTT and directly, in turn; the order changes each time."""
    dice = random.Random(0)
    found: dict[str, list[Answer]] = {"mqtt": [], "direct": []}
    for number in range(args.requests + 1):
        text = "".join(dice.choices(string.ascii_letters, k=args.prompt))
        request = {
            "id": f"request-{number}",
            "messages": [{"role": "user", "content": text}],
            "submodel": submodel,
            "max_tokens": args.answer,
        }
        sides = [("mqtt", lambda r=request: ask_over_mqtt(client, r))]
        sides.insert(number % 2, ("direct", lambda r=request: direct.ask(r)))
        for side, ask in sides:
            measured = ask()
            if number:  # the first reads weights and compiles the grammar's tables
                found[side].append(measured)
    pairs = list(zip(found["mqtt"], found["direct"], strict=True))
    return {
        "first_token_ms": {
            side: [1000 * item.first_token for item in items] for side, items in found.items()
        },
        "token_ms": {side: [1000 * item.token for item in items] for side, items in found.items()},
        "added_first_token_ms": statistics.median(
            1000 * (mqtt.first_token - direct.first_token) for mqtt, direct in pairs
        ),
        "added_token_percent": statistics.median(
            100 * (mqtt.token / direct.token - 1) for mqtt, direct in pairs
        ),
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    bundle = Bundle.open(args.bundle)
    submodel = bundle.manifest.submodel(args.submodel).name
    report: dict[str, Any] = {
        "bundle": bundle.manifest.name,
        "submodel": submodel,
        "load_averages": [os.getloadavg()[0]],
        "idle_seconds": args.idle,
    }
    with running(args.work, args.bundle, "ready") as (_, _, seconds):
        report["first_start_seconds"] = seconds  # prepares the weights, if they are not there
    report["start_seconds"] = []
    for _ in range(args.starts):
        with running(args.work, args.bundle, "ready") as (_, _, seconds):
            report["start_seconds"].append(seconds)
    with running(args.work, args.bundle, "ready") as (node, client, _):
        daemon, engine = node.process(), node.engine()
        assert engine is not None
        with ThreadPoolExecutor() as pool:
            percents = list(pool.map(lambda process: idle(process, args.idle), (daemon, engine)))
        report["idle_percent"] = dict(zip(("daemon", "engine"), percents, strict=True))
        options = load_settings(args.work / f"{NAME}.yaml").engine_options()
        direct = Direct(args.bundle, options)
        report["threads"] = options.threads
        report["mqtt"] = what_mqtt_adds(client, direct, submodel, args)
        direct.close()
        report["memory"] = {"daemon": resident(daemon.pid), "engine": resident(engine.pid)}
    report["without_model"] = idle_without_model(args.work, bundle, args.idle)
    report["load_averages"].append(os.getloadavg()[0])
    report["machine"] = machine(options.threads or psutil.cpu_count(logical=False))
    return report


def figures(report: dict[str, Any]) -> dict[str, float]:
    """Return what the goals are about, and the rest, under the names of the table."""
    idle, mqtt = report["idle_percent"], report["mqtt"]
    return {
        "daemon RSS, MB": report["memory"]["daemon"]["rss"] / 1e6,
        "daemon RSS without a model, MB": report["without_model"]["rss_bytes"] / 1e6,
        "daemon idle, % of a core": idle["daemon"],
        "node idle, % of a core": idle["daemon"] + idle["engine"],
        "daemon idle without a model, % of a core": report["without_model"]["idle_percent"],
        "first start to ready, s": report["first_start_seconds"],
        "start to ready, s": statistics.median(report["start_seconds"]),
        "first token without MQTT, ms": statistics.median(mqtt["first_token_ms"]["direct"]),
        "MQTT adds to the first token, ms": mqtt["added_first_token_ms"],
        "a token without MQTT, ms": statistics.median(mqtt["token_ms"]["direct"]),
        "MQTT adds to a token, %": mqtt["added_token_percent"],
    }


def table(report: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    about, requests = report["machine"], len(report["mqtt"]["token_ms"]["mqtt"])
    loads = ", ".join(f"{load:.1f}" for load in report["load_averages"])
    lines = [
        "# What the daemon costs",
        "",
        "`python benchmarks/overhead.py`; the model is in the engine, a process of its own. Idle",
        f"is over {report['idle_seconds']:.0f} s. MQTT's part is the median over {requests}",
        "requests of the difference between the same request over Mosquitto and straight to an",
        "engine process.",
        "",
        f"{report['bundle']}, {report['submodel']}; {about['cpu']}, {about['threads']} threads",
        f"of {about['cores']}, commit {about['commit']}, load average before and after: {loads}.",
        "",
        "| | measured | goal |",
        "|---|---|---|",
    ]
    for name, value in figures(report).items():
        goal = f"< {GOALS[name]}" if name in GOALS else ""
        lines.append(f"| {name} | {value:.2f} | {goal} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("work", type=Path, help="the node's state, prepared weights among it")
    parser.add_argument("--submodel", default="E2B")
    parser.add_argument("--idle", type=float, default=60.0, help="seconds")
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--requests", type=int, default=20)
    parser.add_argument("--prompt", type=int, default=16, help="letters")
    parser.add_argument("--answer", type=int, default=32, help="tokens")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.bundle = args.bundle.resolve()
    report = measure(args)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "overhead.json").write_text(json.dumps(report, indent=1) + "\n")
    (args.out / "overhead.md").write_text(table(report))
    print(table(report))


if __name__ == "__main__":
    main()
