"""The elastic feed-forward: a narrow half that always runs and a wide half behind an If.

Source: Gemma3nTextMLP in transformers 4.57; MatFormer (arXiv:2310.07707): the nested sub-network is
the first rows of gate and up and the same columns of down.
"""

from __future__ import annotations

from statistics import NormalDist

import numpy as np

from nestd.conversion.decoder.context import DecoderContext
from nestd.conversion.decoder.sparse_feed_forward import SparseFeedForward
from nestd.conversion.graph_builder import GraphBuilder
from nestd.conversion.weights import Matrix, matrix, stack


class FeedForward:
    """One layer's feed-forward.

    Where the layer is sparse (gaussian top-k), the cutoff depends on the mean and deviation over
    the whole active width: the wide branch returns the cutoff beside its contribution, and the
    narrow half waits for it.
    """

    def __init__(self, context: DecoderContext, graph: GraphBuilder, layer: int) -> None:
        self.context, self.graph, self.layer = context, graph, layer
        self.width = context.model.intermediate_size[layer]
        self.narrow = context.model.nested_intermediate_size
        sparsity = context.model.activation_sparsity_pattern[layer]
        self.deviations = NormalDist().inv_cdf(sparsity) if sparsity > 0 else None

    def run(self, rows: str) -> tuple[str, int]:
        """Return (rows [R, hidden], bytes of the wide half) for rows [R, hidden]."""
        graph = self.graph
        if self.deviations is not None and self.context.sparse_rows:
            sparse = SparseFeedForward(self.context, graph, self.layer, self.deviations)
            return sparse.run(rows)
        gate, up = self._gate_up(graph, rows, 0, self.narrow)
        sums = self._sums(graph, gate) if self.deviations is not None else None
        wide_bytes = 0
        contribution = None
        if self.width > self.narrow:
            start = graph.weights.size
            contribution, cutoff = self._wide_if(rows, sums)
            wide_bytes = graph.weights.size - start
        else:
            cutoff = self._cutoff(graph, sums, self.narrow) if sums else None
        result = self._down(graph, gate, up, cutoff, 0, self.narrow)
        if contribution is not None:
            result = graph.op("Add", result, contribution)
        return result, wide_bytes

    def _wide_if(self, rows: str, sums: tuple[str, str] | None) -> tuple[str, str | None]:
        wide = self.graph.branch(f"layers.{self.layer}.wide")
        gate, up = self._gate_up(wide, rows, self.narrow, self.width)
        cutoff = None
        if sums:
            mine = self._sums(wide, gate)
            both = (wide.op("Add", sums[0], mine[0]), wide.op("Add", sums[1], mine[1]))
            cutoff = self._cutoff(wide, both, self.width)
        contribution = self._down(wide, gate, up, cutoff, self.narrow, self.width)

        # A scalar zero: adding it costs nothing, whatever the number of rows.
        narrow = self.graph.branch(f"layers.{self.layer}.narrow")
        nothing = narrow.op("Identity", narrow.constant(0.0))
        then_outputs, else_outputs = [contribution], [nothing]
        if sums and cutoff:
            then_outputs.append(cutoff)
            else_outputs.append(self._cutoff(narrow, sums, self.narrow))
        outputs = self.graph.ops(
            "If",
            self.context.wide_flags[self.layer],
            outputs=len(then_outputs),
            then_branch=wide.branch_graph(then_outputs),
            else_branch=narrow.branch_graph(else_outputs),
        )
        return outputs[0], outputs[1] if sums else None

    def _gate_up(self, graph: GraphBuilder, rows: str, first: int, last: int) -> list[str]:
        hidden = self.context.model.hidden_size
        parts = [
            matrix(
                self.context.checkpoint,
                f"layers.{self.layer}.mlp.{name}_proj.weight",
                (self.width, hidden),
                rows=(first, last),
            )
            for name in ("gate", "up")
        ]
        name = f"layers.{self.layer}.mlp.gate_up_proj.{first}"
        both = graph.linear(rows, name, stack(*parts), self.context.bits)
        return graph.ops("Split", both, outputs=2, axis=1, num_outputs=2)

    def _sums(self, graph: GraphBuilder, gate: str) -> tuple[str, str]:
        """Return sum and sum of squares [R, 1] of the gate's activations [R, width]."""
        axes = graph.constant([-1], np.int64)
        return graph.op("ReduceSum", gate, axes), graph.op("ReduceSumSquare", gate, axes)

    def _cutoff(self, graph: GraphBuilder, sums: tuple[str, str], width: int) -> str:
        """Return mean + deviations * population standard deviation [R, 1]."""
        assert self.deviations is not None
        share = graph.constant(1 / width)
        mean = graph.op("Mul", sums[0], share)
        variance = graph.op("Sub", graph.op("Mul", sums[1], share), graph.op("Mul", mean, mean))
        deviation = graph.op("Sqrt", graph.op("Max", variance, graph.constant(0.0)))
        scaled = graph.op("Mul", deviation, graph.constant(self.deviations))
        return graph.op("Add", mean, scaled)

    def _down(
        self, graph: GraphBuilder, gate: str, up: str, cutoff: str | None, first: int, last: int
    ) -> str:
        if cutoff:
            gate = graph.op("Relu", graph.op("Sub", gate, cutoff))
        active = graph.op("Mul", graph.op("Gelu", gate, approximate="tanh"), up)
        source: Matrix = matrix(
            self.context.checkpoint,
            f"layers.{self.layer}.mlp.down_proj.weight",
            (self.context.model.hidden_size, self.width),
            columns=(first, last),
        )
        name = f"layers.{self.layer}.mlp.down_proj.{first}"
        return graph.linear(active, name, source, self.context.bits)
