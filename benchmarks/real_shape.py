"""Convert and run a random checkpoint of real E4B shapes: bytes, memory, speed, and a switch.

    python benchmarks/real_shape.py CHECKPOINT WORK_DIRECTORY --bits 8 4

CHECKPOINT comes from benchmarks/random_checkpoint.py. Writes benchmarks/results/real_shape.json and
.md. Each width is converted in a process of its own, for its peak memory, and run in another. Both
sizes are measured in turn on the same loaded engine; the figures are medians of --runs rounds.
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

import numpy as np
import psutil
from peers.resident import resident as memory

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


def measure(bundle_path: Path, prepared: Path, threads: int, runs: int) -> dict[str, Any]:
    """Load the bundle and measure; runs in a process of its own.

    A first process prepares the weights; the second one's start is the one that counts.
    """
    from nestd.bundle.manifest import Bundle
    from nestd.daemon.engine.graphs import Graphs
    from nestd.daemon.engine.messages import EngineOptions

    bundle = Bundle.open(bundle_path)
    options = EngineOptions(threads=threads, prepared_directory=prepared)
    start = time.monotonic()
    graphs = Graphs(bundle, options)
    result: dict[str, Any] = {"load_seconds": time.monotonic() - start, "loaded": memory()}
    random = np.random.default_rng(0)
    submodels = {name: bundle.manifest.submodel(name) for name in SIZES}
    rates: dict[str, list[float]] = {}
    for _ in range(runs):
        for name, submodel in submodels.items():
            for prompt in PROMPTS:
                cache = graphs.new_cache(prompt + DECODE)
                ids = random.integers(5, 200000, prompt)
                start = time.monotonic()
                for first in range(0, prompt, 128):
                    last = first + 128 >= prompt
                    graphs.run(ids[first : first + 128], cache, submodel, need_logits=last)
                seconds = time.monotonic() - start
                rates.setdefault(f"{name} prefill {prompt}", []).append(prompt / seconds)
                start = time.monotonic()
                for token in random.integers(5, 200000, DECODE):
                    graphs.run(np.array([token]), cache, submodel, need_logits=True)
                seconds = time.monotonic() - start
                rates.setdefault(f"{name} decode after {prompt}", []).append(DECODE / seconds)
    result["tokens_per_second"] = {key: statistics.median(values) for key, values in rates.items()}
    result["switch"] = switch(graphs, submodels, runs)
    return result


def switch(graphs: Any, submodels: Any, runs: int) -> dict[str, Any]:
    """Return milliseconds and memory of switching down and up, weights handed back and fetched."""
    small, large = submodels["E2B"], submodels["E4B"]
    cache = graphs.new_cache(64 + 16 * runs)
    graphs.run(np.arange(5, 69), cache, large, need_logits=False)
    times: dict[str, list[float]] = {}
    resident = {}

    def step(name: str, submodel: Any) -> None:
        start = time.monotonic()
        graphs.run(np.array([7]), cache, submodel, need_logits=True)
        times.setdefault(f"{name}, ms", []).append(1000 * (time.monotonic() - start))

    def retain(name: str, submodel: Any) -> None:
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
    return {"milliseconds": medians, "resident": resident}


def machine(threads: int) -> dict[str, Any]:
    """Return what the figures were measured on."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    lines = Path("/proc/cpuinfo").read_text(encoding="ascii").splitlines()
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), "")
    return {
        "cpu": model or platform.machine(),
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
        "Random weights: speed, memory and bytes only. Both sizes in turn on one loaded engine,",
        f"medians of {report['runs']} rounds. {machine['cpu']}, {machine['threads']} threads,",
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
    row("prepared weights, MB on disk", lambda b: f"{b['prepared_bytes'] / 1e6:.0f}")
    row("first start (prepares the weights), s", lambda b: f"{b['first']['load_seconds']:.1f}")
    row("every later start, s", lambda b: f"{b['run']['load_seconds']:.1f}")

    def resident(memory: dict[str, int]) -> str:
        anonymous, file = memory["anonymous"] / 1e6, memory["file"] / 1e6
        return f"{memory['rss'] / 1e6:.0f} ({anonymous:.0f} + {file:.0f})"

    row("RSS (anonymous + file), MB: loaded", lambda b: resident(b["run"]["loaded"]))
    first = report["bundles"][widths[0]]["run"]
    for key in first["switch"]["resident"]:
        row(f"RSS, MB: {key}", lambda b, k=key: resident(b["run"]["switch"]["resident"][k]))
    for key in first["tokens_per_second"]:
        row(f"{key}, tokens/s", lambda b, k=key: f"{b['run']['tokens_per_second'][k]:.1f}")
    for key in first["switch"]["milliseconds"]:
        row(key, lambda b, k=key: f"{b['run']['switch']['milliseconds'][k]:.1f}")
    return "\n".join(lines) + "\n"


def measured(bundle: Path, prepared: Path, threads: int, runs: int) -> dict[str, Any]:
    """Run `measure` in a process of its own, with the engine process's settings of malloc."""
    command = [sys.executable, __file__, "-", "-", "--threads", str(threads), "--runs", str(runs)]
    command += ["--measure", str(bundle), str(prepared)]
    result = subprocess.run(command, check=True, capture_output=True, env=environment())
    return dict(json.loads(result.stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4])
    parser.add_argument("--threads", type=int, default=psutil.cpu_count(logical=False))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--measure", type=Path, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(*args.measure, args.threads, args.runs)))
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
            "first": measured(bundle, prepared, args.threads, 1),
            "run": measured(bundle, prepared, args.threads, args.runs),
            "prepared_bytes": sum(f.stat().st_size for f in prepared.rglob("*") if f.is_file()),
        }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "real_shape.json").write_text(json.dumps(report, indent=1) + "\n")
    (RESULTS / "real_shape.md").write_text(table(report))
    print(table(report))


if __name__ == "__main__":
    main()
