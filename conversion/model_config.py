"""config.json of a Gemma 3n checkpoint -> ModelConfig.

Accepts the config of Gemma3nForConditionalGeneration (with a `text_config`) and of
Gemma3nForCausalLM, with the RoPE keys of transformers 4 and 5. Refuses what the decoder graph does
not compute, rather than converting it to something else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from nestd.bundle.errors import CheckpointError
from nestd.bundle.manifest import ModelConfig

TEXT_MODEL_TYPE = "gemma3n_text"
MODEL_TYPES = ("gemma3n", TEXT_MODEL_TYPE)
# Gemma 3n's hidden size, and the narrowest feed-forward that it was trained at (E2B's).
GEMMA_HIDDEN, GEMMA_NESTED = 2048, 8192


def read_model_config(
    config: Mapping[str, Any], nested_intermediate_size: int | None = None
) -> ModelConfig:
    """Return the decoder's numbers.

    Args:
        config: parsed config.json.
        nested_intermediate_size: width of a narrow layer; None takes Gemma 3n's, or for a model
            of another shape its narrowest layer's, or half of all where all are as wide.

    Raises:
        CheckpointError: another architecture, a missing number, or a feature Gemma 3n lacks.
    """
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        raise CheckpointError(
            f"config.json says model_type {model_type!r}; nestd converts Gemma 3n only "
            f"({' or '.join(MODEL_TYPES)})"
        )
    text = config if model_type == TEXT_MODEL_TYPE else config.get("text_config")
    if not isinstance(text, Mapping):
        raise CheckpointError("config.json of a gemma3n model has no text_config")
    _refuse_unknown_features(text)

    num_layers = _integer(text, "num_hidden_layers")
    intermediate_size = _per_layer(text, "intermediate_size", num_layers)
    sparsity = text.get("activation_sparsity_pattern") or 0.0
    if nested_intermediate_size is None:
        nested_intermediate_size = _nested_width(text, intermediate_size)
    theta_full, theta_sliding = _rope_thetas(text)
    values = {
        name: text.get(name, default)
        for name, default in {
            "hidden_size": None,
            "num_attention_heads": None,
            "num_key_value_heads": None,
            "head_dim": None,
            "num_kv_shared_layers": None,
            "sliding_window": None,
            "max_position_embeddings": None,
            "altup_num_inputs": None,
            "altup_active_idx": 0,
            "altup_coef_clip": None,
            "altup_correct_scale": True,
            "laurel_rank": None,
            "hidden_size_per_layer_input": None,
            "vocab_size": None,
            "vocab_size_per_layer_input": None,
            "final_logit_softcapping": None,
            "rms_norm_eps": 1e-6,
        }.items()
    }
    try:
        model = ModelConfig(
            **values,
            intermediate_size=intermediate_size,
            nested_intermediate_size=nested_intermediate_size,
            layer_types=_per_layer(text, "layer_types", num_layers),
            rope_theta=theta_full,
            rope_local_base_freq=theta_sliding,
            activation_sparsity_pattern=sparsity
            if isinstance(sparsity, (list, tuple))
            else (sparsity,) * num_layers,
        )
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"config.json: {key}: {first['msg']}") from error
    _check_shape(model)
    return model


def _nested_width(text: Mapping[str, Any], widths: list[int]) -> int:
    """Return the width down to which a layer may be cut.

    A checkpoint that was cut from E4B (E2B, Mix-n-Match) has nothing below E4B's nested width.
    """
    if text.get("hidden_size") == GEMMA_HIDDEN:
        return min(GEMMA_NESTED, *widths)
    return min(widths) if len(set(widths)) > 1 else widths[0] // 2


def _refuse_unknown_features(text: Mapping[str, Any]) -> None:
    required = {
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "altup_active_idx": 0,
        "tie_word_embeddings": True,
    }
    for key, value in required.items():
        if text.get(key, value) != value:
            raise CheckpointError(
                f"config.json: {key} is {text[key]!r}, nestd's decoder computes {value!r} only"
            )


def _rope_thetas(text: Mapping[str, Any]) -> tuple[float, float]:
    """Return the theta of full and of sliding layers, from the keys of transformers 4 or 5."""
    parameters = text.get("rope_parameters")
    if isinstance(parameters, Mapping):
        kinds = ("full_attention", "sliding_attention")
        by_type = [item for kind in kinds if isinstance(item := parameters.get(kind), Mapping)]
        if len(by_type) != len(kinds):
            raise CheckpointError("config.json: rope_parameters needs full and sliding_attention")
        scaled = [item for item in by_type if item.get("rope_type", "default") != "default"]
        thetas = [item.get("rope_theta") for item in by_type]
    else:
        scaling = text.get("rope_scaling")
        scaled = [scaling] if scaling and scaling.get("rope_type", "default") != "default" else []
        thetas = [text.get("rope_theta"), text.get("rope_local_base_freq")]
    if scaled:
        raise CheckpointError("config.json: RoPE scaling is not part of Gemma 3n")
    known = [float(theta) for theta in thetas if isinstance(theta, int | float) and theta > 0]
    if len(known) != 2:
        raise CheckpointError("config.json: rope_theta and rope_local_base_freq must be given")
    return known[0], known[1]


def _integer(text: Mapping[str, Any], key: str) -> int:
    value = text.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"config.json: {key} must be a positive whole number, got {value!r}")
    return value


def _per_layer(text: Mapping[str, Any], key: str, num_layers: int) -> list[Any]:
    value = text.get(key)
    values = list(value) if isinstance(value, (list, tuple)) else [value] * num_layers
    if len(values) != num_layers:
        raise CheckpointError(
            f"config.json: {key} has {len(values)} entries for {num_layers} layers"
        )
    return values


def _check_shape(model: ModelConfig) -> None:
    """Refuse numbers that are valid one by one but not together."""
    narrow = model.nested_intermediate_size
    if any(width < narrow for width in model.intermediate_size):
        raise CheckpointError(f"a layer is narrower than the nested width {narrow}")
    if len(model.activation_sparsity_pattern) != model.num_layers:
        raise CheckpointError("config.json: activation_sparsity_pattern needs one number a layer")
    if model.num_kv_shared_layers >= model.num_layers:
        raise CheckpointError("config.json: num_kv_shared_layers leaves no layer with a KV cache")
    owners = set(model.layer_types[: model.first_kv_shared_layer])
    missing = set(model.layer_types) - owners
    if missing:
        raise CheckpointError(f"config.json: no layer with a KV cache of type {missing.pop()}")
    if model.num_attention_heads % model.num_key_value_heads:
        raise CheckpointError("config.json: num_attention_heads is no multiple of KV heads")
    if model.altup_num_inputs < 2:
        raise CheckpointError("config.json: altup_num_inputs must be at least 2")
