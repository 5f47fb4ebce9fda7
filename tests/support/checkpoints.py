"""Tiny Gemma 3n checkpoints made by the real transformers classes, with every weight random.

Hugging Face initialises `altup.correct_output_scale` to zero, which switches the per-layer embeddings
off: a parity test on such a model would prove nothing about them. So each weight is drawn here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

VOCABULARY = 320
HIDDEN = 64
WIDE, NARROW = 128, 64
WINDOW = 16


def text_config(num_layers: int = 10, num_kv_shared_layers: int = 5, **changes: Any) -> Gemma3nTextConfig:
    """Return a tiny text config with Gemma 3n's layer pattern (every fifth layer full attention)."""
    sparse = min(10, num_layers // 2)
    values: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "vocab_size_per_layer_input": VOCABULARY - 20,
        "hidden_size": HIDDEN,
        "hidden_size_per_layer_input": 16,
        "intermediate_size": [WIDE] * num_layers,
        "num_hidden_layers": num_layers,
        "num_kv_shared_layers": num_kv_shared_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "sliding_window": WINDOW,
        "max_position_embeddings": 512,
        "layer_types": [
            "full_attention" if (i + 1) % 5 == 0 else "sliding_attention" for i in range(num_layers)
        ],
        "activation_sparsity_pattern": [0.95] * sparse + [0.0] * (num_layers - sparse),
        "altup_num_inputs": 4,
        "altup_coef_clip": 1.0,
        "laurel_rank": 16,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
        "attn_implementation": "eager",
    }
    return Gemma3nTextConfig(**{**values, **changes})


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Give every weight a random value, at scales that keep the network as calm as a trained one.

    What a layer adds to its residual stream is a fraction of the stream, and attention is not
    saturated: otherwise rounding errors grow from layer to layer and int8 says nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if "q_norm" in name:
                weight.copy_(weight.shape[-1] ** -0.5 * (1 + 0.2 * noise))
            elif "post_" in name:
                weight.copy_(0.3 * (1 + 0.2 * noise))
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


def byte_tokenizer() -> Tokenizer:
    """Return a byte-level tokenizer: ids 0 to 4 special, one id a byte behind them."""
    special = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE({token: i for i, token in enumerate([*special, *alphabet])}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    return tokenizer


CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>"
    "{{ 'model' if message.role == 'assistant' else message.role }}\n"
    "{{ message.content }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def save_checkpoint(model: torch.nn.Module, path: Path, submodels: Sequence[dict[str, Any]] = ()) -> Path:
    """Save `model` with a tokenizer and a chat template, as a checkpoint directory; return it."""
    model.save_pretrained(path)  # type: ignore[operator]
    byte_tokenizer().save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<bos>", "eos_token": "<eos>", "chat_template": CHAT_TEMPLATE})
    )
    (path / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 2, "eos_token_id": [1, 4], "pad_token_id": 0})
    )
    if submodels:
        document = {"nested_intermediate_size": NARROW, "submodels": list(submodels)}
        (path / "submodels.yaml").write_text(json.dumps(document))
    return path
