"""Held-out exact match of every size on pictures and clips, by transformers at float32.

The whole `Gemma3nForConditionalGeneration` runs, from pixels and log-mel frames to the command, and
greedy decoding is checked as in evaluate.py: one forward pass over prompt and command. Pictures
have handwriting and fonts, clips have voices, that were never trained; the seed is drawn after
training and looked at once. Writes results.json's `media` and prints the table.
"""

from __future__ import annotations

import argparse
import json
from typing import Any, Final

import numpy as np
import torch
from evaluate import RESULTS
from media import Pictured, Spoken, encode_user
from model import load_submodels, make_elastic, select
from multimodal import language_model, load
from pool import Clips, Pictures, clip_pool, picture_pool
from tokenizer import PAD, encode_answer, load_tokenizer
from torch import nn
from transformers import Gemma3nForConditionalGeneration

HELD_OUT_SEED: Final = 9104
BATCH: Final = 50


def inputs(pool: Pictures | Clips, chosen: slice) -> dict[str, torch.Tensor]:
    """What the model's forward takes for some of a pool."""
    if isinstance(pool, Pictures):
        return {"pixel_values": torch.from_numpy(pool.pixels[chosen]).float() / 255}
    frames = torch.from_numpy(pool.frames[chosen])
    longest = int(frames.max())
    features = pool.features[chosen][:, :longest].astype(np.float32)
    mask = torch.arange(longest)[None] < frames[:, None]
    return {"input_features": torch.from_numpy(features), "input_features_mask": mask}


@torch.no_grad()
def exact_matches(model: Gemma3nForConditionalGeneration, pool: Pictures | Clips) -> list[bool]:
    """Whether greedy decoding gives each request's command, in order."""
    tokenizer = load_tokenizer()
    result = []
    requests: list[Pictured] | list[Spoken] = pool.requests
    for at in range(0, len(requests), BATCH):
        chosen = slice(at, at + BATCH)
        prompts = [encode_user(tokenizer, request.content) for request in requests[chosen]]
        answers = [encode_answer(tokenizer, request.command) for request in requests[chosen]]
        rows = [torch.tensor([*p, *a[:-1]]) for p, a in zip(prompts, answers, strict=True)]
        # Padding stands at the end, where causal attention does not look.
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
        best = model(input_ids=ids, use_cache=True, **inputs(pool, chosen)).logits.argmax(-1)
        for row, prompt, answer in zip(best, prompts, answers, strict=True):
            first = len(prompt) - 1
            result.append(row[first : first + len(answer)].tolist() == answer)
    return result


def percent(matches: list[bool]) -> float:
    """Share of right ones."""
    return round(100 * sum(matches) / len(matches), 2)


def evaluate(count: int, seed: int) -> dict[str, Any]:
    """Measure all sizes."""
    pictures, clips = picture_pool("heldout", seed, count), clip_pool("heldout", seed, count)
    model = load()
    layers = make_elastic(language_model(model))
    nested_width, submodels = load_submodels()
    rows = []
    for submodel in submodels:
        select(language_model(model), layers, submodel, nested_width)
        seen, heard = exact_matches(model, pictures), exact_matches(model, clips)
        handwritten = [ok for ok, hand in zip(seen, pictures.handwritten, strict=True) if hand]
        displays = [ok for ok, hand in zip(seen, pictures.handwritten, strict=True) if not hand]
        row = {
            "submodel": submodel.name,
            "float32_image_exact_match_percent": percent(seen),
            "float32_handwritten_exact_match_percent": percent(handwritten),
            "float32_display_exact_match_percent": percent(displays),
            "float32_audio_exact_match_percent": percent(heard),
        }
        print(*row.values(), flush=True)
        rows.append(row)
    return {
        "split": "heldout",
        "seed": seed,
        "pictures": len(pictures.requests),
        "handwritten": int(pictures.handwritten.sum()),
        "clips": len(clips.requests),
        "rows": rows,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--count", type=int, default=1000, help="of pictures, and of clips")
    parser.add_argument("--seed", type=int, default=HELD_OUT_SEED)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dry", action="store_true", help="print only")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    media = evaluate(options.count, options.seed)
    if not options.dry:
        content = json.loads(RESULTS.read_text(encoding="utf-8"))
        content["media"] = media
        RESULTS.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
