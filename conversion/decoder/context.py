"""What every part of the decoder needs: the checkpoint, the numbers, and shared graph values."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from nestd.bundle.manifest import ModelConfig
from nestd.conversion.checkpoint import Checkpoint
from nestd.conversion.graph_builder import GraphBuilder
from nestd.conversion.weights import Matrix, matrix


@dataclass(slots=True)
class DecoderContext:
    """Passed to each part.

    Attributes:
        bits: of attention and feed-forward, which hold nearly all weights.
        small_bits: of the projections around them, which are few and more sensitive: never 4.
        sparse_rows: whether layers with gaussian top-k get tables of rows for decoding.
        rope: names of (cos, sin) caches by layer type.
        batch: name of the shape [B].
        query_shape, qkv_shape: names of the shapes [B, -1, width] that give rows a batch axis.
        positions: name of the positions [B, rows] of the rows that run.
        no_kv: name of an empty key and value [B, 0, kv width] for layers without a cache.
        single_row: name of a bool [1], whether there is one row in all.
        no_columns: name of the shape [R, 0] of all rows.
        wide_flags, kept_flags: names of each layer's bool [1].
    """

    checkpoint: Checkpoint
    model: ModelConfig
    bits: int
    small_bits: int
    sparse_rows: bool = False
    rope: dict[str, tuple[str, str]] = field(default_factory=dict)
    batch: str = ""
    query_shape: str = ""
    qkv_shape: str = ""
    positions: str = ""
    no_kv: str = ""
    single_row: str = ""
    no_columns: str = ""
    wide_flags: list[str] = field(default_factory=list)
    kept_flags: list[str] = field(default_factory=list)

    @property
    def query_width(self) -> int:
        """Features of all query heads together."""
        return self.model.num_attention_heads * self.model.head_dim

    @property
    def kv_width(self) -> int:
        """Features of all key heads together."""
        return self.model.num_key_value_heads * self.model.head_dim

    def matrix(self, name: str, rows: int, columns: int) -> Matrix:
        """Return the whole weight `name`.weight, a matrix [rows, columns]."""
        return matrix(self.checkpoint, f"{name}.weight", (rows, columns))

    def batched(self, graph: GraphBuilder, *sizes: int) -> str:
        """Return the name of the shape [B, *sizes]."""
        return graph.op("Concat", self.batch, graph.constant(sizes, np.int64), axis=0)

    def small(self, graph: GraphBuilder, name: str, *shape: int, factor: float = 1.0) -> str:
        """Add the small float32 tensor `name` of `shape`, times `factor`, to `graph`."""
        value = self.checkpoint.tensor(name, shape)
        return graph.weight(name, value if factor == 1.0 else value * np.float32(factor))

    def norm(self, graph: GraphBuilder, x: str, name: str) -> str:
        """RMS-normalise rows `x` [R, hidden] with the weight `name`.weight."""
        scale = self.small(graph, f"{name}.weight", self.model.hidden_size)
        return graph.rms_norm(x, scale, self.model.rms_norm_eps)
