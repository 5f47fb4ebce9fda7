"""The loaded graphs of a bundle and a run of them.

Knows tensors and sub-models; knows no tokens' meaning, no sampling, no MQTT and no policy.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from nestd.bundle.manifest import Bundle, ModelConfig, Submodel
from nestd.daemon.engine.encoders import hard_embeddings, soft_tokens
from nestd.daemon.engine.kv_cache import KVCache, KVCaches, View
from nestd.daemon.engine.messages import EngineOptions
from nestd.daemon.engine.prepare import GRAPH, decoder_graph, prepared_decoder
from nestd.daemon.engine.residency import Residency, advise, mappings
from nestd.daemon.engine.sessions import Session, load_graph, share
from nestd.daemon.engine.window import Window

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]


class _Bound:
    """The decoder's inputs and outputs that are the same arrays at every run on one view.

    Past and present are the same memory: the new rows are written where they belong.
    """

    def __init__(self, decoder: Session, view: View, model: ModelConfig) -> None:
        batch = len(next(iter(view.buffers.values())))
        self.binding = decoder.io_binding()
        self._lengths = {}
        for kind in ("", "window_"):
            seqlens_k, total = np.zeros(batch, np.int32), np.zeros((), np.int32)
            self.binding.bind_ortvalue_input(f"{kind}seqlens_k", share(seqlens_k))
            self.binding.bind_ortvalue_input(f"{kind}total_sequence_length", share(total))
            self._lengths[kind] = (seqlens_k, total)
        for name, buffer in view.buffers.items():
            self.binding.bind_ortvalue_input(f"past_key_values.{name}", share(buffer))
        # An int8 cache has outputs for the layers that read another's, too.
        for output in decoder.get_outputs():
            name, *place = output.name.split(".")
            if name == "present":
                source = f"{model.kv_source(int(place[0]))}.{place[1]}"
                self.binding.bind_ortvalue_output(output.name, share(view.buffers[source]))

    def set_lengths(self, places: Sequence[int], caches: Sequence[KVCache], rows: int) -> None:
        """Tell how many tokens there are after a run of `rows` more."""
        for kind, held in (
            ("", [cache.length for cache in caches]),
            ("window_", [cache.length - cache.start for cache in caches]),
        ):
            seqlens_k, total = self._lengths[kind]
            seqlens_k[places] = [length + rows - 1 for length in held]
            total[...] = max(held) + rows


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
        self._options = options
        self._residency: Residency | None = None
        if options.prepared_directory is None:
            self._decoder = load_graph(
                bundle.file(f"{decoder_graph(options.kv_bits)}.onnx"),
                options.threads,
                providers=options.execution_providers,
            )
        else:
            prepared = prepared_decoder(
                bundle, options.prepared_directory, options.threads, options.kv_bits
            )
            self._decoder = load_graph(prepared / GRAPH, options.threads)
            self._residency = Residency(prepared, self.model)
            self._residency.drop_all()
        soft = soft_tokens(bundle)
        self._soft_ids = np.array([item.soft_token for item in soft.values()], np.int64)
        self._hard = {
            item.first_hard_id: hard_embeddings(bundle, modality) for modality, item in soft.items()
        }
        self._flags: dict[str, _Flags] = {}
        self._logits = np.empty(0, np.float32)
        # A view ends with the caches that it shows, and what is bound to it with the view.
        self._bindings: WeakKeyDictionary[View, _Bound] = WeakKeyDictionary()

    def retain(self, submodel: Submodel) -> None:
        """Keep only what `submodel` needs in memory, and start to read what of it is missing.

        A larger sub-model still runs afterwards: its weights are read from storage again. Without
        prepared weights there is nothing to hand back.
        """
        if self._residency is not None:
            self._residency.retain(submodel)
            for address, length in self._tables:
                advise(address, length, mmap.MADV_DONTNEED)

    def new_caches(self, slots: int, capacity: int) -> KVCaches:
        """Return empty slots for sequences of up to `capacity` tokens each."""
        options, size = self._options, self.model.sliding_window
        window = Window.of(size, capacity, options.prefill_chunk if options.kv_window else None)
        return KVCaches(self.model, slots, capacity, window, options.kv_bits)

    def new_cache(self, capacity: int) -> KVCache:
        """Return an empty cache for one sequence of up to `capacity` tokens."""
        return self.new_caches(1, capacity).new()

    def run(
        self,
        ids: Ids,
        cache: KVCache,
        submodel: Submodel,
        need_logits: bool,
        soft_rows: Floats | None = None,
    ) -> Floats | None:
        """Append the tokens `ids` [S] of one sequence; return the last one's logits [vocab].

        As `run_batch`, but for the result: a copy, or None unless `need_logits`.
        """
        (logits,) = self.run_batch(
            ids[np.newaxis], [cache], submodel, 1 if need_logits else 0, soft_rows
        )
        return logits[0].copy() if need_logits else None

    def run_batch(
        self,
        ids: Ids,
        caches: Sequence[KVCache],
        submodel: Submodel,
        logit_rows: int = 1,
        soft_rows: Floats | None = None,
    ) -> list[Floats]:
        """Append the tokens `ids` [B, S] to B sequences, on `submodel`.

        Args:
            ids: token ids; soft tokens among them stand for rows of `soft_rows`. Either B or S is
                1.
            caches: what came before of each sequence; all are slots of the same buffers.
            submodel: which layers run, and how wide.
            logit_rows: how many of the last tokens' logits are wanted, at most S; 0 skips what only
                logits need.
            soft_rows: float32 [soft tokens in ids, hidden], from the encoders, in order.

        Returns:
            The logits [logit_rows, vocab] of each sequence. The next run overwrites them.

        Raises:
            ValueError: no ids, an id outside the vocabulary, no room in a cache, more tokens than
                a window takes in one step, or more or fewer rows than soft tokens.
        """
        size = ids.shape[1]
        room = min(cache.room for cache in caches)
        if not 0 < size <= room:
            raise ValueError(f"{size} tokens do not fit a cache with room for {room}")
        if ids.min() < 0 or ids.max() >= self.model.vocab_size:
            raise ValueError(f"a token id lies outside the vocabulary of {self.model.vocab_size}")
        view = caches[0].caches.together(caches)
        places = [cache.slot - view.first for cache in caches]
        in_order = np.empty_like(ids)
        in_order[places] = ids
        batch = {"input_ids": in_order}
        (embeds,) = self._embed_tokens.run(["inputs_embeds"], batch)
        (per_layer,) = self._per_layer_embeddings.run(["per_layer_inputs"], batch)
        self._embed_media(in_order.reshape(-1), embeds.reshape(-1, embeds.shape[-1]), soft_rows)

        bound = self._bound(view)
        for cache in caches:
            cache.make_room(size)
        bound.set_lengths(places, caches, size)
        flags = self._submodel_flags(submodel)
        for name, value in (
            ("inputs_embeds", embeds),
            ("per_layer_inputs", per_layer),
            ("wide_layers", flags.wide_layers),
            ("kept_layers", flags.kept_layers),
            ("logit_rows", np.array([logit_rows], np.int64)),
        ):
            bound.binding.bind_cpu_input(name, value)
        logits = self._logits_buffer(len(caches), logit_rows)
        bound.binding.bind_ortvalue_output("logits", share(logits))
        self._decoder.run_with_iobinding(bound.binding)
        for cache in caches:
            cache.length += size
        return [logits[place] for place in places]

    def soft(self, ids: Ids) -> npt.NDArray[np.bool_]:
        """Return which of `ids` [S] are soft tokens: bool [S]."""
        return np.isin(ids, self._soft_ids)

    def _embed_media(self, ids: Ids, embeds: Floats, soft_rows: Floats | None) -> None:
        """Put hard embeddings and encoders' rows in the place of tokens' embeddings [S, hidden]."""
        for first, table in self._hard.items():
            inside = (ids >= first) & (ids < first + len(table))
            embeds[inside] = table[ids[inside] - first]
        if soft_rows is not None:
            places = np.flatnonzero(self.soft(ids))
            if len(places) != len(soft_rows):
                raise ValueError(f"{len(soft_rows)} rows for {len(places)} soft tokens")
            embeds[places] = soft_rows

    def _bound(self, view: View) -> _Bound:
        bound = self._bindings.get(view)
        if bound is None:
            bound = self._bindings[view] = _Bound(self._decoder, view, self.model)
        return bound

    def _logits_buffer(self, batch: int, rows: int) -> Floats:
        """Return room for logits [batch, rows, vocab]: the same memory every time."""
        size = batch * rows * self.model.vocab_size
        if len(self._logits) < size:
            self._logits = np.empty(size, np.float32)
        return self._logits[:size].reshape(batch, rows, self.model.vocab_size)

    def _submodel_flags(self, submodel: Submodel) -> _Flags:
        flags = self._flags.get(submodel.name)
        if flags is None:
            wide = np.zeros(self.model.num_layers, np.bool_)
            kept = np.ones(self.model.num_layers, np.bool_)
            wide[list(submodel.wide_layers)] = True
            kept[list(submodel.skipped_layers)] = False
            flags = self._flags[submodel.name] = _Flags(wide, kept)
        return flags
