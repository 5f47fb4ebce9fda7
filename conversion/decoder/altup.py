"""AltUp, the alternating updates: A parallel streams [R, A, hidden] of which a layer computes one.

Source: Gemma3nTextAltUp and Gemma3nTextModel in transformers 4.57; Baykal et al., "Alternating
Updates for Efficient Transformers", NeurIPS 2023. Stream 0 is the active one.
"""

from __future__ import annotations

import numpy as np

from nestd.conversion.decoder.context import DecoderContext
from nestd.conversion.graph_builder import GraphBuilder
from nestd.conversion.weights import stack

# Smallest mean square of a stream before its magnitude is matched (modeling_gemma3n.py).
MAGNITUDE_EPSILON = 1e-5


def spread(context: DecoderContext, graph: GraphBuilder, rows: str) -> str:
    """Return the streams [R, A, hidden] of embeddings [R, hidden], all of the same magnitude."""
    hidden, extra = context.model.hidden_size, context.model.altup_num_inputs - 1
    source = stack(
        *(context.matrix(f"altup_projections.{i}", hidden, hidden) for i in range(extra))
    )
    projected = graph.linear(rows, "altup_projections", source, context.small_bits)
    others = graph.reshape(projected, -1, extra, hidden)
    first = graph.op("Unsqueeze", rows, graph.constant([1], np.int64))
    return graph.op("Concat", first, _match_magnitude(graph, first, others), axis=1)


def merge(context: DecoderContext, graph: GraphBuilder, streams: str) -> str:
    """Return rows [R, hidden]: the mean of the streams after their projections back."""
    hidden, count = context.model.hidden_size, context.model.altup_num_inputs
    first, *others = graph.ops("Split", streams, outputs=count, axis=1, num_outputs=count)
    projected = []
    for index, stream in enumerate(others):
        name = f"altup_unembed_projections.{index}"
        source = context.matrix(name, hidden, hidden)
        rows = graph.linear(graph.reshape(stream, -1, hidden), name, source, context.small_bits)
        projected.append(graph.reshape(rows, -1, 1, hidden))
    stacked = graph.op("Concat", *projected, axis=1) if len(projected) > 1 else projected[0]
    matched = graph.op("Concat", first, _match_magnitude(graph, first, stacked), axis=1)
    return graph.op("ReduceMean", matched, graph.constant([1], np.int64), keepdims=0)


def _match_magnitude(graph: GraphBuilder, first: str, others: str) -> str:
    """Scale `others` [R, A-1, hidden] to the root mean square of `first` [R, 1, hidden]."""
    axes = graph.constant([-1], np.int64)
    target = graph.op("ReduceMean", graph.op("Mul", first, first), axes)
    squares = graph.op("ReduceMean", graph.op("Mul", others, others), axes)
    floored = graph.op("Max", squares, graph.constant(MAGNITUDE_EPSILON))
    return graph.op("Mul", others, graph.op("Sqrt", graph.op("Div", target, floored)))


class AltUp:
    """One layer's AltUp: predict before the layer, correct after it."""

    def __init__(self, context: DecoderContext, graph: GraphBuilder, layer: int) -> None:
        self.context, self.graph = context, graph
        self.prefix = f"layers.{layer}.altup."
        hidden, count = context.model.hidden_size, context.model.altup_num_inputs
        # The router's input scale 1/hidden goes into the norm's weight.
        self._router_norm = context.small(
            graph, f"{self.prefix}router_norm.weight", hidden, factor=1 / hidden
        )
        self._router = context.small(graph, f"{self.prefix}modality_router.weight", count, hidden)

    def _modalities(self, rows: str) -> str:
        normed = self.graph.rms_norm(rows, self._router_norm, self.context.model.rms_norm_eps)
        return self.graph.op("Tanh", self.graph.op("Gemm", normed, self._router, transB=1))

    def predict(self, streams: str) -> str:
        """Return the predicted streams: (coefficients + identity) @ streams."""
        graph, count = self.graph, self.context.model.altup_num_inputs
        coefficients = graph.op(
            "Gemm",
            self._modalities(stream(graph, streams, 0)),
            self.context.small(graph, f"{self.prefix}prediction_coefs.weight", count**2, count),
            graph.constant(np.eye(count).reshape(1, -1)),
            transB=1,
        )
        return graph.op("MatMul", graph.reshape(coefficients, -1, count, count), streams)

    def corrections(self, activated: str) -> str:
        """Return [R, A * 2]: each stream's correction coefficient, and 1 for all streams but 0.

        The second of a pair lets one product add the per-layer embedding to those streams as well.
        """
        graph, model = self.graph, self.context.model
        count = model.altup_num_inputs
        name = f"{self.prefix}correction_coefs.weight"
        weight = self.context.checkpoint.tensor(name, (count, count))
        if model.altup_coef_clip is not None:
            weight = weight.clip(-model.altup_coef_clip, model.altup_coef_clip)
        pairs = np.zeros((count, 2, count), np.float32)
        pairs[:, 0] = weight
        bias = np.ones((count, 2), np.float32)
        bias[0, 1] = 0
        return graph.op(
            "Gemm",
            self._modalities(activated),
            graph.weight(name, pairs.reshape(2 * count, count)),
            graph.constant(bias.reshape(1, -1)),
            transB=1,
        )

    def correct(self, predictions: str, pairs: str, innovation: str, embedded: str) -> str:
        """Return predictions + pairs @ [innovation; embedded], the streams behind the layer."""
        graph, model = self.graph, self.context.model
        both = graph.op("Concat", innovation, embedded, axis=1)
        additions = graph.reshape(both, -1, 2, model.hidden_size)
        pairs = graph.reshape(pairs, -1, model.altup_num_inputs, 2)
        return graph.op("Add", predictions, graph.op("MatMul", pairs, additions))


def stream(graph: GraphBuilder, streams: str, index: int) -> str:
    """Return one stream [R, hidden] of [R, A, hidden]."""
    return graph.op("Gather", streams, graph.constant(index, np.int64), axis=1)
