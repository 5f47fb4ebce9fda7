"""Tiny Gemma 3n checkpoints made by the real transformers classes, with every weight random.

Hugging Face initialises `altup.correct_output_scale` to zero, which switches the per-layer
embeddings off: a parity test on such a model would prove nothing about them. So each weight is
drawn here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Gemma3nForCausalLM, Gemma3nTextConfig, PreTrainedModel

from support.tiny import config_values, write_assets


def text_config(
    num_layers: int = 10, num_kv_shared_layers: int = 5, **changes: Any
) -> Gemma3nTextConfig:
    """Return `support.tiny`'s config as the real class."""
    values = config_values(num_layers, num_kv_shared_layers, **changes)
    return Gemma3nTextConfig(**values, attn_implementation="eager")


def randomise(model: PreTrainedModel, seed: int = 0) -> None:
    """Give every weight a random value, at scales that keep the network as calm as a trained one.

    All layers together add to the residual stream about as much as it holds, and attention is not
    saturated: otherwise rounding errors grow from layer to layer and int8 says nothing.
    """
    config = model.config
    layers = getattr(config, "text_config", config).num_hidden_layers
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if "q_norm" in name:
                weight.copy_(weight.shape[-1] ** -0.5 * (1 + 0.2 * noise))
            elif "post_" in name:
                weight.copy_(layers**-0.5 * (1 + 0.2 * noise))
            elif "norm" in name or "correct_output_scale" in name:
                weight.copy_(1 + 0.2 * noise)
            elif "_coefs" in name:
                weight.copy_(0.1 * noise)
            else:
                weight.copy_(noise / weight.shape[-1] ** 0.5)


def text_model(config: Gemma3nTextConfig, seed: int = 0) -> Gemma3nForCausalLM:
    """Return a random float32 model of the real class."""
    model = Gemma3nForCausalLM(config).eval()
    randomise(model, seed)
    return model


def save_checkpoint(
    model: PreTrainedModel, path: Path, submodels: Sequence[dict[str, Any]] = ()
) -> Path:
    """Save `model` with a tokenizer and a chat template, as a checkpoint directory; return it."""
    model.save_pretrained(path)
    write_assets(path, submodels)
    return path
