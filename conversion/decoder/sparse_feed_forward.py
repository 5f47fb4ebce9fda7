"""The feed-forward of a layer with gaussian top-k, which decodes by the rows that are not zero.

Gaussian top-k (95 % in the first ten layers of Gemma 3n) leaves one channel in twenty of the gate
above zero, and only these channels of up and down matter. A single token gathers them: row j of two
int8 tables, up's row j and down's column j. Every other number of tokens, for which more channels
matter, runs up and down whole as `FeedForward` does. The gate always runs whole: it decides.

The activations that meet the tables are two int8 parts each, a rounded one and what rounding left,
so only the tables' own rounding (one scale a row) remains as an error.

Source: Gemma3nTextMLP in transformers 4.57; the wide half as in `feed_forward.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from nestd.conversion.decoder.context import DecoderContext
from nestd.conversion.graph_builder import GraphBuilder
from nestd.conversion.weights import matrix

LARGEST = 127
# What rounding to the nearest leaves is half a step at most: it fills int8 again, times this.
REST = 2 * LARGEST
Half = tuple[int, int]


class SparseFeedForward:
    """One layer's feed-forward."""

    def __init__(
        self, context: DecoderContext, graph: GraphBuilder, layer: int, deviations: float
    ) -> None:
        """Args: `deviations` above the mean, in standard deviations, is where a channel counts."""
        self.context, self.graph, self.layer = context, graph, layer
        self.deviations = deviations
        self.width = context.model.intermediate_size[layer]
        self.narrow = context.model.nested_intermediate_size
        self.wide_bytes = 0

    def run(self, rows: str) -> tuple[str, int]:
        """Return (rows [R, hidden], bytes of the wide half) for rows [R, hidden]."""
        graph = self.graph
        gate = self._linear(graph, rows, "gate", (0, self.narrow))
        if self.width > self.narrow:
            upper = self._if_wide(
                graph, lambda wide: self._linear(wide, rows, "gate", (self.narrow, self.width))
            )
            gate = graph.op("Concat", gate, upper, axis=1)
        active = graph.op("Gelu", self._above_cutoff(gate), approximate="tanh")

        dense = graph.branch(f"layers.{self.layer}.dense")
        few = graph.branch(f"layers.{self.layer}.sparse")
        # No channel at all would be an empty product; a gate of equal values has none.
        some = graph.op("ReduceMax", active, keepdims=0)
        some = graph.op("Greater", some, graph.constant(0.0))
        result = graph.op(
            "If",
            graph.op("And", self.context.single_row, some),
            then_branch=few.branch_graph([self._sparse(few, rows, active)]),
            else_branch=dense.branch_graph([self._dense(dense, rows, active)]),
        )
        return result, self.wide_bytes

    def _above_cutoff(self, gate: str) -> str:
        """Return what of the gate [R, width] is above mean + deviations * deviation, else 0."""
        graph, axes = self.graph, self.graph.constant([-1], np.int64)
        centred = graph.op("Sub", gate, graph.op("ReduceMean", gate, axes))
        variance = graph.op("ReduceMean", graph.op("Mul", centred, centred), axes)
        cutoff = graph.op("Mul", graph.op("Sqrt", variance), graph.constant(self.deviations))
        return graph.op("Relu", graph.op("Sub", centred, cutoff))

    def _dense(self, graph: GraphBuilder, rows: str, active: str) -> str:
        """Run up and down whole: the narrow half, and the wide one where the layer is wide."""

        def half(part: GraphBuilder, bounds: Half) -> str:
            limits = (part.constant([bound], np.int64) for bound in (*bounds, 1))
            gate = part.op("Slice", active, *limits)
            product = part.op("Mul", gate, self._linear(part, rows, "up", bounds))
            return self._linear(part, product, "down", bounds)

        result = half(graph, (0, self.narrow))
        if self.width > self.narrow:
            upper = self._if_wide(graph, lambda wide: half(wide, (self.narrow, self.width)), 0.0)
            result = graph.op("Add", result, upper)
        return result

    def _sparse(self, graph: GraphBuilder, rows: str, active: str) -> str:
        """Run the channels of `active` [1, width] that are above zero, on one row."""
        hidden = self.context.model.hidden_size
        up, down, scales = self._tables(graph)
        _, channels = graph.ops("Split", graph.op("NonZero", active), outputs=2, num_outputs=2)
        channels = graph.reshape(channels, -1)
        gate = graph.op("Gather", active, channels, axis=1)
        gate = graph.op("Mul", gate, graph.op("Gather", scales, channels, axis=1))

        # up: [n, hidden] times [hidden, 2].
        parts, step = self._int8_parts(graph, rows)
        parts = graph.op("Cast", graph.op("Transpose", parts, perm=[1, 0]), to=TensorProto.INT8)
        zero = graph.constant(128, np.uint8)
        product = graph.op("MatMulInteger", graph.op("Gather", up, channels), parts, zero)
        product = self._joined(graph, product, transposed=True)
        product = graph.op("Mul", graph.op("Mul", product, step), gate)

        # down: [2, n] times [n, hidden].
        parts, step = self._int8_parts(graph, product)
        parts = graph.op("Add", parts, graph.constant(128.0))
        parts = graph.op("Cast", parts, to=TensorProto.UINT8)
        product = graph.op("MatMulInteger", parts, graph.op("Gather", down, channels), zero)
        product = graph.op("Mul", self._joined(graph, product, transposed=False), step)
        return graph.reshape(product, 1, hidden)

    def _int8_parts(self, graph: GraphBuilder, row: str) -> tuple[str, str]:
        """Return whole numbers [2, width] within -127..127 for `row` [1, width], and their step."""
        largest = graph.op("ReduceMax", graph.op("Abs", row))
        largest = graph.op("Max", largest, graph.constant(1e-30))
        step = graph.op("Mul", largest, graph.constant(1 / LARGEST))
        exact = graph.op("Div", row, step)
        rounded = graph.op("Round", exact)
        rest = graph.op("Mul", graph.op("Sub", exact, rounded), graph.constant(REST))
        return graph.op("Concat", rounded, graph.op("Round", rest), axis=0), step

    def _joined(self, graph: GraphBuilder, product: str, *, transposed: bool) -> str:
        """Return the sum [1, width] of both parts' products [2, width] ([width, 2] transposed)."""
        product = graph.op("Cast", product, to=TensorProto.FLOAT)
        weights = graph.constant([[1.0, 1 / REST]])
        return graph.op("Gemm", weights, product, transB=int(transposed))

    def _tables(self, graph: GraphBuilder) -> tuple[str, str, str]:
        """Write up's rows and down's columns, uint8 and int8 [width, hidden], and their scales.

        One scale [1, width] a channel, the product of its two: they meet in the gate.
        """
        hidden, width = self.context.model.hidden_size, self.width
        name = f"layers.{self.layer}.mlp"
        start = graph.weights.size
        source = matrix(self.context.checkpoint, f"{name}.up_proj.weight", (width, hidden))
        chunks = []
        up_scales = []
        for chunk in source.chunks():
            scales = _scales(np.abs(chunk).max(axis=1))
            up_scales.append(scales)
            chunks.append(_rounded(chunk, scales[:, np.newaxis]).view(np.uint8) ^ 128)
        up = graph.initializer(graph.weights.array(f"{name}.up_rows", np.concatenate(chunks)))

        source = matrix(self.context.checkpoint, f"{name}.down_proj.weight", (hidden, width))
        largest = np.zeros(width, np.float32)
        for chunk in source.chunks():
            np.maximum(largest, np.abs(chunk).max(axis=0), out=largest)
        down_scales = _scales(largest)
        columns = np.concatenate([_rounded(chunk, down_scales) for chunk in source.chunks()])
        down = graph.initializer(graph.weights.array(f"{name}.down_rows", columns.T))

        both = (np.concatenate(up_scales) * down_scales)[np.newaxis]
        joined = graph.weight(f"{name}.row_scales", both)
        self.wide_bytes += (graph.weights.size - start) * (width - self.narrow) // width
        return up, down, joined

    def _if_wide(
        self,
        graph: GraphBuilder,
        run: Callable[[GraphBuilder], str],
        otherwise: float | None = None,
    ) -> str:
        """Return what `run` makes if the layer is wide, else `otherwise` or no columns."""
        wide = graph.branch(f"layers.{self.layer}.wide")
        narrow = graph.branch(f"layers.{self.layer}.narrow")
        start = graph.weights.size
        result = run(wide)
        self.wide_bytes += graph.weights.size - start
        if otherwise is None:
            nothing = narrow.op("ConstantOfShape", self.context.no_columns)
        else:
            nothing = narrow.op("Identity", narrow.constant(otherwise))
        return graph.op(
            "If",
            self.context.wide_flags[self.layer],
            then_branch=wide.branch_graph([result]),
            else_branch=narrow.branch_graph([nothing]),
        )

    def _linear(self, graph: GraphBuilder, x: str, kind: str, bounds: Half) -> str:
        """Multiply by the half of gate's or up's rows, or of down's columns, within `bounds`."""
        name, hidden = f"layers.{self.layer}.mlp.{kind}_proj", self.context.model.hidden_size
        if kind == "down":
            shape, part = (hidden, self.width), {"columns": bounds}
        else:
            shape, part = (self.width, hidden), {"rows": bounds}
        source = matrix(self.context.checkpoint, f"{name}.weight", shape, **part)
        return graph.linear(x, f"{name}.{bounds[0]}", source, self.context.bits)


def _scales(largest: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return the scales that map these magnitudes to 127; zeros stay zeros at any scale."""
    return np.where(largest > 0, largest, 1).astype(np.float32) / np.float32(LARGEST)


def _rounded(
    values: npt.NDArray[np.float32], scales: npt.NDArray[np.float32]
) -> npt.NDArray[np.int8]:
    rounded: npt.NDArray[np.int8] = np.rint(values / scales).astype(np.int8)
    return rounded
