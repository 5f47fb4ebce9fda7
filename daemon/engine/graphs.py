"""The loaded graphs of a bundle; the only file that imports onnxruntime.

Knows tensors and sub-models; knows no tokens' meaning, no sampling, no MQTT and no policy.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from nestd.bundle.errors import BundleError
from nestd.bundle.manifest import Bundle, Submodel
from nestd.daemon.engine.kv_cache import KVCache
from nestd.daemon.engine.messages import EngineOptions

Floats = npt.NDArray[np.float32]

# How long a worker thread spins for more work. The default of 25 ms after every run burns a core
# while the daemon waits for nothing; 0.5 ms keeps the speed of decoding (docs/engine.md).
SPIN_MICROSECONDS = "500"


@dataclass(frozen=True, slots=True)
class _Flags:
    """A sub-model as the decoder's inputs."""

    wide_layers: npt.NDArray[np.bool_]
    kept_layers: npt.NDArray[np.bool_]


class Graphs:
    """The text graphs of one bundle, ready to run."""

    def __init__(self, bundle: Bundle, options: EngineOptions) -> None:
        """Load the graphs.

        Raises:
            BundleError: a graph is missing or ONNX Runtime refuses it.
        """
        self.bundle = bundle
        self.model = bundle.manifest.model
        self._options = options
        self._embed_tokens = self._load("embed_tokens", threads=1)
        self._per_layer_embeddings = self._load("per_layer_embeddings", threads=1)
        self._decoder = self._load("decoder", threads=options.threads)
        self._flags: dict[str, _Flags] = {}
        self._need = {flag: np.array([flag]) for flag in (False, True)}

    def _load(self, name: str, threads: int | None) -> ort.InferenceSession:
        path = self.bundle.file(f"{name}.onnx")
        return load_graph(path, threads)

    def new_cache(self, capacity: int) -> KVCache:
        """Return an empty cache for a sequence of up to `capacity` tokens."""
        return KVCache(self.model, capacity)

    def run(
        self, ids: npt.NDArray[np.int64], cache: KVCache, submodel: Submodel, need_logits: bool
    ) -> Floats | None:
        """Append the tokens `ids` [S] to `cache` on `submodel`.

        Returns:
            The last token's logits [vocab], or None unless `need_logits`.

        Raises:
            ValueError: no ids, an id outside the vocabulary, or no room in the cache.
        """
        if not 0 < len(ids) <= cache.room:
            raise ValueError(f"{len(ids)} tokens do not fit a cache with room for {cache.room}")
        if ids.min() < 0 or ids.max() >= self.model.vocab_size:
            raise ValueError(f"a token id lies outside the vocabulary of {self.model.vocab_size}")
        batch = {"input_ids": ids[np.newaxis]}
        (embeds,) = self._embed_tokens.run(["inputs_embeds"], batch)
        (per_layer,) = self._per_layer_embeddings.run(["per_layer_inputs"], batch)
        return self._decode(embeds, per_layer, cache, submodel, need_logits)

    def _decode(
        self,
        inputs_embeds: Floats,
        per_layer_inputs: Floats,
        cache: KVCache,
        submodel: Submodel,
        need_logits: bool,
    ) -> Floats | None:
        total = cache.length + inputs_embeds.shape[1]
        flags = self._submodel_flags(submodel)
        binding = self._decoder.io_binding()
        for name, value in (
            ("inputs_embeds", inputs_embeds),
            ("per_layer_inputs", per_layer_inputs),
            ("seqlens_k", np.array([total - 1], np.int32)),
            ("total_sequence_length", np.array(total, np.int32)),
            ("wide_layers", flags.wide_layers),
            ("kept_layers", flags.kept_layers),
            ("need_logits", self._need[need_logits]),
        ):
            binding.bind_cpu_input(name, value)
        binding.bind_output("logits", "cpu")
        # Past and present are the same memory: the new rows are written where they belong.
        for name, buffer in cache.buffers.items():
            value = ort.OrtValue.ortvalue_from_numpy(buffer)
            binding.bind_ortvalue_input(f"past_key_values.{name}", value)
            binding.bind_ortvalue_output(f"present.{name}", value)
        self._decoder.run_with_iobinding(binding)
        cache.length = total
        if not need_logits:
            return None
        # Only the output that was bound first is fetched: copying all would copy the whole cache.
        logits: Floats = binding.get_outputs()[0].numpy()[0]
        return logits

    def _submodel_flags(self, submodel: Submodel) -> _Flags:
        flags = self._flags.get(submodel.name)
        if flags is None:
            wide = np.zeros(self.model.num_layers, np.bool_)
            kept = np.ones(self.model.num_layers, np.bool_)
            wide[list(submodel.wide_layers)] = True
            kept[list(submodel.skipped_layers)] = False
            flags = self._flags[submodel.name] = _Flags(wide, kept)
        return flags


def load_graph(path: Path, threads: int | None) -> ort.InferenceSession:
    """Load one ONNX graph on the CPU.

    Args:
        path: the .onnx file; its external data lie beside it.
        threads: intra-operator threads, None for ONNX Runtime's choice.

    Raises:
        BundleError: ONNX Runtime cannot load it.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.spin_duration_us", SPIN_MICROSECONDS)
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no base but Exception
        raise BundleError(f"ONNX Runtime cannot load {path}: {error}") from error
