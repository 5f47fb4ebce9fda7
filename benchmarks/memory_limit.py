"""The daemon inside a memory cgroup: requests are answered while another program eats memory.

    python benchmarks/memory_limit.py BUNDLE WORK_DIRECTORY --limit 3.5 --requests 100

Run as root with Mosquitto installed. The daemon and the eater live in one cgroup of --limit GiB;
the eater comes after a third of the requests and leaves after two thirds. Writes
benchmarks/results/memory_limit.json and .md: what was answered, what the kernel killed, and each
change of plan with its reason.
"""

from __future__ import annotations

import argparse
import json
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from memory_cgroup import MemoryCgroup
from real_shape import RESULTS, machine

from nestd.client.connection import Client, new_client_id
from nestd.daemon.mqtt.packets import TransportOptions
from nestd.daemon.mqtt.transport import PahoTransport

NODE = "bench"
EATER = (
    "import sys, time; block = bytearray(int(sys.argv[1]));"
    "block[::4096] = b'x' * len(block[::4096]);"
    "print('full', flush=True); time.sleep(3600)"
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Bench:
    """Broker, daemon and client of one run."""

    def __init__(self, args: argparse.Namespace, group: MemoryCgroup, stack: ExitStack) -> None:
        self.args, self.group, self.stack = args, group, stack
        self.port = free_port()
        self.start = time.monotonic()
        self.samples: list[dict[str, Any]] = []
        self.answers: list[dict[str, Any]] = []
        work: Path = args.work
        mosquitto = shutil.which("mosquitto", path="/usr/sbin:/usr/bin")
        assert mosquitto, "install Mosquitto"
        self.spawn([mosquitto, "-p", str(self.port)], work / "broker.log")
        time.sleep(1)
        self.states = work / "states.jsonl"
        command = ["mosquitto_sub", "-p", str(self.port), "-t", f"nestd/v1/{NODE}/state"]
        self.spawn([*command, "-F", '{"at": %U, "state": %p}'], self.states)
        config = work / "nestd.yaml"
        config.write_text(
            f"profile: {args.profile}\nnode: {NODE}\nbundle: {args.bundle}\n"
            f"state_directory: {work / 'state'}\nmqtt: {{port: {self.port}}}\n"
            f"engine: {{threads: {args.threads}}}\n"
        )
        nestd = str(Path(sys.executable).with_name("nestd"))
        self.wall_start = time.time()
        daemon = subprocess.Popen(
            [nestd, "run", "--config", str(config)],
            stderr=(work / "nestd.log").open("wb"),
            preexec_fn=group.join,
        )
        stack.callback(self.end, daemon)
        name = new_client_id()
        options = TransportOptions("127.0.0.1", self.port, client_id=name, clean_start=True)
        self.client = Client(PahoTransport(options), name, "nestd")
        self.client.connect(NODE, NODE, 60)
        stack.callback(self.client.close)

    def spawn(self, command: list[str], out: Path) -> None:
        process = subprocess.Popen(command, stdout=out.open("wb"), stderr=subprocess.STDOUT)
        self.stack.callback(self.end, process)

    def end(self, process: subprocess.Popen[bytes]) -> None:
        process.terminate()
        process.wait(30)

    def ask(self, text: str, max_tokens: int, **fields: Any) -> dict[str, Any]:
        """Ask, note the answer and the memory; return the last event."""
        request = {
            "messages": [{"role": "user", "content": text}],
            "max_tokens": max_tokens,
            "temperature": 0,
            "expires_in": 1800,
            **fields,
        }
        *_, event = self.client.ask(request, 1800)
        self.answers.append(event)
        self.samples.append({"at": time.monotonic() - self.start, **self.group.usage()})
        return event


def run(args: argparse.Namespace) -> dict[str, Any]:
    limit = int(args.limit * 2**30)
    report: dict[str, Any] = {"machine": machine(args.threads), "limit_bytes": limit}
    with ExitStack() as stack:
        group = stack.enter_context(MemoryCgroup("nestd-bench", limit))
        bench = Bench(args, group, stack)
        # The first answer waits for the weights to be prepared inside the limit.
        first = bench.ask("hello", 1)
        report["first_answer"] = {
            "seconds": time.monotonic() - bench.start,
            "event": first["event"],
            "oom_kills": group.oom_kills(),
        }
        long_prompt = bench.ask("abcdefgh " * 440, 8)  # one token a byte: 3960 of 4096
        report["long_prompt"] = {
            key: long_prompt.get(key) for key in ("event", "usage", "submodel", "timings", "code")
        }
        third = args.requests // 3
        eater: subprocess.Popen[bytes] | None = None
        for number in range(args.requests):
            if number == third:
                eater = subprocess.Popen(
                    [sys.executable, "-c", EATER, str(int(args.eat * 2**30))],
                    stdout=subprocess.PIPE,
                    preexec_fn=group.join,
                )
                assert eater.stdout is not None
                report["eater_full"] = eater.stdout.readline() == b"full\n"
                report["eater_from"] = time.time() - bench.wall_start
            if number == 2 * third and eater is not None:
                report["eater_survived"] = eater.poll() is None
                eater.kill()
                eater.wait()
                report["eater_until"] = time.time() - bench.wall_start
            bench.ask(f"turn on lamp number {number}", 16)
            time.sleep(args.pause)
        deadline = time.monotonic() + args.patience
        while time.monotonic() < deadline:  # calm, so that it can grow back
            time.sleep(5)
            bench.ask("and now", 4)
        report["oom_kills"] = group.oom_kills()
        report["peak"] = {
            key: max(sample[key] for sample in bench.samples) for key in ("all", "anonymous")
        }
        wall = bench.wall_start
        lines = bench.states.read_text().splitlines()
        report["timeline"] = timeline([json.loads(line) for line in lines], wall)
    events = Counter(answer.get("event", "none") for answer in bench.answers)
    report["events"] = dict(events)
    report["requests"] = len(bench.answers)
    report["attempts"] = max(answer.get("attempt", 0) for answer in bench.answers)
    report["submodels"] = dict(Counter(answer.get("submodel") for answer in bench.answers))
    return report


def timeline(states: list[dict[str, Any]], start: float) -> list[dict[str, Any]]:
    """Return each change of the largest allowed sub-model, with its reason."""
    changes: list[dict[str, Any]] = []
    for item in states:
        largest, reason = item["state"]["largest"], item["state"]["largest_reason"]
        if not changes or changes[-1]["largest"] != largest:
            seconds = round(item["at"] - start, 1)
            changes.append({"seconds": seconds, "largest": largest, "reason": reason})
    return changes


def table(report: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    m = report["machine"]
    lines = [
        f"# In a memory cgroup of {report['limit_bytes'] / 2**30:.1f} GiB",
        "",
        f"{m['cpu']}, {m['threads']} threads, commit {m['commit']}. The weights are random.",
        "",
        f"- {report['requests']} requests: {report['events']}, attempts: {report['attempts']}",
        f"- OOM kills: {report['oom_kills']}; the eater survived: {report.get('eater_survived')}",
        f"- first answer, weights prepared inside the limit: {report['first_answer']}",
        f"- a prompt near the whole context: {report['long_prompt']}",
        f"- memory at its peak, file pages counted: {report['peak']['all'] / 1e6:.0f} MB",
        f"- anonymous memory at its peak: {report['peak']['anonymous'] / 1e6:.0f} MB",
        f"- answered by: {report['submodels']}",
        f"- the eater was there from {report['eater_from']:.0f} s to {report['eater_until']:.0f} s",
        "",
        "| second | largest allowed | reason |",
        "|---|---|---|",
        *(f"| {c['seconds']} | {c['largest']} | {c['reason']} |" for c in report["timeline"]),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--limit", type=float, default=3.5, help="GiB")
    parser.add_argument("--eat", type=float, default=0.75, help="GiB that the second process takes")
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--pause", type=float, default=0.2, help="seconds between two requests")
    parser.add_argument("--patience", type=float, default=150.0, help="seconds of calm at the end")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--profile", default="raspberry-pi-5-4gb")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    report = run(args)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "memory_limit.json").write_text(json.dumps(report, indent=1) + "\n")
    (RESULTS / "memory_limit.md").write_text(table(report))
    print(table(report))


if __name__ == "__main__":
    main()
