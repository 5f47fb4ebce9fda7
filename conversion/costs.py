"""What a sub-model costs: parameters from the shapes, bytes from what the converter wrote."""

from __future__ import annotations

from nestd.bundle.manifest import ModelConfig, Quantization, Submodel
from nestd.bundle.submodels import Slice
from nestd.conversion.decoder import DecoderBytes

# Beside weights and cache: interpreter, ONNX Runtime, tokenizer, activations of one prefill chunk.
OVERHEAD_BYTES = 400 << 20
MINIMUM_CONTEXT = 4096


def effective_params(model: ModelConfig, item: Slice) -> int:
    """Return the decoder weights that run in `item`, token and per-layer embeddings not counted.

    For E4B and E2B this is what their makers call effective parameters: 3.98 and 1.91 billion.
    """
    hidden, streams = model.hidden_size, model.altup_num_inputs
    width = model.hidden_size_per_layer_input
    total = 2 * (streams - 1) * hidden**2 + hidden + width
    for layer in range(model.num_layers):
        if layer in item.skipped_layers:
            continue
        total += _layer_params(model, layer)
        total += 3 * hidden * _active_width(model, item, layer)
    return total


def _active_width(model: ModelConfig, item: Slice, layer: int) -> int:
    """Return the feed-forward width at which `item` runs a layer."""
    wide = layer in item.wide_layers
    return model.intermediate_size[layer] if wide else model.nested_intermediate_size


def _layer_params(model: ModelConfig, layer: int) -> int:
    """Parameters of one layer without its feed-forward."""
    hidden, streams, head = model.hidden_size, model.altup_num_inputs, model.head_dim
    query = model.num_attention_heads * head
    attention = 2 * hidden * query + head
    if layer < model.first_kv_shared_layer:
        attention += 2 * hidden * model.num_key_value_heads * head + head
    altup = streams * hidden + streams**2 + streams**3 + 2 * hidden
    laurel = 2 * hidden * model.laurel_rank + hidden
    # Gate and projection of the PLE, and the layer's rows of per_layer_model_projection.
    embedding = 3 * hidden * model.hidden_size_per_layer_input + hidden
    norms = 4 * hidden
    return attention + altup + laurel + embedding + norms


def cost(
    model: ModelConfig,
    quantization: Quantization,
    item: Slice,
    decoder: DecoderBytes,
    lm_head_bytes: int,
) -> Submodel:
    """Return the manifest's entry for `item`."""
    touched = decoder.common + lm_head_bytes
    for layer, (narrow, wide) in enumerate(decoder.layers):
        if layer not in item.skipped_layers:
            touched += narrow + (wide if layer in item.wide_layers else 0)
    return Submodel(
        name=item.name,
        wide_layers=item.wide_layers,
        skipped_layers=item.skipped_layers,
        effective_params=effective_params(model, item),
        decoder_bytes=touched,
        token_bytes=touched - idle if (idle := _idle_bytes(model, quantization, item)) else None,
        mmlu_percent=item.mmlu_percent,
    )


def _idle_bytes(model: ModelConfig, quantization: Quantization, item: Slice) -> int:
    """Return what a decoded token leaves alone of up and down, whole and as tables of rows."""
    if not quantization.sparse_rows:
        return 0
    whole = quantization.bits / 8 + 4 / quantization.block_size
    total = 0.0
    for layer, sparsity in enumerate(model.activation_sparsity_pattern):
        if sparsity > 0 and layer not in item.skipped_layers:
            width = _active_width(model, item, layer)
            total += 2 * model.hidden_size * width * (whole + sparsity)
    return int(total)
