"""Held-out exact match of every nested size, through transformers at float32 with use_cache=True.

An answer counts when the generated text equals the expected command character by character. Writes
results.json and prints the table. Columns this script does not measure (int8, through nestd's
engine) stay as they are in results.json. Greedy decoding in batches of equal prompt length, so
nothing is padded.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from itertools import islice
from pathlib import Path
from typing import Any, Final

import torch
from data import Example, examples
from model import effective_parameters, load_model, load_submodels, make_elastic, select
from tokenizer import END_OF_TURN, EOS, encode_prompt, load_tokenizer
from tokenizers import Tokenizer
from transformers import DynamicCache, Gemma3nForCausalLM

RESULTS: Final = Path(__file__).parent / "results.json"
HELD_OUT_SEED: Final = 2024
MAX_NEW_TOKENS: Final = 96


@torch.no_grad()
def generate(model: Gemma3nForCausalLM, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy answers to prompts of one length, without the stop token."""
    cache = DynamicCache(config=model.config)
    step = torch.tensor(prompts)
    answers: list[list[int]] = [[] for _ in prompts]
    running = set(range(len(prompts)))
    for _ in range(MAX_NEW_TOKENS):
        logits = model(
            input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits
        step = logits[:, -1].argmax(-1, keepdim=True)
        for i in list(running):
            token = int(step[i])
            if token in (EOS, END_OF_TURN):
                running.discard(i)
            else:
                answers[i].append(token)
        if not running:
            break
    return answers


def answer_all(
    model: Gemma3nForCausalLM, tokenizer: Tokenizer, requests: list[str], batch: int = 64
) -> list[str]:
    """The model's answer to every request, in order."""
    by_length: dict[int, list[tuple[int, list[int]]]] = defaultdict(list)
    for i, request in enumerate(requests):
        prompt = encode_prompt(tokenizer, request)
        by_length[len(prompt)].append((i, prompt))
    answers = [""] * len(requests)
    for group in by_length.values():
        for at in range(0, len(group), batch):
            part = group[at : at + batch]
            for (i, _), ids in zip(part, generate(model, [p for _, p in part]), strict=True):
                answers[i] = tokenizer.decode(ids, skip_special_tokens=False)
    return answers


def family_of(command: str) -> str:
    """A coarse label for the error listing: the action and the slots it came with."""
    content: dict[str, Any] = json.loads(command)
    kinds = [key for key in ("time", "after", "if", "property", "color", "stat") if key in content]
    return " ".join([content["action"], *kinds])


def evaluate(samples: list[Example], names: list[str] | None, show_errors: int) -> None:
    """Measure the sizes named (all when None) and update results.json."""
    torch.set_num_threads(2)
    tokenizer, model = load_tokenizer(), load_model()
    nested_width, submodels = load_submodels()
    layers = make_elastic(model)
    content = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    rows = {row["submodel"]: row for row in content.get("rows", [])}
    expected = [example.command for example in samples]
    for submodel in submodels:
        if names is not None and submodel.name not in names:
            continue
        select(model, layers, submodel, nested_width)
        answers = answer_all(model, tokenizer, [example.request for example in samples])
        wrong = [i for i, answer in enumerate(answers) if answer != expected[i]]
        row = rows.setdefault(submodel.name, {"submodel": submodel.name})
        row["effective_parameters"] = effective_parameters(model.config, submodel, nested_width)
        row["float32_exact_match_percent"] = round(100 * (1 - len(wrong) / len(samples)), 2)
        print(f"{submodel.name:8} {row['float32_exact_match_percent']:6.2f} %", flush=True)
        counts = Counter(family_of(expected[i]) for i in wrong)
        if show_errors:
            print("   errors by kind:", dict(counts.most_common(12)))
        for i in wrong[:show_errors]:
            print(f"   {samples[i].request}\n     want {expected[i]}\n     got  {answers[i]}")
    ordered = [rows[submodel.name] for submodel in submodels if submodel.name in rows]
    result = {
        "split": "heldout",
        "seed": HELD_OUT_SEED,
        "examples": len(samples),
        "weights": "checkpoint/model.safetensors (bfloat16), computed in float32",
        "rows": ordered,
    }
    RESULTS.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--examples", type=int, default=4000)
    parser.add_argument("--submodels", nargs="*", help="names; all by default")
    parser.add_argument("--show-errors", type=int, default=0)
    options = parser.parse_args()
    samples = list(islice(examples("heldout", HELD_OUT_SEED), options.examples))
    evaluate(samples, options.submodels, options.show_errors)


if __name__ == "__main__":
    main()
