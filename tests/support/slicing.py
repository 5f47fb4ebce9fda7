"""An independent MatFormer slicer: cuts a sub-model out of a full Hugging Face model.

It follows Google's MatFormer Lab notebook (renumbered layers, cut feed-forward matrices, cut
per-layer embeddings), shares no code with nestd, and gives the reference for each sub-model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from transformers import Gemma3nForCausalLM, Gemma3nTextConfig


def sliced_model(
    model: Gemma3nForCausalLM,
    narrow: int,
    wide_layers: Sequence[int],
    skipped_layers: Sequence[int],
) -> Gemma3nForCausalLM:
    """Return a model of the real class with only the weights of the slice."""
    full: Gemma3nTextConfig = model.config
    kept = [layer for layer in range(full.num_hidden_layers) if layer not in set(skipped_layers)]
    widths = [full.intermediate_size[i] if i in set(wide_layers) else narrow for i in kept]
    values = full.to_dict()
    values.update(
        num_hidden_layers=len(kept),
        intermediate_size=widths,
        layer_types=[full.layer_types[i] for i in kept],
        activation_sparsity_pattern=[full.activation_sparsity_pattern[i] for i in kept],
        num_kv_shared_layers=full.num_kv_shared_layers - len(skipped_layers),
    )
    config = Gemma3nTextConfig(**values)
    config._attn_implementation = "eager"
    small = Gemma3nForCausalLM(config).eval()

    weights = {}
    embedding = full.hidden_size_per_layer_input
    columns = torch.cat([torch.arange(i * embedding, (i + 1) * embedding) for i in kept])
    for name, value in model.state_dict().items():
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", name)
        if match and int(match[1]) in kept:
            index = kept.index(int(match[1]))
            weights[f"model.layers.{index}.{match[2]}"] = _cut(match[2], value, widths[index])
        elif "embed_tokens_per_layer" in name:
            weights[name] = value[:, columns]
        elif "per_layer_model_projection" in name:
            weights[name] = value[columns]
        elif not match:
            weights[name] = value
    small.load_state_dict(weights, strict=True)
    return small


def _cut(name: str, value: torch.Tensor, width: int) -> torch.Tensor:
    if re.search(r"mlp\.(gate|up)_proj", name):
        return value[:width]
    return value[:, :width] if "mlp.down_proj" in name else value
