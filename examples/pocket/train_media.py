"""Trains pocket's eyes or ears; the language model is frozen, so its text answers do not change.

`python train_media.py vision` and `python train_media.py audio`, after codes.py; the second one
keeps what the first one saved. Two stages each:

1. the tower alone learns which vector of its code belongs where: cross-entropy over a picture's
   three digit slots, CTC over a clip's words;
2. tower, projection and the medium's own embeddings learn from the commands, through the language
   model in all its sizes.
"""

from __future__ import annotations

import argparse
import math
import random
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from codes import SLOTS, load_codes
from data import Split
from media import encode_user, key_words, vocabulary
from model import load_submodels, make_elastic, select
from multimodal import (
    audio_features,
    hard_embeddings,
    language_model,
    load_or_grow,
    logits_with_media,
    save,
)
from pool import Clips, Pictures, clip_pool, picture_pool
from tokenizer import AUDIO_IDS, AUDIO_TOKENS, IMAGE_IDS, encode_answer, load_tokenizer
from tokenizers import Tokenizer
from torch import nn
from torch.nn import functional
from train import IGNORE
from transformers import Gemma3nForCausalLM, Gemma3nForConditionalGeneration

SHARPNESS: Final = 14.0  # of the softmax over cosines


@dataclass(frozen=True)
class Step:
    """What a tower made of a batch: all soft tokens, stage 1's loss, right answers in percent."""

    soft: torch.Tensor
    loss: torch.Tensor
    right: float


