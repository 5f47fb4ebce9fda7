"""A tiny Gemma 3n checkpoint written with NumPy alone, for tests that run without torch.

`support.checkpoints` makes the same shapes through the real transformers classes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

VOCABULARY = 320
HIDDEN = 64
WIDE, NARROW = 128, 64
WINDOW = 16
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}<start_of_turn>"
    "{{ 'model' if message.role == 'assistant' else message.role }}\n"
    "{{ message.content }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def config_values(num_layers: int = 10, shared: int = 5, **changes: Any) -> dict[str, Any]:
    """Return a text config with Gemma 3n's layer pattern (every fifth layer full attention)."""
    sparse = min(10, num_layers // 2)
    kinds = ("sliding_attention",) * 4 + ("full_attention",)
    values: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "vocab_size_per_layer_input": VOCABULARY - 20,
        "hidden_size": HIDDEN,
        "hidden_size_per_layer_input": 16,
        "intermediate_size": [WIDE] * num_layers,
        "num_hidden_layers": num_layers,
        "num_kv_shared_layers": shared,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "sliding_window": WINDOW,
        "max_position_embeddings": 512,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "layer_types": [kinds[i % 5] for i in range(num_layers)],
        "activation_sparsity_pattern": [0.95] * sparse + [0.0] * (num_layers - sparse),
        "altup_num_inputs": 4,
        "altup_coef_clip": 1.0,
        "altup_correct_scale": True,
        "laurel_rank": 16,
        "final_logit_softcapping": 30.0,
        "rms_norm_eps": 1e-6,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }
    return {**values, **changes}


def byte_tokenizer() -> Tokenizer:
    """Return a byte-level tokenizer: ids 0 to 4 special, one id a byte behind them."""
    special = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    return tokenizer


def write_assets(path: Path, submodels: Sequence[dict[str, Any]] = ()) -> None:
    """Write what a checkpoint holds beside config and weights."""
    byte_tokenizer().save(str(path / "tokenizer.json"))
    tokens = {"bos_token": "<bos>", "eos_token": "<eos>", "chat_template": CHAT_TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(tokens))
    generation = {"bos_token_id": 2, "eos_token_id": [1, 4], "pad_token_id": 0}
    (path / "generation_config.json").write_text(json.dumps(generation))
    if submodels:
        document = {"nested_intermediate_size": NARROW, "submodels": list(submodels)}
        (path / "submodels.yaml").write_text(json.dumps(document))


def weight_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each text weight under its name in Gemma3nForCausalLM."""
    hidden, ple = config["hidden_size"], config["hidden_size_per_layer_input"]
    layers, streams = config["num_hidden_layers"], config["altup_num_inputs"]
    head, rank = config["head_dim"], config["laurel_rank"]
    query, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens": (config["vocab_size"], hidden),
        "embed_tokens_per_layer": (config["vocab_size_per_layer_input"], layers * ple),
        "per_layer_model_projection": (layers * ple, hidden),
        "per_layer_projection_norm": (ple,),
        "norm": (hidden,),
    }
    for index in range(streams - 1):
        shapes[f"altup_projections.{index}"] = (hidden, hidden)
        shapes[f"altup_unembed_projections.{index}"] = (hidden, hidden)
    for layer, width in enumerate(config["intermediate_size"]):
        prefix = f"layers.{layer}."
        shapes |= {
            f"{prefix}self_attn.q_proj": (query, hidden),
            f"{prefix}self_attn.k_proj": (kv, hidden),
            f"{prefix}self_attn.v_proj": (kv, hidden),
            f"{prefix}self_attn.o_proj": (hidden, query),
            f"{prefix}self_attn.q_norm": (head,),
            f"{prefix}self_attn.k_norm": (head,),
            f"{prefix}mlp.gate_proj": (width, hidden),
            f"{prefix}mlp.up_proj": (width, hidden),
            f"{prefix}mlp.down_proj": (hidden, width),
            f"{prefix}altup.prediction_coefs": (streams**2, streams),
            f"{prefix}altup.correction_coefs": (streams, streams),
            f"{prefix}altup.modality_router": (streams, hidden),
            f"{prefix}altup.router_norm": (hidden,),
            f"{prefix}laurel.linear_left": (rank, hidden),
            f"{prefix}laurel.linear_right": (hidden, rank),
            f"{prefix}laurel.post_laurel_norm": (hidden,),
            f"{prefix}per_layer_input_gate": (ple, hidden),
            f"{prefix}per_layer_projection": (hidden, ple),
            f"{prefix}post_per_layer_input_norm": (hidden,),
            f"{prefix}input_layernorm": (hidden,),
            f"{prefix}post_attention_layernorm": (hidden,),
            f"{prefix}pre_feedforward_layernorm": (hidden,),
            f"{prefix}post_feedforward_layernorm": (hidden,),
        }
    named = {f"model.{name}.weight": shape for name, shape in shapes.items()}
    for layer in range(layers):
        named[f"model.layers.{layer}.altup.correct_output_scale"] = (hidden,)
    return named


def random_weights(config: dict[str, Any], seed: int = 0) -> dict[str, npt.NDArray[np.float32]]:
    """Return random weights for `weight_shapes`."""
    random = np.random.default_rng(seed)
    weights = {}
    for name, shape in weight_shapes(config).items():
        noise = random.standard_normal(shape).astype(np.float32)
        if "q_norm" in name:
            value = shape[-1] ** -0.5 * (1 + 0.2 * noise)
        elif "norm" in name or "scale" in name:
            value = 1 + 0.2 * noise
        else:
            value = noise / np.sqrt(np.float32(shape[-1]))
        weights[name] = value.astype(np.float32)
    return weights


def write_checkpoint(path: Path, **changes: Any) -> Path:
    """Write a whole random checkpoint of Gemma3nForCausalLM's layout; return its directory."""
    config = config_values(**changes)
    path.mkdir(parents=True, exist_ok=True)
    document = {
        "architectures": ["Gemma3nForCausalLM"],
        "model_type": "gemma3n_text",
        "hidden_activation": "gelu_pytorch_tanh",
        **config,
    }
    (path / "config.json").write_text(json.dumps(document))
    save_file(random_weights(config), path / "model.safetensors")
    write_assets(path)
    return path
