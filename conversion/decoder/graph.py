"""The decoder graph: every sub-model in one, chosen by inputs at each run.

Inputs (B sequences, S new tokens each, C cache capacity, L layers, P per-layer embedding width,
R rows with logits):
    inputs_embeds float32 [B, S, hidden]; per_layer_inputs float32 [B, S, L, P];
    past_key_values.{i}.key|value float32 [B, kv_heads, C, head_dim] of each layer with a cache;
    seqlens_k int32 [B], tokens of each sequence after this run minus one; total_sequence_length
    int32 [], the most of them; window_seqlens_k, window_total_sequence_length, the same for the
    caches of sliding layers, which hold the last tokens alone and have a capacity of their own;
    wide_layers bool [L]; kept_layers bool [L]; logit_rows int64 [1].
Outputs:
    logits float32 [B, R, vocab] of the last R new tokens of each sequence;
    present.{i}.key|value, to be bound to the same buffers as past_key_values.

Row r of a sliding layer's cache holds token T - T' + r where T and T' are a sequence's tokens and
those in that cache. The caller moves rows to the front when it is full, and keeps at least the
`sliding_window` - 1 that the first new token sees (`daemon/engine/window.py`). This is plain
attention on plain buffers: ONNX Runtime's own `sliding_window_cache` evicts on its side, but
refuses layers that read another's cache, and more than one new token in a batch.

Behind the last layer that owns a cache only tokens whose logits are wanted matter: those layers and
the lm_head run on these rows alone, and not at all where R is 0.

Source of the arithmetic: Gemma3nTextModel in transformers 4.57. The layout differs: activations are
rows [B * S, features], the AltUp streams [B * S, A, hidden].
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto

from nestd.bundle.manifest import ModelConfig, Quantization
from nestd.conversion.checkpoint import Checkpoint
from nestd.conversion.decoder.altup import merge, spread
from nestd.conversion.decoder.context import DecoderContext
from nestd.conversion.decoder.layer import decoder_layer
from nestd.conversion.decoder.rope import rope_tables
from nestd.conversion.embeddings import EmbeddingTable
from nestd.conversion.graph_builder import GraphBuilder, tensor_info
from nestd.conversion.weights import WeightFile, matrix


@dataclass(slots=True)
class DecoderBytes:
    """Where the decoder's weight bytes are, lm_head not counted.

    Attributes:
        common: touched by every run, whatever the sub-model.
        layers: per layer (narrow bytes, further bytes of the wide half).
    """

    common: int = 0
    layers: list[tuple[int, int]] = field(default_factory=list)


def write_decoder(
    path: Path,
    checkpoint: Checkpoint,
    model: ModelConfig,
    quantization: Quantization,
    weights: WeightFile,
    lm_head: EmbeddingTable,
) -> DecoderBytes:
    """Write the graph to `path` and its weights to `weights`; return where the bytes are."""
    context = DecoderContext(
        checkpoint,
        model,
        quantization.bits,
        32 if quantization.bits == 32 else 8,
        quantization.sparse_rows,
    )
    graph = GraphBuilder("decoder", weights, quantization.block_size)
    count = DecoderBytes()
    _shared_values(context, graph)

    # 1. The embeddings enter the AltUp streams.
    rows = graph.reshape("inputs_embeds", -1, model.hidden_size)
    per_layer_rows = graph.reshape(
        "per_layer_inputs", -1, model.num_layers, model.hidden_size_per_layer_input
    )
    streams = spread(context, graph, rows)

    # 2. Layers that own a KV cache see every token.
    owners = range(model.first_kv_shared_layer)
    per_layer = _per_layer_inputs(context, graph, rows, per_layer_rows, owners)
    for layer in owners:
        start = weights.size
        streams, wide = decoder_layer(context, graph, layer, streams, per_layer[layer])
        count.layers.append((weights.size - start - wide, wide))

    # 3. The rest sees the last R tokens of each sequence.
    tail = graph.branch("tail")
    screen = context.matrix("embed_tokens", model.vocab_size, model.hidden_size)
    hidden = _tail(context, tail, streams, count)
    if quantization.lm_head_screen:
        logits = lm_head.screened_logits(tail, hidden, screen)
    else:
        logits = lm_head.logits(tail, hidden)
    logits = _cap(context, tail, logits)
    nothing = graph.branch("no_logits")
    empty = nothing.op("ConstantOfShape", context.batched(nothing, 0, model.vocab_size))
    graph.op(
        "If",
        graph.op("Greater", "logit_rows", graph.constant([0], np.int64)),
        output="logits",
        then_branch=tail.branch_graph([logits]),
        else_branch=nothing.branch_graph([empty]),
    )
    count.common = weights.size - sum(narrow + wide for narrow, wide in count.layers)
    graph.save(path, _inputs(model), _outputs(model))
    return count


def _shared_values(context: DecoderContext, graph: GraphBuilder) -> None:
    """Add what layers of the whole graph, branches included, read by name."""
    model = context.model
    for kind, (cos, sin) in rope_tables(model).items():
        context.rope[kind] = (
            graph.weight(f"rope.{kind}.cos", cos),
            graph.weight(f"rope.{kind}.sin", sin),
        )
    context.batch = graph.op("Shape", "inputs_embeds", start=0, end=1)
    context.query_shape = context.batched(graph, -1, context.query_width)
    qkv_width = context.query_width + 2 * context.kv_width
    context.qkv_shape = context.batched(graph, -1, qkv_width)
    context.no_kv = graph.op("ConstantOfShape", context.batched(graph, 0, context.kv_width))
    context.positions = _positions(graph)
    if context.sparse_rows:
        count = graph.op(
            "ReduceProd", graph.op("Shape", "inputs_embeds", start=0, end=2), keepdims=1
        )
        context.single_row = graph.op("Equal", count, graph.constant([1], np.int64))
        context.no_columns = graph.op("Concat", count, graph.constant([0], np.int64), axis=0)
    layers = model.num_layers
    context.wide_flags = graph.ops("Split", "wide_layers", outputs=layers, num_outputs=layers)
    context.kept_flags = graph.ops("Split", "kept_layers", outputs=layers, num_outputs=layers)


def _positions(graph: GraphBuilder) -> str:
    """Return the position int64 [B, S] of each new token in its sequence."""
    one, axis = graph.constant(1, np.int64), graph.constant([1], np.int64)
    count = graph.op("Squeeze", graph.op("Shape", "inputs_embeds", start=1, end=2))
    behind = graph.op("Range", graph.op("Sub", one, count), one, one)
    last = graph.op("Cast", "seqlens_k", to=TensorProto.INT64)
    return graph.op("Add", graph.op("Unsqueeze", last, axis), behind)


def _per_layer_inputs(
    context: DecoderContext, graph: GraphBuilder, rows: str, per_layer_rows: str, layers: range
) -> dict[int, str]:
    """Return the input [R, P] of each of `layers`: the projected embedding and the PLE row.

    `rows` are embeddings [R, hidden], `per_layer_rows` the PLE [R, L, P].
    """
    model = context.model
    width = model.hidden_size_per_layer_input
    if not layers:
        return {}
    source = matrix(
        context.checkpoint,
        "per_layer_model_projection.weight",
        (model.num_layers * width, model.hidden_size),
        rows=(layers.start * width, layers.stop * width),
    )
    name = f"per_layer_model_projection.{layers.start}"
    projected = graph.linear(rows, name, source, context.small_bits)
    # The projection's factor hidden_size^-0.5 cancels in the norm but for its epsilon.
    normed = graph.rms_norm(
        graph.reshape(projected, -1, len(layers), width),
        context.small(graph, "per_layer_projection_norm.weight", width),
        model.rms_norm_eps * model.hidden_size,
    )
    bounds = (graph.constant([bound], np.int64) for bound in (layers.start, layers.stop, 1))
    embedded = graph.op("Slice", per_layer_rows, *bounds)
    both = graph.op("Mul", graph.op("Add", normed, embedded), graph.constant(math.sqrt(0.5)))
    flat = graph.reshape(both, -1, len(layers) * width)
    pieces = graph.ops("Split", flat, outputs=len(layers), axis=1, num_outputs=len(layers))
    return dict(zip(layers, pieces, strict=True))


def _tail(
    context: DecoderContext,
    tail: GraphBuilder,
    streams: str,
    count: DecoderBytes,
) -> str:
    """Run the layers without a cache, each behind its `kept` flag, and the last norm."""
    model = context.model
    layers = range(model.first_kv_shared_layer, model.num_layers)
    bounds = (
        tail.op("Neg", "logit_rows"),
        tail.constant([np.iinfo(np.int64).max], np.int64),
        tail.constant([1], np.int64),
    )

    def last(values: str, *sizes: int) -> str:
        return tail.reshape(tail.op("Slice", values, *bounds), -1, *sizes)

    sizes = (model.altup_num_inputs, model.hidden_size)
    streams = last(tail.op("Reshape", streams, context.batched(tail, -1, *sizes)), *sizes)
    rows = last("inputs_embeds", model.hidden_size)
    per_layer_rows = last("per_layer_inputs", model.num_layers, model.hidden_size_per_layer_input)
    context.positions = tail.op("Slice", context.positions, *bounds)
    per_layer = _per_layer_inputs(context, tail, rows, per_layer_rows, layers)
    for layer in layers:
        start = tail.weights.size
        kept, skipped = tail.branch(f"layers.{layer}"), tail.branch(f"layers.{layer}.skipped")
        result, wide = decoder_layer(context, kept, layer, streams, per_layer[layer])
        streams = tail.op(
            "If",
            context.kept_flags[layer],
            then_branch=kept.branch_graph([result]),
            else_branch=skipped.branch_graph([skipped.op("Identity", streams)]),
        )
        count.layers.append((tail.weights.size - start - wide, wide))
    # Dividing by the cap is part of the norm's weight: one pass over the vocabulary less.
    factor = 1 / (model.final_logit_softcapping or 1.0)
    scale = context.small(tail, "norm.weight", model.hidden_size, factor=factor)
    return tail.rms_norm(merge(context, tail, streams), scale, model.rms_norm_eps)


def _cap(context: DecoderContext, tail: GraphBuilder, logits: str) -> str:
    """Return logits [B, R, vocab] of rows [B * R, vocab] that were divided by the cap."""
    logits = tail.op("Reshape", logits, context.batched(tail, -1, context.model.vocab_size))
    cap = context.model.final_logit_softcapping
    return tail.op("Mul", tail.op("Tanh", logits), tail.constant(cap)) if cap else logits


def _cache_infos(model: ModelConfig, prefix: str) -> list[onnx.ValueInfoProto]:
    infos = []
    for layer in range(model.first_kv_shared_layer):
        capacity = "window_capacity" if model.slides(layer) else "capacity"
        shape: list[int | str] = ["batch", model.num_key_value_heads, capacity, model.head_dim]
        infos += [
            tensor_info(f"{prefix}.{layer}.{part}", TensorProto.FLOAT, shape)
            for part in ("key", "value")
        ]
    return infos


def _inputs(model: ModelConfig) -> list[onnx.ValueInfoProto]:
    layers, width = model.num_layers, model.hidden_size_per_layer_input
    return [
        tensor_info("inputs_embeds", TensorProto.FLOAT, ["batch", "sequence", model.hidden_size]),
        tensor_info("per_layer_inputs", TensorProto.FLOAT, ["batch", "sequence", layers, width]),
        tensor_info("seqlens_k", TensorProto.INT32, ["batch"]),
        tensor_info("total_sequence_length", TensorProto.INT32, []),
        tensor_info("window_seqlens_k", TensorProto.INT32, ["batch"]),
        tensor_info("window_total_sequence_length", TensorProto.INT32, []),
        tensor_info("wide_layers", TensorProto.BOOL, [layers]),
        tensor_info("kept_layers", TensorProto.BOOL, [layers]),
        tensor_info("logit_rows", TensorProto.INT64, [1]),
        *_cache_infos(model, "past_key_values"),
    ]


def _outputs(model: ModelConfig) -> list[onnx.ValueInfoProto]:
    logits = tensor_info("logits", TensorProto.FLOAT, ["batch", "rows", model.vocab_size])
    return [logits, *_cache_infos(model, "present")]
