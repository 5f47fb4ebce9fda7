"""Held-out exact match of every nested size, through transformers at float32 with use_cache=True.

Greedy decoding reproduces a command exactly when, after the prompt and each prefix of the command,
the most likely token is the command's next one, and <end_of_turn> comes last. One forward pass over
prompt and command checks all of these at once. Writes results.json and prints the table; columns
this script does not measure (int8, through nestd's engine) stay as they are.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any, Final

import torch
from data import Example, examples
from model import effective_parameters, load_model, load_submodels, make_elastic, select
from tokenizer import END_OF_TURN, EOS, PAD, encode_answer, encode_prompt, load_tokenizer
from tokenizers import Tokenizer
from torch import nn
from transformers import DynamicCache, Gemma3nForCausalLM

RESULTS: Final = Path(__file__).parent / "results.json"
HELD_OUT_SEED: Final = 9002
MAX_NEW_TOKENS: Final = 96


@torch.no_grad()
def exact_matches(
    model: Gemma3nForCausalLM, tokenizer: Tokenizer, samples: list[Example], batch: int = 64
) -> list[bool]:
    """Whether greedy decoding gives each sample's command, in order."""
    encoded = [
        (encode_prompt(tokenizer, sample.request), encode_answer(tokenizer, sample.command))
        for sample in samples
    ]
    order = sorted(range(len(samples)), key=lambda i: len(encoded[i][0]) + len(encoded[i][1]))
    result = [False] * len(samples)
    for at in range(0, len(order), batch):
        part = order[at : at + batch]
        rows = [torch.tensor([*encoded[i][0], *encoded[i][1][:-1]]) for i in part]
        # Padding stands at the end, where causal attention does not look.
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
        chosen = model(input_ids=ids, use_cache=True).logits.argmax(-1)
        for row, i in enumerate(part):
            prompt, answer = encoded[i]
            first = len(prompt) - 1
            result[i] = chosen[row, first : first + len(answer)].tolist() == answer
    return result


@torch.no_grad()
def generate(model: Gemma3nForCausalLM, tokenizer: Tokenizer, request: str) -> str:
    """The model's own greedy answer to one request."""
    cache, step = DynamicCache(config=model.config), encode_prompt(tokenizer, request)
    answer: list[int] = []
    while len(answer) < MAX_NEW_TOKENS:
        logits = model(input_ids=torch.tensor([step]), past_key_values=cache, use_cache=True).logits
        step = [int(logits[0, -1].argmax())]
        if step[0] in (EOS, END_OF_TURN):
            break
        answer += step
    text: str = tokenizer.decode(answer, skip_special_tokens=False)
    return text


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
        matches = exact_matches(model, tokenizer, samples)
        wrong = [i for i, match in enumerate(matches) if not match]
        row = rows.setdefault(submodel.name, {"submodel": submodel.name})
        row["effective_parameters"] = effective_parameters(model.config, submodel, nested_width)
        row["float32_exact_match_percent"] = round(100 * (1 - len(wrong) / len(samples)), 2)
        print(f"{submodel.name:8} {row['float32_exact_match_percent']:6.2f} %", flush=True)
        counts = Counter(family_of(expected[i]) for i in wrong)
        if show_errors:
            print("   errors by kind:", dict(counts.most_common(12)))
        for i in wrong[:show_errors]:
            got = generate(model, tokenizer, samples[i].request)
            print(f"   {samples[i].request}\n     want {expected[i]}\n     got  {got}")
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
