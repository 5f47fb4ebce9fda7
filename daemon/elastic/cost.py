"""What the sub-models of a bundle cost in memory, and the ladder of those worth running.

The ladder is the Pareto front of the bundle's sub-models: one that is larger and scores no better
than another is no rung (E4B scores 62.3, the smaller E3.39B 63.0). Where scores are unknown, size
stands for quality and every sub-model is a rung.

Below the smallest rung at full context there are stages with less context, so that a plan shrinks
to a short conversation before it shrinks to nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial

from nestd.bundle.manifest import Manifest, Modality, Submodel
from nestd.daemon.engine.window import Window
from nestd.daemon.settings import Settings

ENCODERS: dict[Modality, str] = {"vision": "vision_encoder", "audio": "audio_encoder"}


@dataclass(frozen=True, slots=True)
class Stage:
    """One step of the way from nothing to everything: a rung and its context."""

    submodel: Submodel
    context_length: int


@dataclass(frozen=True, slots=True)
class ModelCost:
    """The stages of a bundle under given settings, and their memory.

    Attributes:
        submodels: all of the bundle's, the smallest first.
        ladder: those worth running, the smallest first.
        stages: from the least memory to the most; each rung of the ladder has its full context,
            the smallest rung shorter ones too.
        kv_bytes: KV cache of one session of so many tokens.
        encoder_bytes: weights of each encoder in the bundle.
        resident_bytes: weights in private memory whichever sub-model runs; None when mapped.
    """

    submodels: tuple[Submodel, ...]
    ladder: tuple[Submodel, ...]
    stages: tuple[Stage, ...]
    kv_bytes: Callable[[int], int]
    encoder_bytes: dict[Modality, int]
    resident_bytes: int | None
    overhead_bytes: int
    encoder_overhead_bytes: int

    @classmethod
    def of(cls, manifest: Manifest, settings: Settings) -> ModelCost:
        """Return the cost table of a bundle."""
        submodels = tuple(sorted(manifest.submodels, key=lambda item: item.effective_params))
        rungs = pareto_front(submodels)
        model = manifest.model
        memory = settings.elastic.memory
        engine = settings.engine
        full = engine.context_length
        sections = manifest.sections
        return cls(
            submodels=submodels,
            ladder=rungs,
            stages=(
                *(Stage(rungs[0], length) for length in _short(full, memory.min_context_length)),
                *(Stage(rung, full) for rung in rungs),
            ),
            kv_bytes=partial(
                model.kv_cache_bytes,
                window_capacity=Window.of(
                    model.sliding_window, full, engine.prefill_chunk if engine.kv_window else None
                ).capacity,
                kv_bits=engine.kv_bits,
            ),
            encoder_bytes={
                modality: sections.get(graph, 0)
                for modality, graph in ENCODERS.items()
                if modality in manifest.modalities
            },
            resident_bytes=(
                sections.get("decoder", 0) + sections.get("embed_tokens", 0)
                if settings.weights == "resident"
                else None
            ),
            overhead_bytes=memory.overhead_bytes,
            encoder_overhead_bytes=memory.encoder_overhead_bytes,
        )

    def bytes_of(self, stage: Stage, encoders: Collection[Modality] = (), sessions: int = 1) -> int:
        """Return the memory that must be there for `stage` not to touch the disk while it runs."""
        weights = self.resident_bytes
        if weights is None:
            weights = stage.submodel.decoder_bytes
        cache = sessions * self.kv_bytes(stage.context_length)
        media = sum(self.encoder_bytes[item] + self.encoder_overhead_bytes for item in encoders)
        return weights + cache + self.overhead_bytes + media

    def largest_stage(
        self, budget: int, encoders: Collection[Modality] = (), sessions: int = 1
    ) -> int:
        """Return the index of the largest stage within `budget` bytes, or -1."""
        fitting = [
            index
            for index, stage in enumerate(self.stages)
            if self.bytes_of(stage, encoders, sessions) <= budget
        ]
        return max(fitting, default=-1)

    def stage_of_rung(self, rung: int) -> int:
        """Return the index of the stage with that rung of the ladder at full context."""
        return len(self.stages) - len(self.ladder) + rung

    def stage_of_share(self, percent: float) -> int:
        """Return the stage at `percent` of the ladder: 0 is the smallest rung, 100 the largest."""
        return self.stage_of_rung(int(percent / 100 * (len(self.ladder) - 1)))

    def rung_of_share(self, percent: float, at_most: int) -> Submodel:
        """Return the rung at `percent` of the ladder, of at most `at_most` effective parameters."""
        rung = self.stages[self.stage_of_share(percent)].submodel
        if rung.effective_params <= at_most:
            return rung
        return self.stages[self.stage_of_params(at_most)].submodel

    def stage_of_params(self, params: int) -> int:
        """Return the largest stage of at most `params`; the smallest rung where none is."""
        rungs = [i for i, item in enumerate(self.ladder) if item.effective_params <= params]
        return self.stage_of_rung(max(rungs, default=0))


def pareto_front(submodels: Sequence[Submodel]) -> tuple[Submodel, ...]:
    """Return those of which none is both smaller (or equal) and better (or equal), ascending."""
    if any(item.mmlu_percent is None for item in submodels):
        return tuple(sorted(submodels, key=lambda item: item.effective_params))
    front: list[Submodel] = []
    for item in sorted(submodels, key=lambda item: (item.effective_params, -_score(item))):
        if not front or _score(item) > _score(front[-1]):
            front.append(item)
    return tuple(front)


def _score(item: Submodel) -> float:
    assert item.mmlu_percent is not None
    return item.mmlu_percent


def _short(full: int, least: int) -> list[int]:
    """Return context lengths below `full`, each half of the next, none below `least`."""
    lengths: list[int] = []
    length = full // 2
    while length >= least:
        lengths.insert(0, length)
        length //= 2
    return lengths
