"""The text graphs of a bundle, run on arrays of any batch: what the engine builds on, bare."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from nestd.bundle.manifest import Bundle
from nestd.daemon.engine.sessions import load_graph, share
from nestd.daemon.engine.window import Window

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

    def batch(self, size: int, capacity: int, window_capacity: int | None = None) -> Batch:
        """Return `size` empty sequences of up to `capacity` tokens.

        Caches of sliding layers have `window_capacity` rows, None for one a token.
        """
        return Batch(self, size, capacity, window_capacity or capacity)

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
        lengths: tokens of each; `cut` forgets the last of them.
        starts: the first token in the caches of sliding layers.
    """

    def __init__(self, decoder: Decoder, size: int, capacity: int, window_capacity: int) -> None:
        self._decoder = decoder
        model = decoder.model
        self.window = Window(model.sliding_window, window_capacity)
        self.lengths = np.zeros(size, np.int64)
        self.starts = np.zeros(size, np.int64)
        # NaN in rows that nothing may read shows in every logit.
        self.buffers = {
            f"{layer}.{part}": np.full(
                (
                    size,
                    model.num_key_value_heads,
                    window_capacity if model.slides(layer) else capacity,
                    model.head_dim,
                ),
                np.nan,
                np.float32,
            )
            for layer in range(model.first_kv_shared_layer)
            for part in ("key", "value")
        }

    def cut(self, index: int, length: int) -> None:
        """Forget the tokens of sequence `index` from `length` on."""
        assert self.window.holds(self.starts[index], length)
        self.lengths[index] = length

    def _make_room(self, rows: int) -> None:
        for index, (start, length) in enumerate(zip(self.starts, self.lengths, strict=True)):
            first = self.window.start_for(int(start), int(length), rows)
            for name, buffer in self.buffers.items():
                if self._decoder.model.slides(int(name.split(".")[0])) and first != start:
                    kept = buffer[index, :, first - start : length - start].copy()
                    buffer[index] = np.nan
                    buffer[index, :, : length - first] = kept
            self.starts[index] = first

    def step(self, ids: Ids, rows: int = 1, skipped: Sequence[int] = ()) -> Floats:
        """Append `ids` [B, S]; return logits [B, rows, vocab]. All layers run wide."""
        layers = self._decoder.model.num_layers
        self._make_room(ids.shape[1])
        totals = self.lengths + ids.shape[1]
        held = totals - self.starts
        kept = np.ones(layers, np.bool_)
        kept[list(skipped)] = False
        feeds = {
            "inputs_embeds": self._decoder.run("embed_tokens", ids),
            "per_layer_inputs": self._decoder.run("per_layer_embeddings", ids),
            "seqlens_k": (totals - 1).astype(np.int32),
            "total_sequence_length": np.array(totals.max(), np.int32),
            "window_seqlens_k": (held - 1).astype(np.int32),
            "window_total_sequence_length": np.array(held.max(), np.int32),
            "wide_layers": np.ones(layers, np.bool_),
            "kept_layers": kept,
            "logit_rows": np.array([rows], np.int64),
        }
        logits = self._decoder.decode(feeds, self.buffers)
        self.lengths = totals
        return logits
