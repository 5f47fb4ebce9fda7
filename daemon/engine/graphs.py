"""The loaded graphs of a bundle and a run of them.

Knows tensors and sub-models; knows no tokens' meaning, no sampling, no MQTT and no policy.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nestd.bundle.manifest import Bundle, Submodel
from nestd.daemon.engine.encoders import hard_embeddings, soft_tokens
from nestd.daemon.engine.kv_cache import KVCache
from nestd.daemon.engine.messages import EngineOptions
from nestd.daemon.engine.prepare import GRAPH, prepared_decoder
from nestd.daemon.engine.residency import Residency, advise, mappings
from nestd.daemon.engine.sessions import load_graph, share

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class _Flags:
    """A sub-model as the decoder's inputs."""

    wide_layers: npt.NDArray[np.bool_]
    kept_layers: npt.NDArray[np.bool_]


class Graphs:
    """The text graphs of one bundle, ready to run."""

    def __init__(self, bundle: Bundle, options: EngineOptions) -> None:
        """Load the graphs; with a prepared directory, prepare the weights first if need be.

        Raises:
            BundleError: a graph is missing, ONNX Runtime refuses it, or the disk is too small.
        """
        self.bundle = bundle
        self.model = bundle.manifest.model
        self._embed_tokens = load_graph(bundle.file("embed_tokens.onnx"), threads=1)
        self._per_layer_embeddings = load_graph(bundle.file("per_layer_embeddings.onnx"), threads=1)
        # Rows of the tables are read here and there: reading ahead would cost 8 ms a cold row.
        self._tables = [
            (address, length)
            for table in ("embed_tokens.data", "per_layer_embeddings.data")
            for address, length, _ in mappings(bundle.file(table))
        ]
        for address, length in self._tables:
            advise(address, length, mmap.MADV_RANDOM)
        self._residency: Residency | None = None
        if options.prepared_directory is None:
            self._decoder = load_graph(bundle.file("decoder.onnx"), options.threads)
        else:
            prepared = prepared_decoder(bundle, options.prepared_directory, options.threads)
            self._decoder = load_graph(prepared / GRAPH, options.threads)
            self._residency = Residency(prepared, self.model)
            self._residency.drop_all()
        soft = soft_tokens(bundle)
        self._soft_ids = np.array([item.soft_token for item in soft.values()], np.int64)
        self._hard = {
            item.first_hard_id: hard_embeddings(bundle, modality) for modality, item in soft.items()
        }
        self._flags: dict[str, _Flags] = {}
        self._logit_rows = {need: np.array([need], np.int64) for need in (False, True)}

    def retain(self, submodel: Submodel) -> None:
        """Keep only what `submodel` needs in memory, and start to read what of it is missing.

        A larger sub-model still runs afterwards: its weights are read from storage again. Without
        prepared weights there is nothing to hand back.
        """
        if self._residency is not None:
            self._residency.retain(submodel)
            for address, length in self._tables:
                advise(address, length, mmap.MADV_DONTNEED)

    def new_cache(self, capacity: int) -> KVCache:
        """Return an empty cache for a sequence of up to `capacity` tokens."""
        return KVCache(self.model, capacity)

    def run(
        self,
        ids: npt.NDArray[np.int64],
        cache: KVCache,
        submodel: Submodel,
        need_logits: bool,
        soft_rows: Floats | None = None,
    ) -> Floats | None:
        """Append the tokens `ids` [S] to `cache` on `submodel`.

        Args:
            ids: token ids; soft tokens among them stand for rows of `soft_rows`.
            cache: what came before.
            submodel: which layers run, and how wide.
            need_logits: False skips what only logits need.
            soft_rows: float32 [soft tokens in ids, hidden], from the encoders, in order.

        Returns:
            The last token's logits [vocab], or None unless `need_logits`.

        Raises:
            ValueError: no ids, an id outside the vocabulary, no room in the cache, or more or
                fewer rows than soft tokens.
        """
        if not 0 < len(ids) <= cache.room:
            raise ValueError(f"{len(ids)} tokens do not fit a cache with room for {cache.room}")
        if ids.min() < 0 or ids.max() >= self.model.vocab_size:
            raise ValueError(f"a token id lies outside the vocabulary of {self.model.vocab_size}")
        batch = {"input_ids": ids[np.newaxis]}
        (embeds,) = self._embed_tokens.run(["inputs_embeds"], batch)
        (per_layer,) = self._per_layer_embeddings.run(["per_layer_inputs"], batch)
        self._embed_media(ids, embeds[0], soft_rows)
        return self._decode(embeds, per_layer, cache, submodel, need_logits)

    def soft(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Return which of `ids` [S] are soft tokens: bool [S]."""
        return np.isin(ids, self._soft_ids)

    def _embed_media(
        self, ids: npt.NDArray[np.int64], embeds: Floats, soft_rows: Floats | None
    ) -> None:
        """Put hard embeddings and encoders' rows in the place of tokens' embeddings [S, hidden]."""
        for first, table in self._hard.items():
            inside = (ids >= first) & (ids < first + len(table))
            embeds[inside] = table[ids[inside] - first]
        if soft_rows is not None:
            places = np.flatnonzero(self.soft(ids))
            if len(places) != len(soft_rows):
                raise ValueError(f"{len(soft_rows)} rows for {len(places)} soft tokens")
            embeds[places] = soft_rows

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
            ("window_seqlens_k", np.array([total - 1], np.int32)),
            ("window_total_sequence_length", np.array(total, np.int32)),
            ("wide_layers", flags.wide_layers),
            ("kept_layers", flags.kept_layers),
            ("logit_rows", self._logit_rows[need_logits]),
        ):
            binding.bind_cpu_input(name, value)
        binding.bind_output("logits", "cpu")
        # Past and present are the same memory: the new rows are written where they belong.
        for name, buffer in cache.buffers.items():
            value = share(buffer)
            binding.bind_ortvalue_input(f"past_key_values.{name}", value)
            binding.bind_ortvalue_output(f"present.{name}", value)
        self._decoder.run_with_iobinding(binding)
        cache.length = total
        if not need_logits:
            return None
        # Only the output that was bound first is fetched: copying all would copy the whole cache.
        logits: Floats = binding.get_outputs()[0].numpy()[0, 0]
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
