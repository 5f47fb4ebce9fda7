"""Convert and run encoders of Gemma 3n's real shapes: bytes, memory, latency, fidelity.

    python benchmarks/encoders.py CHECKPOINT WORK_DIRECTORY

CHECKPOINT comes from benchmarks/random_encoders.py. Writes benchmarks/results/encoders.json and
.md. Each width is converted, and each graph run, in a process of its own. Latencies are medians of
--runs. Graphs run as converted, with ONNX Runtime's arena and without, and as the daemon runs them:
without, their prepared weights mapped.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
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
from real_shape import RESULTS, machine, memory

from nestd.daemon.engine.process import environment

# What is run on each graph.
INPUTS = {
    "vision_encoder_256": ("256",),
    "vision_encoder_512": ("512",),
    "vision_encoder_768": ("768",),
    "audio_encoder": ("5 s", "30 s"),
}
MODES = ("arena", "no arena", "mapped")


def convert(checkpoint: Path, bundle: Path, bits: int) -> dict[str, float]:
    """Convert in a child process; return seconds and peak resident bytes."""
    shutil.rmtree(bundle, ignore_errors=True)
    command = ["nestd", "convert", str(checkpoint), str(bundle), "--encoder-bits", str(bits)]
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed")
    return {"seconds": time.monotonic() - start, "peak_rss_bytes": usage.ru_maxrss * 1024}


def feeds(name: str, value: np.ndarray) -> dict[str, np.ndarray]:
    if name.endswith("s"):
        mask = np.ones(value.shape[:2], bool)
        return {"input_features": value, "input_features_mask": mask}
    return {"pixel_values": value}


def errors(value: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    """Return the relative error, and the cosine without the mean token."""
    mean = expected.mean((0, 1))
    a, b = value - mean, expected - mean
    return {
        "relative_error": float(np.linalg.norm(value - expected) / np.linalg.norm(expected)),
        "centred_cosine": float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)),
    }


def measure(bundle_path: Path, graph: str, mode: str, args: Any) -> dict[str, Any]:
    """Load one graph, run, unload; in a process of its own."""
    from nestd.bundle.manifest import Bundle
    from nestd.daemon.engine.prepare import prepared_encoder
    from nestd.daemon.engine.sessions import load_graph

    bundle = Bundle.open(bundle_path)
    path = bundle.file(f"{graph}.onnx")
    result: dict[str, Any] = {"runs": {}}
    if mode == "mapped":
        start = time.monotonic()
        path = prepared_encoder(bundle, graph, args.work / "prepared", args.threads)
        result["prepare_seconds"] = time.monotonic() - start
        result["prepared_bytes"] = sum(f.stat().st_size for f in path.parent.iterdir())
        if args.prepare:
            return result
    result["before"] = memory()
    start = time.monotonic()
    session: Any = load_graph(path, args.threads, arena=mode == "arena")
    result["load_seconds"] = time.monotonic() - start
    result["loaded"] = memory()
    arrays = np.load(args.checkpoint / "expected.npz")
    for name in INPUTS[graph]:
        seconds, output = [], None
        for _ in range(args.runs + 1):
            start = time.monotonic()
            output = session.run(None, feeds(name, arrays[f"{name}/input"]))[0]
            seconds.append(time.monotonic() - start)
        result["runs"][name] = {
            "first_seconds": seconds[0],
            "seconds": statistics.median(seconds[1:]),
            "resident": memory(),
            **errors(output, arrays[f"{name}/output"]),
        }
    result["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    del session
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    result["unloaded"] = memory()
    return result


def measured(bundle: Path, graph: str, mode: str, args: Any, *extra: str) -> dict[str, Any]:
    """Run `measure` in a process of its own, with the engine process's settings of malloc."""
    command = [sys.executable, __file__, str(args.checkpoint), str(args.work)]
    command += ["--threads", str(args.threads), "--runs", str(args.runs), *extra]
    command += ["--measure", str(bundle), graph, mode]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment())
    return dict(json.loads(done.stdout))