def cosines(soft: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
    """Cosine of every soft token [..., hidden] with every vector of a code [n, hidden]."""
    return functional.normalize(soft, dim=-1) @ functional.normalize(code, dim=-1).T


class Vision:
    """Pictures of the pool, their code, and requests around them."""

    first_id = IMAGE_IDS
    names = ("vision_tower", "embed_vision")

    def __init__(
        self, model: Gemma3nForConditionalGeneration, split: Split, seed: int, count: int
    ) -> None:
        self.model, self.embedder = model, model.model.embed_vision
        self.code = load_codes()
        self.bf16 = False
        self.easy = False  # 128 x 128 pixels, a quarter of the work; the soft tokens are as many
        self.pool: Pictures = picture_pool(split, seed, count)
        self.rng = random.Random(f"vision-{split}-{seed}")

    def __len__(self) -> int:
        return len(self.pool.requests)

    def compile(self) -> None:
        """Train 2.6 times as fast: fused, and in bfloat16."""
        self.bf16 = True
        tower: Any = self.model.model.vision_tower.timm_model
        tower.forward_features = torch.compile(tower.forward_features, dynamic=False)

    def step(self, chosen: list[int]) -> Step:
        """Look at the pictures `chosen`."""
        pixels = torch.from_numpy(self.pool.pixels[chosen]).float() / 255
        if self.easy:
            pixels = functional.avg_pool2d(pixels, 2)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            soft = self.model.model.get_image_features(pixels).float()
        classes = torch.from_numpy(self.pool.cells[chosen])
        scores = cosines(soft, self.code["image.digits"])
        target = self.code["image.digits"][classes]
        away = 1 - functional.cosine_similarity(soft, target, dim=-1)
        loss = functional.cross_entropy(SHARPNESS * scores.flatten(0, 1), classes.flatten())
        number = slice(SLOTS.start, SLOTS.stop)
        right = (scores.argmax(-1) == classes)[:, number].all(1).float().mean().item()
        return Step(soft, loss + away.mean(), 100 * right)


class Audio:
    """Clips of the pool, the code of their words, and the commands they are."""

    first_id = AUDIO_IDS
    names = ("audio_tower", "embed_audio")

    def __init__(
        self, model: Gemma3nForConditionalGeneration, split: Split, seed: int, count: int
    ) -> None:
        self.model, self.embedder = model, model.model.embed_audio
        self.code = load_codes()
        self.pool: Clips = clip_pool(split, seed, count)
        self.rng = random.Random(f"audio-{split}-{seed}")
        self.easy = False  # words are looked for near where they should be
        self.varied = split == "train"
        self.index = {word: i for i, word in enumerate(vocabulary())}

    def __len__(self) -> int:
        return len(self.pool.requests)

    def step(self, chosen: list[int]) -> Step:
        """Listen to the clips `chosen`; in training with bands and moments masked."""
        frames = torch.from_numpy(self.pool.frames[chosen])
        features = torch.from_numpy(
            self.pool.features[chosen][:, : int(frames.max())].astype(np.float32)
        )
        if self.varied:
            self._mask(features, frames)
        features[torch.arange(features.shape[1])[None] >= frames[:, None]] = 0
        soft, rows = audio_features(self.model, features, frames)
        # Behind the clip come padding rows, as in Gemma3nModel.forward.
        padding = hard_embeddings(self.embedder, AUDIO_IDS)[-1]
        soft = functional.pad(soft, (0, 0, 0, AUDIO_TOKENS - soft.shape[1]))
        beyond = torch.arange(AUDIO_TOKENS)[None] >= rows[:, None]
        nearness = cosines(soft, self.code["audio.words"])
        scores = functional.log_softmax(SHARPNESS * nearness, -1)
        soft = torch.where(beyond[..., None], padding, soft)
        said = [
            [self.index[word] for word in key_words(self.pool.requests[i].words)] for i in chosen
        ]
        blank = len(self.index)
        loss = functional.ctc_loss(
            scores.transpose(0, 1), torch.tensor([word for words in said for word in words]), rows,
            torch.tensor([len(words) for words in said]), blank, zero_infinity=True,
        )  # fmt: skip
        if self.easy:
            places = [_guess(self.pool.requests[i].words, int(self.pool.frames[i])) for i in chosen]
            loss = self._near(scores, said, places) + 0.1 * loss
        best = scores.argmax(-1)
        right = 0
        for row, words, count in zip(best, said, rows, strict=True):
            heard = torch.unique_consecutive(row[:count])
            right += heard[heard != blank].tolist() == words
        # CTC wants the right vector nearest, the language model wants it close.
        away = (1 - nearness.amax(-1))[~beyond].mean()
        return Step(soft, loss + away, 100 * right / len(chosen))

    @staticmethod
    def _near(scores: torch.Tensor, said: list[list[int]], places: list[list[int]]) -> torch.Tensor:
        """CTC alone takes long to find out where words are; this rewards one in a short window."""
        found = [
            row[max(place - 1, 0) : place + 3, word].logsumexp(0)
            for row, words, rows in zip(scores, said, places, strict=True)
            for word, place in zip(words, rows, strict=True)
        ]
        return -torch.stack(found).clamp(max=0).mean()

    def _mask(self, features: torch.Tensor, frames: torch.Tensor) -> None:
        features += torch.empty(len(features), 1, 1).uniform_(-1.5, 1.5)  # louder or softer
        for clip, length in zip(features, frames, strict=True):
            clip.copy_(clip.roll(self.rng.randint(-4, 4), 1))  # a longer or shorter throat
            for _ in range(2):
                low, width = self.rng.randrange(128), self.rng.randrange(16)
                clip[:, low : low + width] = clip.mean()
            at, long = self.rng.randrange(int(length)), self.rng.randrange(12)
            clip[at : at + long] = clip.mean()


def _guess(said: str, frames: int) -> list[int]:
    """Roughly the row of soft tokens in which each key word ends, by letters."""
    first, last = 15, frames - 38  # the silence around it, on average
    ends = [match.end() / len(said) for match in re.finditer(r"\S+", said)]
    kept = [end for end, word in zip(ends, said.split(), strict=True) if key_words(word)]
    return [int(first + end * (last - first)) // 16 for end in kept]


@torch.no_grad()
def set_own_embeddings(medium: Vision | Audio) -> None:
    """Set the medium's own embeddings so that they come out as the code has them."""
    target = medium.code["image.hard" if isinstance(medium, Vision) else "audio.hard"]
    inverse = torch.linalg.pinv(medium.embedder.embedding_projection.weight)
    medium.embedder.embedding.weight.copy_(target @ inverse.T)


def batches(medium: Vision | Audio, rows: int) -> Iterator[list[int]]:
    """Go over the pool again and again, shuffled."""
    while True:
        order = list(range(len(medium)))
        medium.rng.shuffle(order)
        for at in range(0, len(order) - rows + 1, rows):
            yield order[at : at + rows]


def answers(
    medium: Vision | Audio,
    lm: Gemma3nForCausalLM,
    tokenizer: Tokenizer,
    chosen: list[int],
    soft: torch.Tensor,
) -> tuple[torch.Tensor, float]:
    """Loss of the commands, and how many are right in percent."""
    pairs = [
        (encode_user(tokenizer, request.content), encode_answer(tokenizer, request.command))
        for request in (medium.pool.requests[i] for i in chosen)
    ]
    hard = hard_embeddings(medium.embedder, medium.first_id)
    logits, labels = logits_with_media(lm, pairs, soft, hard, medium.first_id)
    loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
    right = ((logits.argmax(-1) == labels) | (labels == IGNORE)).all(1).float().mean().item()
    return loss, 100 * right


@torch.no_grad()
def check(medium: Vision | Audio, lm: Gemma3nForCausalLM, tokenizer: Tokenizer, rows: int) -> str:
    """Right in percent on a small pool of the other split: of the code, and of the commands."""
    codes, commands = [], []
    for at in range(0, len(medium) - rows + 1, rows):
        chosen = list(range(at, at + rows))
        step = medium.step(chosen)
        codes.append(step.right)
        commands.append(answers(medium, lm, tokenizer, chosen, step.soft)[1])
    return f"code {np.mean(codes):.1f} % commands {np.mean(commands):.1f} %"


def run(
    medium: Vision | Audio, held_out: Vision | Audio, options: argparse.Namespace, stage: int
) -> None:
    """Train one stage and save."""
    model: Gemma3nForConditionalGeneration = medium.model
    lm, tokenizer, (nested_width, submodels) = (
        language_model(model), load_tokenizer(), load_submodels(),
    )  # fmt: skip
    layers = make_elastic(lm)
    weights: list[nn.Parameter] = [
        p for name in medium.names for p in getattr(model.model, name).parameters()
    ]
    average = [weight.detach().clone() for weight in weights]
    minutes = options.minutes[stage - 1]
    rate = options.lr[stage - 1]
    optimizer = torch.optim.AdamW(weights, lr=rate, betas=(0.9, 0.98), weight_decay=0.02)
    started, shown, progress = time.time(), 0.0, 0.0
    for number, chosen in enumerate(batches(medium, options.rows)):
        optimizer.param_groups[0]["lr"] = rate * min(
            (number + 1) / 100, 0.5 * (1 + math.cos(math.pi * progress)) + 1e-3
        )
        medium.easy = stage == 1 and progress < options.easy
        step = medium.step(chosen)
        loss, right = step.loss, step.right
        if stage == 2:
            select(lm, layers, medium.rng.choice(submodels), nested_width)
            answer_loss, right = answers(medium, lm, tokenizer, chosen, step.soft)
            loss = answer_loss + 0.1 * loss
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        shown += 0.02 * (right - shown)
        decay = min(0.995, (number + 1) / (number + 20))
        for slow, fast in zip(average, weights, strict=True):
            slow.lerp_(fast.detach(), 1 - decay)
        progress = (time.time() - started) / 60 / minutes
        if number % 50 == 49 or progress >= 1:
            print(f"stage {stage} step {number + 1} {time.time() - started:.0f}s "
                  f"loss {loss.item():.3f} right {shown:.1f} %", flush=True)  # fmt: skip
        if number % 200 == 199 or progress >= 1:
            current = [weight.detach().clone() for weight in weights]
            _put(weights, average)
            if stage == 1:
                set_own_embeddings(medium)  # the projection behind them has changed
            select(lm, layers, submodels[-1], nested_width)
            print("held out:", check(held_out, lm, tokenizer, options.rows), flush=True)
            keep(medium)
            if progress >= 1:
                return
            _put(weights, current)


def keep(medium: Vision | Audio) -> None:
    """Put this medium's tower and embedder into the checkpoint as it is by now."""
    latest = load_or_grow()  # another run may have trained the other medium meanwhile
    for name in medium.names:
        trained = getattr(medium.model.model, name).state_dict()
        getattr(latest.model, name).load_state_dict(trained)
    save(latest)


def _put(weights: list[nn.Parameter], values: list[torch.Tensor]) -> None:
    for weight, value in zip(weights, values, strict=True):
        weight.data.copy_(value)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("medium", choices=["vision", "audio"])
    parser.add_argument("--pool", type=int, default=12_000, help="pictures or clips to train on")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument(
        "--minutes", type=float, nargs=2, default=(20.0, 8.0), help="of each stage; 0 leaves it out"
    )
    parser.add_argument("--lr", type=float, nargs=2, default=(2e-3, 5e-4), help="by stage")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--easy", type=float, default=0.5, help="part of stage 1 that is made easy")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--finish", action="store_true", help="go on from checkpoint/")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    model = load_or_grow()
    kind = Vision if options.medium == "vision" else Audio
    medium = kind(model, "train", 0, options.pool)
    held_out = kind(model, "heldout", 0, 250)
    for name in medium.names:
        getattr(model.model, name).requires_grad_(True)
    if options.compile and isinstance(medium, Vision):
        medium.compile()
    for stage in (1, 2):
        if options.minutes[stage - 1] > 0:
            run(medium, held_out, options, stage)


if __name__ == "__main__":
    main()
