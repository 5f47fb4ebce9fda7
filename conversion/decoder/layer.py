"""One decoder layer on the AltUp streams.

Source: Gemma3nTextDecoderLayer in transformers 4.57.
"""

from __future__ import annotations

import math

import numpy as np

from nestd.conversion.decoder.altup import AltUp, stream
from nestd.conversion.decoder.attention import attention
from nestd.conversion.decoder.context import DecoderContext
from nestd.conversion.decoder.feed_forward import FeedForward
from nestd.conversion.graph_builder import MICROSOFT, GraphBuilder


def decoder_layer(
    context: DecoderContext, graph: GraphBuilder, layer: int, streams: str, per_layer_input: str
) -> tuple[str, int]:
    """Run layer `layer` on `streams` [R, A, hidden] with its `per_layer_input` [R, P].

    Returns:
        The streams behind the layer, and the bytes of the layer's wide half.
    """
    prefix = f"layers.{layer}"

    def norm(x: str, name: str) -> str:
        return context.norm(graph, x, f"{prefix}.{name}")

    # 1. AltUp predicts every stream.
    altup = AltUp(context, graph, layer)
    predictions = altup.predict(streams)
    active = stream(graph, predictions, 0)

    # 2. Attention and LAuReL, side by side.
    normed = norm(active, "input_layernorm")
    attended = norm(attention(context, graph, layer, normed), "post_attention_layernorm")
    # Three additions: `Sum` is one operator, and slower on a chunk of a prompt.
    laurel = graph.op("Add", normed, _laurel(context, graph, layer, normed))
    residual = graph.op("Add", graph.op("Add", active, attended), laurel)
    residual = graph.op("Mul", residual, graph.constant(math.sqrt(0.5)))

    # 3. The elastic feed-forward.
    forward, wide_bytes = FeedForward(context, graph, layer).run(
        norm(residual, "pre_feedforward_layernorm")
    )
    activated = graph.op("Add", residual, norm(forward, "post_feedforward_layernorm"))

    # 4. AltUp corrects; the per-layer embedding joins every stream but the active one.
    innovation = graph.op("Sub", activated, active)
    pairs = altup.corrections(activated)
    first = graph.op("Gather", pairs, graph.constant([0], np.int64), axis=1)
    corrected = graph.op("GatedAdd", active, innovation, first, domain=MICROSOFT)
    embedded = _per_layer_embedding(context, graph, layer, corrected, per_layer_input)
    embedded = norm(embedded, "post_per_layer_input_norm")
    return altup.correct(predictions, pairs, innovation, embedded), wide_bytes


def _laurel(context: DecoderContext, graph: GraphBuilder, layer: int, normed: str) -> str:
    """The learned augmented residual: a normed low-rank product of rows [R, hidden]."""
    hidden, rank = context.model.hidden_size, context.model.laurel_rank
    prefix = f"layers.{layer}.laurel."
    for name, rows, columns in (("linear_left", rank, hidden), ("linear_right", hidden, rank)):
        source = context.matrix(f"{prefix}{name}", rows, columns)
        normed = graph.linear(normed, f"{prefix}{name}", source, context.small_bits)
    return context.norm(graph, normed, f"{prefix}post_laurel_norm")


def _per_layer_embedding(
    context: DecoderContext, graph: GraphBuilder, layer: int, corrected: str, per_layer_input: str
) -> str:
    """Gate the layer's embedding [R, P] with the corrected stream; return rows [R, hidden]."""
    hidden, width = context.model.hidden_size, context.model.hidden_size_per_layer_input
    prefix = f"layers.{layer}."
    if context.model.altup_correct_scale:
        scale = context.small(graph, f"{prefix}altup.correct_output_scale", hidden)
        corrected = graph.op("Mul", corrected, scale)
    name = f"{prefix}per_layer_input_gate"
    gate = context.matrix(name, width, hidden)
    gated = graph.linear(corrected, name, gate, context.small_bits)
    gated = graph.op("Mul", graph.op("Gelu", gated, approximate="tanh"), per_layer_input)
    name = f"{prefix}per_layer_projection"
    return graph.linear(gated, name, context.matrix(name, hidden, width), context.small_bits)
