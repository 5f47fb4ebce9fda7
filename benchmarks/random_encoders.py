"""Write a checkpoint whose encoders have Gemma 3n's real shapes, and what they should answer.

    python benchmarks/random_encoders.py /path/to/checkpoint

The text part is a stub of real width. Weights are random, in bfloat16, with heavy tails (Student's
t with three degrees of freedom): int8 is trivially faithful to normal ones. `expected.npz` beside
the weights holds inputs and transformers' answers in float32. Needs the `convert` extra and 8 GB.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from random_checkpoint import POOL, write_tokenizer
from transformers import (
    Gemma3nAudioConfig,
    Gemma3nConfig,
    Gemma3nForConditionalGeneration,
    Gemma3nTextConfig,
    Gemma3nVisionConfig,
)

SIZES = (256, 512, 768)
CLIPS = {"5 s": 497, "30 s": 2997}  # mel frames
DEGREES = 3


def config() -> Gemma3nConfig:
    text = Gemma3nTextConfig(
        num_hidden_layers=2,
        num_kv_shared_layers=0,
        intermediate_size=[256] * 2,
        activation_sparsity_pattern=[0.0] * 2,
        layer_types=["sliding_attention", "full_attention"],
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        vocab_size=512,
        vocab_size_per_layer_input=512,
        hidden_size_per_layer_input=16,
        laurel_rank=16,
    )
    vision, audio = Gemma3nVisionConfig(), Gemma3nAudioConfig()
    return Gemma3nConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), audio_config=audio.to_dict()
    )


def randomise(model: torch.nn.Module) -> None:
    """Give every weight a random value that bfloat16 holds."""
    random = np.random.default_rng(0)
    pool = torch.from_numpy(random.standard_t(DEGREES, POOL).astype(np.float32) / DEGREES**0.5)
    for name, weight in model.named_parameters():
        count, start = weight.numel(), int(random.integers(POOL))
        repeats = -(-(start + count) // POOL)
        noise = pool.repeat(repeats)[start : start + count].reshape(weight.shape)
        if weight.dim() > 1:
            noise = noise / math.prod(weight.shape[1:]) ** 0.5
        elif name.endswith(("bias", "per_dim_scale")):
            noise = 0.1 * noise
        elif name.endswith("gamma"):
            noise = 0.2 + 0.04 * noise
        else:
            noise = 1 + 0.1 * noise
        with torch.no_grad():
            weight.copy_(noise.to(torch.bfloat16))


def pictures(size: int) -> np.ndarray:
    """A picture with a photo's spectrum, [1, 3, size, size] in 0..1."""
    random = np.random.default_rng(size)
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    frequency[0, 0] = np.inf
    noise = random.normal(size=(2, 3, *frequency.shape))
    planes = np.fft.irfft2((noise[0] + 1j * noise[1]) / frequency, s=(size, size))
    return np.clip(planes / planes.std() * 0.18 + 0.5, 0, 1).astype(np.float32)[None]


def sound(frames: int) -> np.ndarray:
    """Log-mel frames that change slowly in time and over bands, [1, frames, 128]."""
    noise = np.random.default_rng(frames).normal(size=(frames + 8, 136))
    smooth = np.lib.stride_tricks.sliding_window_view(noise, (9, 9)).mean((-1, -2))
    return (18 * smooth - 3).astype(np.float32)[None]


def expected(model: Gemma3nForConditionalGeneration) -> dict[str, Any]:
    """Return inputs and transformers' answers by name of graph and input."""
    arrays: dict[str, Any] = {}
    with torch.no_grad():
        for size in SIZES:
            pixels = pictures(size)
            arrays[f"{size}/input"] = pixels
            arrays[f"{size}/output"] = model.get_image_features(torch.from_numpy(pixels)).numpy()
        for name, frames in CLIPS.items():
            mel = torch.from_numpy(sound(frames))
            padding = torch.zeros(1, frames, dtype=torch.bool)
            arrays[f"{name}/input"] = mel.numpy()
            features, _ = model.model.get_audio_features(mel, padding)
            arrays[f"{name}/output"] = features.numpy()
    return arrays


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path)
    path = parser.parse_args().path
    model = Gemma3nForConditionalGeneration(config()).eval()
    randomise(model)
    path.mkdir(parents=True)
    np.savez(path / "expected.npz", **expected(model))
    model.to(torch.bfloat16).save_pretrained(path)
    write_tokenizer(path)
    (path / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 2, "eos_token_id": [1], "pad_token_id": 0})
    )


if __name__ == "__main__":
    main()
