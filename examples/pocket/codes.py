"""What the towers are to say: soft tokens that the frozen model takes for digits and words.

A picture's code is one of eleven vectors (ten digits, none) in each of its sixteen cells, of which
three carry the number. A clip's code is one vector for each word, with a blank
between and behind. Both are learned through the language model in all its sizes, without a tower:
that is quick, and a tower then learns from labels which vector belongs where.

`python codes.py` writes codes.safetensors. A tower goes on with the codes that it began with.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, Final

import torch
from media import Pictured, Spoken, encode_user, key_words, pictured, spoken, vocabulary
from model import load_submodels, make_elastic, select
from multimodal import CHECKPOINT, GROUP, language_model, load_or_grow, logits_with_media
from pictures import NONE
from safetensors.torch import load_file, save_file
from tokenizer import (
    AUDIO_IDS,
    AUDIO_TOKENS,
    IMAGE_IDS,
    IMAGE_TOKENS,
    encode_answer,
    load_tokenizer,
)
from tokenizers import Tokenizer
from torch import nn
from torch.nn import functional
from train import IGNORE
from transformers import Gemma3nForCausalLM

SLOTS: Final = range(4, 7)  # of a picture's soft tokens, those that carry digits
ROWS: Final = 16
NOISE: Final = 0.3
CODES: Final = CHECKPOINT.parent / "codes.safetensors"


def unit(vectors: torch.Tensor) -> torch.Tensor:
    """Scale to a root mean square of one, as every soft token has."""
    result: torch.Tensor = functional.normalize(vectors, dim=-1) * vectors.shape[-1] ** 0.5
    return result


class PictureCode(nn.Module):
    """Soft tokens of a number, and the embeddings of the picture's own ids."""

    def __init__(self, lm: Gemma3nForCausalLM, tokenizer: Tokenizer) -> None:
        super().__init__()
        embed, ids = lm.model.embed_tokens.weight.detach(), _ids(tokenizer, "0123456789 ")
        self.digits = nn.Parameter(embed[ids].clone())
        self.hard = nn.Parameter(embed[_ids(tokenizer, "\n")].repeat(GROUP, 1))

    def forward(self, requests: list[Pictured], rng: random.Random) -> torch.Tensor:
        """Return [requests, IMAGE_TOKENS, hidden]."""
        del rng
        classes = torch.full((len(requests), IMAGE_TOKENS), NONE)
        for row, request in zip(classes, requests, strict=True):
            digits = [int(digit) for digit in str(request.number)]
            row[SLOTS.start : SLOTS.start + len(digits)] = torch.tensor(digits)
        return unit(self.digits[classes])


class WordCode(nn.Module):
    """Soft tokens of words at random distances, and the embeddings of the clip's own ids."""

    def __init__(self, lm: Gemma3nForCausalLM, tokenizer: Tokenizer) -> None:
        super().__init__()
        embed = lm.model.embed_tokens.weight.detach()
        self.index = {word: i for i, word in enumerate(vocabulary())}
        means = [embed[_ids(tokenizer, f" {word}")].mean(0) for word in self.index]
        blank = embed[_ids(tokenizer, " ")].mean(0)
        self.words = nn.Parameter(torch.stack([*means, blank]))  # the blank comes last
        self.hard = nn.Parameter(embed[_ids(tokenizer, "\n")].repeat(GROUP, 1))

    def forward(self, requests: list[Spoken], rng: random.Random) -> torch.Tensor:
        """Return [requests, AUDIO_TOKENS, hidden]."""
        blank, padding = len(self.index), len(self.index) + 1
        table = torch.cat([self.words, self.hard[-1:]])
        rows = []
        for request in requests:
            row = [blank] * (AUDIO_TOKENS + 1)
            while len(row) > AUDIO_TOKENS:
                row = [blank] * rng.randint(0, 4)
                for word in key_words(request.words):
                    row += [self.index[word]] * rng.choice([1, 1, 2])
                    row += [blank] * rng.randint(0, 4)
            rows.append(row + [padding] * (AUDIO_TOKENS - len(row)))
        return unit(table[torch.tensor(rows)])


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def learn(
    code: PictureCode | WordCode,
    stream: Iterator[Any],
    first_id: int,
    lm: Gemma3nForCausalLM,
    steps: int,
) -> None:
    """Learn a code through the language model, a random size in every step."""
    tokenizer, (nested_width, submodels) = load_tokenizer(), load_submodels()
    layers = make_elastic(lm)
    optimizer = torch.optim.Adam(code.parameters(), lr=0.02)
    rng, started = random.Random(0), time.time()
    forward: Callable[..., torch.Tensor] = code
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / steps)
        select(lm, layers, rng.choice(submodels), nested_width)
        requests = list(islice(stream, ROWS))
        pairs = [
            (encode_user(tokenizer, r.content), encode_answer(tokenizer, r.command))
            for r in requests
        ]
        soft = forward(requests, rng)
        soft = unit(soft + NOISE * torch.randn_like(soft))  # no tower will hit them exactly
        logits, labels = logits_with_media(lm, pairs, soft, unit(code.hard), first_id)
        loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 49:
            print(f"step {step + 1} {time.time() - started:.0f}s loss {loss:.4f}", flush=True)
    select(lm, layers, submodels[-1], nested_width)


def load_codes() -> dict[str, torch.Tensor]:
    """What `main` wrote: image.digits, audio.words, and hard of both."""
    codes: dict[str, torch.Tensor] = load_file(CODES)
    return codes


def main() -> None:
    """Learn one code or both and write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("kinds", nargs="*", default=["image", "audio"], metavar="image|audio")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lm, tokenizer = language_model(load_or_grow()), load_tokenizer()
    codes = load_codes() if CODES.exists() else {}
    for kind in options.kinds:
        code: PictureCode | WordCode
        if kind == "image":
            code = PictureCode(lm, tokenizer)
            learn(code, pictured("train", 0), IMAGE_IDS, lm, options.steps)
        else:
            code = WordCode(lm, tokenizer)
            learn(code, spoken("train", 0), AUDIO_IDS, lm, options.steps)
        for name, weight in code.named_parameters():
            codes[f"{kind}.{name}"] = unit(weight.detach())
    save_file(codes, CODES)


if __name__ == "__main__":
    main()