def table(report: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    about, widths = report["machine"], report["widths"]
    lines = [
        "# Encoders of real shapes",
        "",
        "Random weights with heavy tails (Student's t, three degrees of freedom). Latency is the",
        f"median of {report['runs']} runs, memory in MB as RSS (anonymous + file).",
        f"{about['cpu']}, {about['threads']} threads, commit {about['commit']}.",
        "The load average before each process, in the order of the second table:",
        f"{report['load']}.",
        "The benchmark itself makes up to 2; above that other work ran on the same cores, and",
        "latencies are upper bounds. Compare modes and widths of one load only.",
        "",
        "| conversion | " + " | ".join(f"{bits} bits" for bits in widths) + " |",
        "|---|" + "---|" * len(widths),
    ]

    def row(name: str, value: Any) -> None:
        lines.append(f"| {name} | " + " | ".join(value(item) for item in widths.values()) + " |")

    row("seconds, text stub included", lambda w: f"{w['conversion']['seconds']:.0f}")
    row("peak RSS, MB", lambda w: f"{w['conversion']['peak_rss_bytes'] / 1e6:.0f}")
    for section in ("vision_encoder", "audio_encoder"):
        row(f"{section}.data, MB", lambda w, s=section: f"{w['sections'][s] / 1e6:.0f}")

    lines += [
        "",
        "| graph | bits | mode | load, s | loaded | after runs | peak | unloaded |",
        "|---|---|---|---|---|---|---|---|",
    ]

    def resident(item: dict[str, int]) -> str:
        anonymous, file = item["anonymous"] / 1e6, item["file"] / 1e6
        return f"{item['rss'] / 1e6:.0f} ({anonymous:.0f} + {file:.0f})"

    for bits, width in widths.items():
        for graph, modes in width["graphs"].items():
            for mode, item in modes.items():
                after = list(item["runs"].values())[-1]["resident"]
                cells = [graph, bits, mode, f"{item['load_seconds']:.2f}", resident(item["loaded"])]
                cells += [resident(after), f"{item['peak_rss_bytes'] / 1e6:.0f}"]
                lines.append(f"| {' | '.join([*cells, resident(item['unloaded'])])} |")

    lines += [
        "",
        "| input | bits | "
        + " | ".join(f"{mode}, s" for mode in MODES)
        + " | relative error | centred cosine |",
        "|---|---|" + "---|" * (len(MODES) + 2),
    ]
    for graph, names in INPUTS.items():
        for name in names:
            for bits, width in widths.items():
                runs = [width["graphs"][graph][mode]["runs"][name] for mode in MODES]
                cells = [name if name.endswith("s") else f"{name} px", bits]
                cells += [f"{item['seconds']:.3f}" for item in runs]
                last = runs[-1]
                cells += [f"{last['relative_error']:.2g}", f"{last['centred_cosine']:.4f}"]
                lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| prepared once | " + " | ".join(f"{bits} bits" for bits in widths) + " |"]
    lines.append("|---|" + "---|" * len(widths))
    for graph in INPUTS:
        row(
            graph,
            lambda w, g=graph: (
                f"{w['prepared'][g]['prepared_bytes'] / 1e6:.0f} MB in "
                f"{w['prepared'][g]['prepare_seconds']:.1f} s"
            ),
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--threads", type=int, default=psutil.cpu_count(logical=False))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--prepare", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        bundle, graph, mode = args.measure
        print(json.dumps(measure(Path(bundle), graph, mode, args)))
        return
    report: dict[str, Any] = {"machine": machine(args.threads), "runs": args.runs, "widths": {}}
    loads = []
    for bits in args.bits:
        bundle = args.work / f"encoders-{bits}"
        conversion = convert(args.checkpoint, bundle, bits)
        shutil.rmtree(args.work / "prepared", ignore_errors=True)
        width: dict[str, Any] = {
            "conversion": conversion,
            "sections": json.loads((bundle / "manifest.json").read_text())["sections"],
            "prepared": {},
            "graphs": {},
        }
        for graph in INPUTS:
            width["prepared"][graph] = measured(bundle, graph, "mapped", args, "--prepare")
            width["graphs"][graph] = {}
            for mode in MODES:
                loads.append(f"{os.getloadavg()[0]:.1f}")
                width["graphs"][graph][mode] = measured(bundle, graph, mode, args)
        report["widths"][str(bits)] = width
        report["load"] = ", ".join(loads)
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "encoders.json").write_text(json.dumps(report, indent=1) + "\n")
        (RESULTS / "encoders.md").write_text(table(report))
    print(table(report))


if __name__ == "__main__":
    main()
