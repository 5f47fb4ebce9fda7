"""One run of mistral.rs on one checkpoint, for run.py: load, read prompts, answer; prints JSON.

Runs in an environment of its own (`pip install mistralrs`). Weights are quantised while they are
loaded, and a MatFormer slice is cut out then, so both are in the load time. Speeds are those that
mistral.rs states for each request.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import string
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from resident import resident

WARM_UP_TOKENS = 16


def measure(args: argparse.Namespace) -> dict[str, Any]:
    os.environ["RAYON_NUM_THREADS"] = str(args.threads)
    os.environ["HF_HUB_OFFLINE"] = "1"
    # Read when it is imported.
    from mistralrs import CompletionRequest, MultimodalArchitecture, Runner, Which

    def ask(letters: int, answer: int) -> Any:
        """Answer a prompt of so many tokens: the checkpoint's tokenizer takes a byte for one."""
        prompt = "".join(random.Random(letters).choices(string.ascii_letters, k=letters))
        request = CompletionRequest(
            model="default", prompt=prompt, max_tokens=answer, temperature=0.0
        )
        usage = runner.send_completion_request(request).usage
        if (usage.prompt_tokens, usage.completion_tokens) != (letters, answer):
            raise SystemExit(f"asked for {letters} and {answer} tokens, got {usage}")
        return usage

    start = time.perf_counter()
    model = Which.MultimodalPlain(
        model_id=str(args.checkpoint),
        arch=MultimodalArchitecture.Gemma3n,
        tokenizer_json=str(args.checkpoint / "tokenizer.json"),
        matformer_config_path=str(args.checkpoint / "slices.csv"),
        matformer_slice_name=args.submodel,
    )
    runner = Runner(
        which=model, token_source="none", prefix_cache_n=0, in_situ_quant=f"Q{args.bits}_0"
    )
    loaded = time.perf_counter()
    ask(WARM_UP_TOKENS, 2)
    first_token = time.perf_counter()
    rates = []
    for count in args.prompt:
        usage = ask(count, args.decode)
        rates.append(
            {
                "prompt_tokens": count,
                "prefill": count / usage.total_prompt_time_sec,
                "decode": args.decode / usage.total_completion_time_sec,
            }
        )
    return {
        "load_seconds": loaded - start,
        "first_token_seconds": first_token - start,
        "rates": rates,
        "steady": resident(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="from mistralrs_checkpoint.py")
    parser.add_argument("submodel", help="a name in the checkpoint's slices.csv")
    parser.add_argument("--bits", type=int, choices=(4, 8), default=4)
    parser.add_argument("--prompt", nargs="+", type=int, default=[128, 512, 2048])
    parser.add_argument("--decode", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    # mistral.rs logs to stdout, which is for the one JSON object: it gets stderr instead.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    run = measure(args)
    print(json.dumps({"run": run, "version": f"mistralrs {version('mistralrs')}"}), file=answer)


if __name__ == "__main__":
    main()
