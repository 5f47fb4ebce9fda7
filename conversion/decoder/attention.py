"""Attention of one layer: a GroupQueryAttention node on a cache that is updated in place.

Source: Gemma3nTextAttention in transformers 4.57. Layers behind the last cache owner project a
query only and read their source's cache: key and value inputs are empty, the source's `present` is
their past, and they have no present outputs (asking for them would copy the buffers each step).
"""

from __future__ import annotations

import numpy as np

from nestd.conversion.decoder.context import DecoderContext
from nestd.conversion.graph_builder import MICROSOFT, GraphBuilder
from nestd.conversion.weights import stack


def attention(context: DecoderContext, graph: GraphBuilder, layer: int, normed: str) -> str:
    """Attend from rows [R, hidden]; return rows [R, hidden].

    Before the last cache owner a sequence has S rows, behind it those whose logits are wanted.
    """
    if layer < context.model.first_kv_shared_layer:
        attended = _owner(context, graph, layer, normed)
    else:
        attended = _consumer(context, graph, layer, normed)
    name = f"layers.{layer}.self_attn.o_proj"
    output = context.matrix(name, context.model.hidden_size, context.query_width)
    rows = graph.reshape(attended, -1, context.query_width)
    return graph.linear(rows, name, output, context.bits)


def _owner(context: DecoderContext, graph: GraphBuilder, layer: int, normed: str) -> str:
    model, prefix = context.model, f"layers.{layer}.self_attn."
    widths = [context.query_width, context.kv_width, context.kv_width]
    fused = stack(
        *(
            context.matrix(f"{prefix}{name}", width, model.hidden_size)
            for name, width in zip(("q_proj", "k_proj", "v_proj"), widths, strict=True)
        )
    )
    projected = graph.linear(normed, f"{prefix}qkv_proj", fused, context.bits)
    # One Reshape for all three. One norm for all three, or a packed input, would be slower.
    query, key, value = graph.ops(
        "Split",
        graph.op("Reshape", projected, context.qkv_shape),
        graph.constant(widths, np.int64),
        outputs=3,
        axis=2,
    )
    query = _head_norm(context, graph, f"{prefix}q_norm.weight", query, model.num_attention_heads)
    key = _head_norm(context, graph, f"{prefix}k_norm.weight", key, model.num_key_value_heads)
    value = _head_norm(context, graph, None, value, model.num_key_value_heads)
    return _group_query_attention(
        context,
        graph,
        layer,
        query,
        key,
        value,
        f"past_key_values.{layer}",
        present=f"present.{layer}",
    )


def _consumer(context: DecoderContext, graph: GraphBuilder, layer: int, normed: str) -> str:
    model, prefix = context.model, f"layers.{layer}.self_attn."
    source = context.matrix(f"{prefix}q_proj", context.query_width, model.hidden_size)
    query = graph.linear(normed, f"{prefix}q_proj", source, context.bits)
    query = _head_norm(context, graph, f"{prefix}q_norm.weight", query, model.num_attention_heads)
    query = graph.op("Reshape", query, context.query_shape)
    past = f"present.{model.kv_source(layer)}"
    return _group_query_attention(
        context, graph, layer, query, context.no_kv, context.no_kv, past, present=None
    )


def _head_norm(
    context: DecoderContext, graph: GraphBuilder, name: str | None, rows: str, heads: int
) -> str:
    """RMS-normalise each head of [..., heads * head_dim]; without a name, without a weight."""
    scale = [context.small(graph, name, context.model.head_dim)] if name else []
    return graph.op(
        "BranchwiseRMSNorm",
        rows,
        *scale,
        domain=MICROSOFT,
        num_branches=heads,
        epsilon=context.model.rms_norm_eps,
    )


def _group_query_attention(
    context: DecoderContext,
    graph: GraphBuilder,
    layer: int,
    query: str,
    key: str,
    value: str,
    past: str,
    *,
    present: str | None,
) -> str:
    model = context.model
    sliding = model.slides(layer)
    # Rows of a sliding layer's cache are not numbered by position, so positions are given.
    kind, positions = ("window_", [context.positions]) if sliding else ("", [])
    outputs = ["", f"{present}.key", f"{present}.value"] if present else [""]
    return graph.ops(
        "GroupQueryAttention",
        query,
        key,
        value,
        f"{past}.key",
        f"{past}.value",
        f"{kind}seqlens_k",
        f"{kind}total_sequence_length",
        *context.rope[model.layer_types[layer]],
        *positions,
        outputs=outputs,
        domain=MICROSOFT,
        num_heads=model.num_attention_heads,
        kv_num_heads=model.num_key_value_heads,
        scale=1.0,
        do_rotary=1,
        local_window_size=model.sliding_window if sliding else -1,
    )[0]
