"""llama.cpp answers several requests at once: tokens per second of all of them together.

    python benchmarks/peers/llama_cpp_batch.py E4B.gguf --sequences 1 4 8 --threads 2

Runs in an environment with llama-cpp-python. Every sequence has a prompt of its own; prompts are
read one after the other, then one `llama_decode` a step takes a token of each. Medians of --runs.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import sys
import time
from pathlib import Path

import llama_cpp
import numpy as np
from llama_cpp_peer import CONTEXT_SLACK, quiet
from resident import resident


class Sequences:
    """One loaded model with room for several sequences."""

    def __init__(self, args: argparse.Namespace) -> None:
        most = max(args.sequences)
        params = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(str(args.gguf).encode(), params)
        if not self._model:
            raise SystemExit(f"llama.cpp cannot load {args.gguf}")
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = most * (args.prompt + args.decode + CONTEXT_SLACK)
        options.n_seq_max = most
        options.n_threads = options.n_threads_batch = args.threads
        self._context = llama_cpp.llama_init_from_model(self._model, options)
        if not self._context:
            raise SystemExit(f"llama.cpp cannot make a context for {most} sequences")
        vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(vocabulary)
        self._batch = llama_cpp.llama_batch_init(max(args.prompt, most), 0, 1)

    def forget(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), False)

    def read(self, sequence: int, tokens: list[int]) -> int:
        """Begin `sequence` with `tokens`; return its likeliest next token."""
        items = [(token, place, sequence) for place, token in enumerate(tokens)]
        return self._run(items, [len(items) - 1])[0]

    def step(self, tokens: list[int], place: int) -> list[int]:
        """Append one token to each sequence at `place`; return their likeliest next ones."""
        items = [(token, place, sequence) for sequence, token in enumerate(tokens)]
        return self._run(items, list(range(len(items))))

    def _run(self, items: list[tuple[int, int, int]], wanted: list[int]) -> list[int]:
        batch = self._batch
        batch.n_tokens = len(items)
        for index, (token, place, sequence) in enumerate(items):
            batch.token[index], batch.pos[index] = token, place
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, sequence
            batch.logits[index] = index in wanted
        if llama_cpp.llama_decode(self._context, batch):
            raise SystemExit("llama_decode failed")
        return [self._likeliest(index) for index in wanted]

    def _likeliest(self, index: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self._context, index)
        return int(np.ctypeslib.as_array(logits, shape=(self._vocabulary,)).argmax())


def measure(sequences: Sequences, count: int, args: argparse.Namespace) -> dict[str, float]:
    """Answer `count` prompts at once; return tokens per second of all together."""
    random = np.random.default_rng(count)
    prompts = random.integers(5, 200000, (count, args.prompt)).tolist()
    sequences.forget()
    start = time.perf_counter()
    tokens = [sequences.read(index, prompt) for index, prompt in enumerate(prompts)]
    read = time.perf_counter()
    for step in range(args.decode):
        tokens = sequences.step(tokens, args.prompt + step)
    end = time.perf_counter()
    return {
        "prefill": count * args.prompt / (read - start),
        "decode": count * args.decode / (end - read),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--sequences", nargs="+", type=int, default=[1, 4, 8])
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--decode", type=int, default=32, help="tokens of each answer")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p())
    llama_cpp.llama_backend_init()
    sequences = Sequences(args)
    measure(sequences, 1, args)  # not counted
    runs: dict[int, list[dict[str, float]]] = {count: [] for count in args.sequences}
    for number in range(args.runs):
        for count, found in runs.items():
            found.append(measure(sequences, count, args))
        print(f"round {number + 1} of {args.runs}", file=sys.stderr)
    report = {
        "llama-cpp-python": llama_cpp.__version__,
        "file": args.gguf.name,
        "threads": args.threads,
        "prompt tokens": args.prompt,
        "answer tokens": args.decode,
        "runs": args.runs,
        "load average": os.getloadavg()[0],
        "resident": resident(),
        "tokens per second": {
            str(count): {
                part: statistics.median(item[part] for item in found)
                for part in ("prefill", "decode")
            }
            for count, found in runs.items()
        },
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
