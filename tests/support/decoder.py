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
    """The graphs of one bundle, with a KV cache of float32 or of int8 (`kv_bits` 8)."""

    def __init__(self, bundle: Bundle, kv_bits: int = 32) -> None:
        self.bundle = bundle
        self.model = bundle.manifest.model
        self.kv_bits = kv_bits
        files = {"decoder": "decoder" if kv_bits == 32 else "decoder_int8_cache"}
        files |= {name: name for name in ("embed_tokens", "per_layer_embeddings")}
        self._graphs = {
            name: load_graph(bundle.file(f"{file}.onnx"), threads=2) for name, file in files.items()
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
        for name in (output.name for output in self._graphs["decoder"].get_outputs()[1:]):
            layer, part = name.split(".")[1:]
            buffer = buffers[f"{self.model.kv_source(int(layer))}.{part}"]
            binding.bind_ortvalue_output(name, share(buffer))
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
        # In rows that nothing may read, NaN shows in every logit, and 127 in many.
        self._unread, kind = (np.nan, np.float32) if decoder.kv_bits == 32 else (127, np.int8)
        self.buffers: dict[str, npt.NDArray[Any]] = {}
        for layer in range(model.first_kv_shared_layer):
            rows = window_capacity if model.slides(layer) else capacity
            shape = (size, model.num_key_value_heads, rows, model.head_dim)
            for part in ("key", "value"):
                self.buffers[f"{layer}.{part}"] = np.full(shape, self._unread, kind)

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
                    buffer[index] = self._unread
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
