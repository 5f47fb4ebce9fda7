"""The rotary embedding's cosine and sine tables."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from nestd.bundle.manifest import ModelConfig

Table = npt.NDArray[np.float32]


def rope_tables(model: ModelConfig) -> dict[str, tuple[Table, Table]]:
    """Return (cos, sin) float32 [max_position_embeddings, head_dim / 2] by layer type.

    Computed in float32 as transformers does (`Gemma3nTextRotaryEmbedding`), so that angles agree at
    high positions, where float64 would differ.
    """
    half = np.arange(0, model.head_dim, 2, dtype=np.float32) / np.float32(model.head_dim)
    positions = np.arange(model.max_position_embeddings, dtype=np.float32)
    tables: dict[str, tuple[Table, Table]] = {}
    for kind in dict.fromkeys(model.layer_types):
        theta = model.rope_theta if kind == "full_attention" else model.rope_local_base_freq
        frequencies = (1.0 / (np.float32(theta) ** half)).astype(np.float32)
        angles = np.outer(positions, frequencies).astype(np.float32)
        tables[kind] = (np.cos(angles), np.sin(angles))
    return tables
