"""One run of llama.cpp on one GGUF file, for run.py: load, read prompts, answer; JSON on stdout.

Runs in an environment of its own (`pip install llama-cpp-python`). What is measured, and how, is
what `nestd.cli.bench_measure.run` does for nestd.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import time
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp_peer import CONTEXT_SLACK, Model, quiet
from resident import resident

WARM_UP_TOKENS = 16


def measure(args: argparse.Namespace) -> dict[str, Any]:
    longest = max(args.prompt)
    ids = np.random.default_rng(0).integers(5, 200000, max(longest, WARM_UP_TOKENS)).tolist()
    start = time.perf_counter()
    context = max(longest, WARM_UP_TOKENS) + args.decode + CONTEXT_SLACK
    model = Model(args.gguf, context, args.threads, args.repack)
    loaded = time.perf_counter()
    token = model.run(ids[:WARM_UP_TOKENS])
    first_token = time.perf_counter()
    model.run([token])
    rates = []
    for count in args.prompt:
        model.forget()
        begin = time.perf_counter()
        token = model.run(ids[:count])
        read = time.perf_counter()
        for _ in range(args.decode):
            token = model.run([token])
        end = time.perf_counter()
        prefill, decode = count / (read - begin), args.decode / (end - read)
        rates.append({"prompt_tokens": count, "prefill": prefill, "decode": decode})
    return {
        "load_seconds": loaded - start,
        "first_token_seconds": first_token - start,
        "rates": rates,
        "steady": resident(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--prompt", nargs="+", type=int, default=[128, 512, 2048])
    parser.add_argument("--decode", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repack", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p())
    llama_cpp.llama_backend_init()
    run = measure(args)
    print(json.dumps({"run": run, "version": f"llama-cpp-python {llama_cpp.__version__}"}))


if __name__ == "__main__":
    main()
