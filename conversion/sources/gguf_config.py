"""The keys of a GGUF file -> config.json of Gemma3nForCausalLM, and its chat template.

Source of the keys: llama.cpp, conversion/gemma.py (Gemma3NModel) and gguf-py/gguf/constants.py;
those in which Ollama's converter differs come second. What neither stores is Gemma 3n's own value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any

from nestd.bundle.errors import CheckpointError

PREFIX = "gemma3n."
# Not in the file: the same in every Gemma 3n.
GEMMA = {
    "model_type": "gemma3n_text",
    "architectures": ["Gemma3nForCausalLM"],
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "altup_correct_scale": True,
    "altup_coef_clip": 120.0,
    "rope_local_base_freq": 10_000.0,
    "final_logit_softcapping": 30.0,
}


def read_config(
    keys: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: str
) -> dict[str, Any]:
    """Return config.json.

    Args:
        keys: the file's metadata.
        shapes: of the tensors, by their Hugging Face name.
        where: the file, for errors.

    Raises:
        CheckpointError: a key or tensor is missing.
    """

    def need(*names: str) -> Any:  # noqa: ANN401  (whatever the key holds)
        for name in names:
            if PREFIX + name in keys:
                return keys[PREFIX + name]
        raise CheckpointError(f"{where} lacks the key {PREFIX}{names[0]}: download it again")

    def shape(name: str) -> tuple[int, ...]:
        if name not in shapes:
            raise CheckpointError(f"{where} lacks the tensor of {name}: download it again")
        return shapes[name]

    layers = int(need("block_count"))
    sliding = _each(need("attention.sliding_window_pattern"), layers)
    given = {
        "rope_local_base_freq": ("rope.freq_base_swa", "rope.freq_base_local"),
        "final_logit_softcapping": ("final_logit_softcapping",),
    }
    stored = {
        key: keys[PREFIX + name]
        for key, names in given.items()
        for name in names
        if PREFIX + name in keys
    }
    return {
        **GEMMA,
        **stored,
        "num_hidden_layers": layers,
        "hidden_size": int(need("embedding_length")),
        "intermediate_size": [int(n) for n in _each(need("feed_forward_length"), layers)],
        "num_attention_heads": int(need("attention.head_count")),
        "num_key_value_heads": int(need("attention.head_count_kv")),
        "head_dim": int(need("attention.key_length", "head_dim")),
        "num_kv_shared_layers": int(need("attention.shared_kv_layers")),
        "layer_types": [
            "sliding_attention" if is_sliding else "full_attention" for is_sliding in sliding
        ],
        "sliding_window": int(need("attention.sliding_window")),
        "rope_theta": float(need("rope.freq_base")),
        "max_position_embeddings": int(need("context_length")),
        "rms_norm_eps": float(need("attention.layer_norm_rms_epsilon")),
        "activation_sparsity_pattern": [
            _sparsity(scale) for scale in _each(need("activation_sparsity_scale"), layers)
        ],
        "altup_active_idx": int(need("altup.active_idx")),
        "altup_num_inputs": int(need("altup.num_inputs")),
        "hidden_size_per_layer_input": int(need("embedding_length_per_layer_input")),
        "laurel_rank": shape("layers.0.laurel.linear_left.weight")[0],
        "vocab_size": shape("embed_tokens.weight")[0],
        "vocab_size_per_layer_input": shape("embed_tokens_per_layer.weight")[0],
        "bos_token_id": keys.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _end_tokens(keys),
        "pad_token_id": keys.get("tokenizer.ggml.padding_token_id"),
    }


def _each(value: Any, layers: int) -> Sequence[Any]:  # noqa: ANN401  (number or list)
    return value if isinstance(value, Sequence) else [value] * layers


def _sparsity(scale: float) -> float:
    """Undo the inverse normal distribution under which the file stores the share of zeros."""
    return 0.0 if math.isinf(scale) else round(NormalDist().cdf(scale), 6)


def _end_tokens(keys: Mapping[str, Any]) -> list[int]:
    """End of text and end of turn, both of which end an answer."""
    names = ("eos_token_id", "eot_token_id", "eos_token_ids")
    found = [keys[f"tokenizer.ggml.{name}"] for name in names if f"tokenizer.ggml.{name}" in keys]
    flat = [id_ for item in found for id_ in (item if isinstance(item, Sequence) else [item])]
    tokens = keys.get("tokenizer.ggml.tokens", [])
    if "<end_of_turn>" in tokens:
        flat.append(tokens.index("<end_of_turn>"))
    return list(dict.fromkeys(int(id_) for id_ in flat))
