"""The text graphs of a bundle, run on arrays of any batch: what the engine builds on, bare."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from nestd.bundle.manifest import Bundle
from nestd.daemon.engine.sessions import load_graph, share

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


class Decoder:
    """The graphs of one bundle."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.model = bundle.manifest.model
        self._graphs = {
            name: load_graph(bundle.file(f"{name}.onnx"), threads=2)
            for name in ("embed_tokens", "per_layer_embeddings", "decoder")
        }

    def batch(self, size: int, capacity: int) -> Batch:
        """Return `size` empty sequences of up to `capacity` tokens."""
        return Batch(self, size, capacity)

    def run(self, name: str, ids: Ids) -> Floats:
        (result,) = self._graphs[name].run(None, {"input_ids": ids})
        return np.asarray(result)

    def decode(self, feeds: dict[str, Any], buffers: dict[str, npt.NDArray[Any]]) -> Floats:
        binding = self._graphs["decoder"].io_binding()
        for name, value in feeds.items():
            binding.bind_cpu_input(name, value)
        binding.bind_output("logits", "cpu")
        for name, buffer in buffers.items():
            binding.bind_ortvalue_input(f"past_key_values.{name}", share(buffer))
            binding.bind_ortvalue_output(f"present.{name}", share(buffer))
        self._graphs["decoder"].run_with_iobinding(binding)
        return np.asarray(binding.get_outputs()[0].numpy())


class Batch:
    """Sequences that step together, each of its own length.

    Attributes:
        lengths: tokens in the cache of each; lower one to forget its last tokens.
    """

    def __init__(self, decoder: Decoder, size: int, capacity: int) -> None:
        self._decoder = decoder
        model = decoder.model
        shape = (size, model.num_key_value_heads, capacity, model.head_dim)
        self.lengths = np.zeros(size, np.int64)
        self.buffers = {
            f"{layer}.{part}": np.zeros(shape, np.float32)
            for layer in range(model.first_kv_shared_layer)
            for part in ("key", "value")
        }

    def step(self, ids: Ids, rows: int = 1, skipped: Sequence[int] = ()) -> Floats:
        """Append `ids` [B, S]; return logits [B, rows, vocab]. All layers run wide."""
        layers = self._decoder.model.num_layers
        totals = self.lengths + ids.shape[1]
        kept = np.ones(layers, np.bool_)
        kept[list(skipped)] = False
        feeds = {
            "inputs_embeds": self._decoder.run("embed_tokens", ids),
            "per_layer_inputs": self._decoder.run("per_layer_embeddings", ids),
            "seqlens_k": (totals - 1).astype(np.int32),
            "total_sequence_length": np.array(totals.max(), np.int32),
            "wide_layers": np.ones(layers, np.bool_),
            "kept_layers": kept,
            "logit_rows": np.array([rows], np.int64),
        }
        logits = self._decoder.decode(feeds, self.buffers)
        self.lengths = totals
        return logits
