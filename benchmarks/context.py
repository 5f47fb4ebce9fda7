"""What a long context costs: a step's time and the KV cache's bytes, for each kind of cache.

    python benchmarks/context.py BUNDLE PREPARED_DIRECTORY --submodel E4B

Each kind (whole context in float32, a window for sliding layers, that in int8) is measured in a
process of its own. A cache is filled with random rows instead of reading so many tokens, so a
context takes no time to reach; then one chunk of a prompt and single tokens follow, as they would
behind a real one. Writes benchmarks/results/context.json and .md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from real_shape import RESULTS, machine

from nestd.bundle.manifest import Bundle
from nestd.daemon.engine.graphs import Graphs
from nestd.daemon.engine.kv_cache import KVCache
from nestd.daemon.engine.messages import EngineOptions
from nestd.daemon.engine.process import environment

LENGTHS = (1024, 4096, 16384, 32768)
CHUNK = 128
KINDS: dict[str, dict[str, Any]] = {
    "float32, whole context": {"kv_window": False},
    "float32, window": {},
    "int8, window": {"kv_bits": 8},
}


def pretend(cache: KVCache, length: int) -> None:
    """Let `cache` be one of `length` tokens; its rows are random already."""
    window = cache.caches.window
    cache.length = length
    if length > window.capacity:
        cache.start = length - window.size + 1


def fill(cache: KVCache, random: np.random.Generator) -> None:
    """Write every row: pages that nobody wrote are one page of zeros, which reads too fast."""
    for buffer in cache.caches.buffers.values():
        for rows in buffer.reshape(-1, *buffer.shape[-2:]):
            values = random.standard_normal(rows.shape, np.float32)
            rows[...] = 32 * values if rows.dtype == np.int8 else values


def measure(args: argparse.Namespace, kind: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of one kind of cache by context length."""
    bundle = Bundle.open(args.bundle)
    longest = max(args.lengths)
    options = EngineOptions(
        threads=args.threads,
        context_length=longest,
        prefill_chunk=CHUNK,
        prepared_directory=args.prepared,
        **kind,
    )
    graphs, random = Graphs(bundle, options), np.random.default_rng(0)
    submodel = bundle.manifest.submodel(args.submodel or bundle.manifest.submodels[-1].name)
    vocabulary = bundle.manifest.model.vocab_size
    result: dict[str, Any] = {}
    cache = graphs.new_cache(options.context_length)
    fill(cache, random)

    def run(tokens: int, need_logits: bool) -> float:
        ids = random.integers(0, vocabulary, tokens)
        start = time.perf_counter()
        graphs.run(ids, cache, submodel, need_logits)
        return time.perf_counter() - start

    pretend(cache, 0)
    for _ in range(2):  # the weights come into memory
        run(1, need_logits=True)
    for length in args.lengths:
        chunks = []
        for _ in range(args.chunks):
            cache.start = 0
            pretend(cache, length - args.steps - CHUNK)
            chunks.append(run(CHUNK, need_logits=False))
        steps = [run(1, need_logits=True) for _ in range(args.steps)]
        result[str(length)] = {
            "kv_bytes": cache.caches.bytes_of(length),
            "decode_ms": 1000 * statistics.median(steps),
            "prefill_tokens_per_second": CHUNK / statistics.median(chunks),
        }
    return result


def table(report: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    about = report["machine"]
    lines = [
        f"# The cost of context: {report['bundle']}, {report['submodel']}",
        "",
        f"The last tokens of so many, and a chunk of {CHUNK} of a prompt before them; medians.",
        f"{about['cpu']}, {about['threads']} threads, commit {about['commit']}.",
        "",
        "| cache | context | KV cache, MiB | decode, ms a token | prefill, tokens/s |",
        "|---|---|---|---|---|",
    ]
    for kind, rows in report["kinds"].items():
        for length, row in rows.items():
            cells = (
                f"{row['kv_bytes'] / 2**20:.1f}",
                f"{row['decode_ms']:.2f}",
                f"{row['prefill_tokens_per_second']:.1f}",
            )
            lines.append(f"| {kind} | {length} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("prepared", type=Path)
    parser.add_argument("--submodel", help="the largest by default")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--threads", type=int, default=psutil.cpu_count(logical=False))
    parser.add_argument("--steps", type=int, default=64, help="tokens at each length")
    parser.add_argument("--chunks", type=int, default=5, help="chunks at each length")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the report goes")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if min(args.lengths) < CHUNK + args.steps:
        parser.error(f"--lengths must be at least {CHUNK + args.steps}")
    if args.measure:
        print(json.dumps(measure(args, KINDS[args.measure])))
        return
    report: dict[str, Any] = {
        "machine": machine(args.threads),
        "bundle": args.bundle.name,
        "submodel": args.submodel or "largest",
        "kinds": {},
    }
    for kind in KINDS:
        command = [sys.executable, *sys.argv, "--measure", kind]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment())
        report["kinds"][kind] = json.loads(done.stdout)
    args.results.mkdir(exist_ok=True)
    (args.results / "context.json").write_text(json.dumps(report, indent=1) + "\n")
    (args.results / "context.md").write_text(table(report))
    print(table(report))


if __name__ == "__main__":
    main()
