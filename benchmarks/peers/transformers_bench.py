"""One run of transformers on a checkpoint, for run.py: load, read prompts, answer; prints JSON.

In bfloat16, eager, with its dynamic cache. What is measured, and how, is what
`nestd.cli.bench_measure.run` does for nestd.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from resident import resident
from transformers import AutoModelForCausalLM, DynamicCache

WARM_UP_TOKENS = 16


class Sequence:
    """One sequence and its cache."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._cache = DynamicCache(config=model.config)

    def run(self, tokens: list[int]) -> int:
        """Append `tokens`; return the likeliest next one."""
        ids = torch.tensor([tokens])
        output = self._model(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        return int(output.logits[0, -1].argmax())


@torch.inference_mode()
def measure(args: argparse.Namespace) -> dict[str, Any]:
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype=torch.bfloat16).eval()
    loaded = time.perf_counter()
    longest = max(*args.prompt, WARM_UP_TOKENS)
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size_per_layer_input, longest)
    tokens = ids.tolist()
    warm_up = Sequence(model)
    token = warm_up.run(tokens[:WARM_UP_TOKENS])
    first_token = time.perf_counter()
    warm_up.run([token])
    rates = []
    for count in args.prompt:
        sequence = Sequence(model)
        begin = time.perf_counter()
        token = sequence.run(tokens[:count])
        read = time.perf_counter()
        for _ in range(args.decode):
            token = sequence.run([token])
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
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--prompt", nargs="+", type=int, default=[128, 512, 2048])
    parser.add_argument("--decode", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    run = measure(args)
    version = f"transformers {transformers.__version__}, torch {torch.__version__}"
    print(json.dumps({"run": run, "version": version}))


if __name__ == "__main__":
    main()
