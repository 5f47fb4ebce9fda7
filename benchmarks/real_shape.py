"""Convert and run a random checkpoint of real E4B shapes: bytes, memory, speed, and a switch.

    python benchmarks/real_shape.py CHECKPOINT WORK_DIRECTORY --bits 8 4

CHECKPOINT comes from benchmarks/random_checkpoint.py. Writes benchmarks/results/real_shape.json and
.md. Each width is converted in a process of its own, for its peak memory. Speeds are those of
`nestd bench`, both sizes in turn; switching is measured on one loaded engine. Figures are medians
of --runs rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
from peers.resident import resident as memory

from nestd.bundle.manifest import Submodel
from nestd.cli.bench_measure import Session, Task, cpu_name, in_child, load, watched
from nestd.daemon.engine.process import environment

PROMPTS = (128, 512)
DECODE = 32
SIZES = ("E2B", "E4B")
RESULTS = Path(__file__).parent / "results"


def convert(checkpoint: Path, bundle: Path, bits: int) -> dict[str, float]:
    """Convert in a child process; return seconds and peak resident bytes."""
    shutil.rmtree(bundle, ignore_errors=True)
    command = ["nestd", "convert", str(checkpoint), str(bundle), "--bits", str(bits)]
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed")
    return {"seconds": time.monotonic() - start, "peak_rss_bytes": usage.ru_maxrss * 1024}


def speeds(task: Task, runs: int) -> dict[str, float]:
    """Return tokens per second by size and length of prompt, medians of `runs`."""
    rates: dict[str, list[float]] = {}
    for _ in range(runs):
        for name in SIZES:
            run, _ = in_child(task.model_copy(update={"kind": "run", "submodel": name}))
            for rate in run["rates"]:
                prompt = rate["prompt_tokens"]
                rates.setdefault(f"{name} prefill {prompt}", []).append(rate["prefill"])
                rates.setdefault(f"{name} decode after {prompt}", []).append(rate["decode"])
    return {key: statistics.median(values) for key, values in rates.items()}


def switch(task: Task, runs: int) -> dict[str, Any]:
    """Load; return milliseconds and memory of switching down and up, weights handed back.

    For a process of its own.
    """
    start = time.monotonic()
    graphs, small, ids = load(task)
    result: dict[str, Any] = {"load_seconds": time.monotonic() - start, "loaded": memory()}
    large = graphs.bundle.manifest.submodel("E4B")
    session = Session(graphs, large, 64 + 16 * runs)
    session.read(ids[:64])
    times: dict[str, list[float]] = {}
    resident = {}

    def step(name: str, submodel: Submodel) -> None:
        session.submodel = submodel
        start = time.monotonic()
        session.answer(7, 1)
        times.setdefault(f"{name}, ms", []).append(1000 * (time.monotonic() - start))

    def retain(name: str, submodel: Submodel) -> None:
        start = time.monotonic()
        graphs.retain(submodel)
        times.setdefault(f"{name}, ms", []).append(1000 * (time.monotonic() - start))

    for _ in range(runs):
        step("E4B, a step", large)
        resident["running E4B"] = memory()
        step("down: first E2B step", small)
        retain("down: handing pages back", small)
        resident["after handing back"] = memory()
        step("E2B, a step", small)
        resident["running E2B"] = memory()
        retain("up: asking for pages", large)
        step("up: first E4B step", large)
        step("up: second E4B step", large)
    medians = {key: statistics.median(values) for key, values in times.items()}
    return {**result, "milliseconds": medians, "resident": resident}


def measure(bundle: Path, prepared: Path, threads: int, runs: int) -> dict[str, Any]:
    """Return what the bundle does: prepared, switched and run, each in a process of its own."""
    task = Task(
        kind="prepare",
        bundle=bundle,
        prepared=prepared,
        submodel="E2B",
        threads=threads,
        prompts=PROMPTS,
        decode=DECODE,
    )
    preparation, _ = in_child(task)
    command = [sys.executable, __file__, "-", "-", "--runs", str(runs)]
    switched, _ = watched([*command, "--switch", task.model_dump_json()], environment())
    rates = speeds(task, runs)
    return {"preparation": preparation, "switch": switched, "tokens_per_second": rates}


def machine(threads: int) -> dict[str, Any]:
    """Return what the figures were measured on."""
    command = ["git", "-C", str(RESULTS.parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return {
        "cpu": cpu_name(),
        "cores": psutil.cpu_count(),
        "threads": threads,
        "memory_bytes": psutil.virtual_memory().total,
        "commit": commit,
        "python": platform.python_version(),
    }


def table(report: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    widths, machine = list(report["bundles"]), report["machine"]
    lines = [
        "# A bundle of real E4B shapes",
        "",
        "Random weights: speed, memory and bytes only. Speeds as `nestd bench` takes them,",
        f"switching on one loaded engine; medians of {report['runs']} rounds.",
        f"{machine['cpu']}, {machine['threads']} threads,",
        f"commit {machine['commit']}.",
        "",
        "| | " + " | ".join(f"int{width}" for width in widths) + " |",
        "|---|" + "---|" * len(widths),
    ]

    def row(name: str, value: Any) -> None:
        cells = [value(report["bundles"][width]) for width in widths]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")

    row("conversion, s", lambda b: f"{b['conversion']['seconds']:.0f}")
    row("conversion, peak RSS, MB", lambda b: f"{b['conversion']['peak_rss_bytes'] / 1e6:.0f}")
    for section in ("embed_tokens", "per_layer_embeddings", "decoder"):
        row(f"{section}, MB on disk", lambda b, s=section: f"{b['sections'][s] / 1e6:.0f}")
    row("prepared weights, MB on disk", lambda b: f"{b['preparation']['disk_bytes'] / 1e6:.0f}")
    row("preparing them, once, s", lambda b: f"{b['preparation']['seconds']:.1f}")
    row("load, s", lambda b: f"{b['switch']['load_seconds']:.1f}")

    def resident(memory: dict[str, int]) -> str:
        anonymous, file = memory["anonymous"] / 1e6, memory["file"] / 1e6
        return f"{memory['rss'] / 1e6:.0f} ({anonymous:.0f} + {file:.0f})"

    row("RSS (anonymous + file), MB: loaded", lambda b: resident(b["switch"]["loaded"]))
    first = report["bundles"][widths[0]]
    for key in first["switch"]["resident"]:
        row(f"RSS, MB: {key}", lambda b, k=key: resident(b["switch"]["resident"][k]))
    for key in first["tokens_per_second"]:
        row(f"{key}, tokens/s", lambda b, k=key: f"{b['tokens_per_second'][k]:.1f}")
    for key in first["switch"]["milliseconds"]:
        row(key, lambda b, k=key: f"{b['switch']['milliseconds'][k]:.1f}")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4])
    parser.add_argument("--threads", type=int, default=psutil.cpu_count(logical=False))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--switch", metavar="TASK", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.switch:
        print(json.dumps(switch(Task.model_validate_json(args.switch), args.runs)))
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    report: dict[str, Any] = {"machine": machine(args.threads), "runs": args.runs, "bundles": {}}
    for bits in args.bits:
        bundle, prepared = args.work / f"int{bits}", args.work / "prepared"
        conversion = convert(args.checkpoint, bundle, bits)
        shutil.rmtree(prepared, ignore_errors=True)
        report["bundles"][str(bits)] = {
            "conversion": conversion,
            "sections": json.loads((bundle / "manifest.json").read_text())["sections"],
            **measure(bundle, prepared, args.threads, args.runs),
        }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "real_shape.json").write_text(json.dumps(report, indent=1) + "\n")
    (RESULTS / "real_shape.md").write_text(table(report))
    print(table(report))


if __name__ == "__main__":
    main()
