"""The encoders: pictures and sound -> rows that take the place of token embeddings.

An encoder is loaded when it is first used and costs nothing before: not a byte of it is mapped.
Unloading gives its memory back: activations are never kept between two runs, and the heap is
trimmed afterwards. All calls come from one thread (`media.py`); only `loaded` is read from others.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import time
from collections.abc import Collection
from typing import Any

import numpy as np
import numpy.typing as npt

from nestd.bundle.manifest import Bundle, Modality, SoftTokens
from nestd.daemon.engine.messages import EngineOptions
from nestd.daemon.engine.prepare import prepared_encoder
from nestd.daemon.engine.sessions import Session, load_graph
from nestd.daemon.prompt.audio import AudioWindow

Floats = npt.NDArray[np.float32]

log = logging.getLogger("nestd.engine")
_libc = ctypes.CDLL(None)


class Encoders:
    """The vision and audio encoders of one bundle.

    Attributes:
        loaded: the modalities whose encoders hold memory now.
    """

    def __init__(self, bundle: Bundle, options: EngineOptions) -> None:
        self._bundle = bundle
        self._options = options
        self._sessions: dict[str, Session] = {}
        self.loaded: tuple[Modality, ...] = ()

    def image(self, pixel_values: Floats) -> Floats:
        """Return the rows [count, hidden] of one picture.

        Args:
            pixel_values: float32 [3, size, size] from 0 to 1; size is one of the bundle's.

        Raises:
            BundleError: the encoder cannot be loaded or prepared.
        """
        session = self._session(f"vision_encoder_{pixel_values.shape[-1]}")
        (features,) = session.run(["image_features"], {"pixel_values": pixel_values[np.newaxis]})
        rows: Floats = features[0]
        return rows

    def audio(self, window: AudioWindow) -> Floats:
        """Return the rows [count, hidden] of one window of sound.

        What is padding, and what is missing to `count`, is the row of the last hard id (source:
        Gemma3nModel.forward in transformers 4.57).

        Raises:
            BundleError: the encoder cannot be loaded or prepared.
        """
        config = self._bundle.manifest.audio
        assert config is not None, "a bundle without audio is refused before"
        features, mask = self._session("audio_encoder").run(
            ["audio_features", "audio_features_mask"],
            {
                "input_features": window.input_features[np.newaxis],
                "input_features_mask": window.input_features_mask[np.newaxis],
            },
        )
        rows = np.repeat(hard_embeddings(self._bundle, "audio")[-1:], config.count, axis=0)
        sound = np.flatnonzero(mask[0][: config.count])
        rows[sound] = features[0][sound]
        return rows

    def load(self, modality: Modality) -> None:
        """Load an encoder now; vision at its largest size. BundleError as `image`."""
        vision = self._bundle.manifest.vision
        if modality == "vision" and vision is not None:
            self._session(f"vision_encoder_{max(vision.sizes)}")
        elif modality == "audio" and self._bundle.manifest.audio is not None:
            self._session("audio_encoder")

    def keep(self, modalities: Collection[Modality]) -> None:
        """Unload every encoder that is not of `modalities`."""
        unused = [name for name in self._sessions if name.split("_")[0] not in modalities]
        for name in unused:
            del self._sessions[name]
            log.info("%s unloaded", name)
        if unused:
            gc.collect()
            _libc.malloc_trim(0)
        self._count()

    def _session(self, graph: str) -> Session:
        session = self._sessions.get(graph)
        if session is not None:
            return session
        if graph.startswith("vision"):
            self.keep([item for item in self.loaded if item != "vision"])  # one size at a time
        began = time.monotonic()
        path = self._bundle.file(f"{graph}.onnx")
        options = self._options
        if options.prepared_directory is not None:
            path = prepared_encoder(
                self._bundle, graph, options.prepared_directory, options.threads
            )
        session = self._sessions[graph] = load_graph(
            path, options.threads, arena=False, providers=options.execution_providers
        )
        log.info("%s loaded in %.1f s", graph, time.monotonic() - began)
        self._count()
        return session

    def _count(self) -> None:
        """Say what is loaded; only now, when memory has been taken or given back."""
        modalities: tuple[Modality, ...] = ("vision", "audio")
        found = {name.split("_")[0] for name in self._sessions}
        self.loaded = tuple(item for item in modalities if item in found)


def soft_tokens(bundle: Bundle) -> dict[Modality, SoftTokens]:
    """Return how the media of `bundle` stand in a prompt, by modality."""
    found: dict[Modality, SoftTokens] = {}
    if bundle.manifest.vision is not None:
        found["vision"] = bundle.manifest.vision
    if bundle.manifest.audio is not None:
        found["audio"] = bundle.manifest.audio
    return found


def hard_embeddings(bundle: Bundle, modality: Modality) -> npt.NDArray[Any]:
    """Return the mapped rows [hard_ids, hidden] of the ids from `SoftTokens.first_hard_id` on."""
    table: npt.NDArray[Any] = np.load(
        bundle.file(f"{modality}_hard_embeddings.npy"), mmap_mode="r", allow_pickle=False
    )
    return table
