"""The graphs `embed_tokens` and `per_layer_embeddings`: rows of a table, looked up and scaled.

    input_ids int64 [B, S] -> inputs_embeds float32 [B, S, hidden]
    input_ids int64 [B, S] -> per_layer_inputs float32 [B, S, layers, P]

Both tables are read in place from their file, so only rows that were asked for become resident. The
token table is the lm_head's too: the decoder's weights refer to the same bytes of the same file.
Source: Gemma3nTextScaledWordEmbedding in transformers 4.57.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from onnx import TensorProto, ValueInfoProto

from nestd.bundle.manifest import ModelConfig
from nestd.conversion.checkpoint import Checkpoint
from nestd.conversion.graph_builder import MICROSOFT, GraphBuilder, tensor_info
from nestd.conversion.quantize import block_for
from nestd.conversion.weights import Matrix, WeightFile, matrix

# Rows that are scored exactly behind a screen: four times the usual top-k.
SCREENED_ROWS = 256


@dataclass(frozen=True, slots=True)
class EmbeddingTable:
    """A table [vocab, width] that lies in a weight file, as initializers that refer to it.

    Attributes:
        data: float32 [vocab, width], or uint8 [vocab, width * bits / 8].
        scales: float32 [vocab, width / block], None for float32 data.
    """

    data: TensorProto
    scales: TensorProto | None
    bits: int
    block: int

    @classmethod
    def write(
        cls,
        checkpoint: Checkpoint,
        name: str,
        shape: tuple[int, int],
        bits: int,
        weights: WeightFile,
        block_size: int,
    ) -> EmbeddingTable:
        """Stream the weight `name` of `shape` to `weights`, quantised unless `bits` is 32."""
        source = matrix(checkpoint, name, shape)
        block = block_for(shape[1], block_size) if bits != 32 else None
        if block is None:
            return cls(weights.floats(name, source), None, 32, 0)
        data, scales = weights.quantized(name, source, bits, block)
        return cls(data, scales, bits, block)

    def rows(self, graph: GraphBuilder, ids: str) -> str:
        """Return the rows of `ids` [B, S] as float32 [B, S, width]."""
        if self.scales is None:
            return graph.op("Gather", graph.initializer(self.data), ids)
        return graph.op(
            "GatherBlockQuantized",
            graph.initializer(self.data),
            ids,
            graph.initializer(self.scales),
            domain=MICROSOFT,
            gather_axis=0,
            quantize_axis=1,
            bits=self.bits,
            block_size=self.block,
        )

    def logits(self, graph: GraphBuilder, hidden: str) -> str:
        """Multiply rows `hidden` [R, width] by the transposed table: float32 [R, vocab]."""
        if self.scales is None:
            return graph.op("Gemm", hidden, graph.initializer(self.data), transB=1)
        return graph.quantized_linear(hidden, self.data, self.scales, self.bits, self.block)

    def screened_logits(self, graph: GraphBuilder, hidden: str, screen: Matrix) -> str:
        """Multiply rows `hidden` [R, width] by the table at 4 bits: float32 [R, vocab].

        The largest SCREENED_ROWS of each row are replaced by products with the table itself, of
        which only these rows are read. `screen` is the weight [vocab, width] of the table.
        """
        rough = graph.linear(hidden, "lm_head.screen", screen, 4)
        count = graph.constant([min(SCREENED_ROWS, screen.rows)], np.int64)
        _, likely = graph.ops("TopK", rough, count, outputs=2, axis=1, sorted=0)
        axis = graph.constant([2], np.int64)
        column = graph.op("Unsqueeze", hidden, axis)
        exact = graph.op("MatMul", self.rows(graph, likely), column)
        exact = graph.op("Squeeze", exact, axis)
        return graph.op("ScatterElements", rough, likely, exact, axis=1)


def write_embed_tokens(
    path: Path, model: ModelConfig, weights: WeightFile, table: EmbeddingTable
) -> None:
    """Write the graph of the token embeddings, scaled by sqrt(hidden)."""
    graph = GraphBuilder("embed_tokens", weights, table.block)
    scale = graph.constant(np.sqrt(model.hidden_size))
    graph.op("Mul", table.rows(graph, "input_ids"), scale, output="inputs_embeds")
    shape: list[int | str] = ["batch", "sequence", model.hidden_size]
    graph.save(path, [_ids()], [tensor_info("inputs_embeds", TensorProto.FLOAT, shape)])


def write_per_layer_embeddings(
    path: Path, model: ModelConfig, weights: WeightFile, table: EmbeddingTable
) -> None:
    """Write the graph of the per-layer embeddings, scaled by sqrt(P).

    An id outside the table's vocabulary (an image or audio position) reads row 0, as
    Gemma3nModel.forward does.
    """
    graph = GraphBuilder("per_layer_embeddings", weights, table.block)
    inside = graph.op(
        "Less", "input_ids", graph.constant(model.vocab_size_per_layer_input, np.int64)
    )
    ids = graph.op("Where", inside, "input_ids", graph.constant(0, np.int64))
    width, layers = model.hidden_size_per_layer_input, model.num_layers
    rows = graph.op("Mul", table.rows(graph, ids), graph.constant(np.sqrt(width)))
    shape = graph.constant([0, 0, layers, width], np.int64)
    graph.op("Reshape", rows, shape, output="per_layer_inputs")
    dims: list[int | str] = ["batch", "sequence", layers, width]
    graph.save(path, [_ids()], [tensor_info("per_layer_inputs", TensorProto.FLOAT, dims)])


def _ids() -> ValueInfoProto:
    return tensor_info("input_ids", TensorProto.INT64, ["batch", "sequence"])
