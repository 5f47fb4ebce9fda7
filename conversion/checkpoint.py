"""A checkpoint, read lazily, whatever kind of source its weights come from.

Tensors are read as row ranges, so nothing larger than a chunk is ever in memory. Names are
normalised to those of `Gemma3nTextModel` (`layers.0.self_attn.q_proj.weight`), whichever class
wrote the checkpoint; those of the encoders to `Gemma3nModel`'s (`vision_tower.timm_model. ...`).
Never needs torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nestd.bundle.errors import CheckpointError
from nestd.conversion.sources.tensors import Floats, TensorInfo, TensorReader

Float32 = npt.NDArray[np.float32]

# Where the text decoder's weights hang, by the class that saved them:
# Gemma3nForConditionalGeneration (transformers >= 4.54, and its older layout), Gemma3nForCausalLM.
TEXT_PREFIXES = ("model.language_model.", "language_model.model.", "model.")
# Pictures and sound: `model.` in transformers >= 4.54, bare in its older layout.
ENCODER_MODULES = ("vision_tower.", "embed_vision.", "audio_tower.", "embed_audio.")
# Gemma3nForCausalLM.save_pretrained of transformers 4.57 inserts its prefix inside this name too.
MISNAMED = ("per_layer_model.language_model_projection", "per_layer_model_projection")
CHUNK_BYTES = 64 << 20


class Checkpoint:
    """A checkpoint whose weights have been looked through; nothing stays open or mapped.

    Attributes:
        path: the file or directory that the weights are in.
        assets: the directory with tokenizer, chat template and the other small files.
        config: config.json, or what says the same.
        text: tensors of the text decoder by normalised name.
        encoders: tensors of both towers and their projectors by normalised name.
        remarks: what whoever converts it should know, a sentence each.
        towers_from: what to do where it lacks a tower, an imperative.
        on_bytes: called with the number of bytes after each read.
    """

    def __init__(
        self,
        path: Path,
        config: dict[str, Any],
        reader: TensorReader,
        assets: Path,
        remarks: tuple[str, ...] = (),
        towers_path: Path | None = None,
        towers_from: str = "take a Gemma3nForConditionalGeneration checkpoint",
    ) -> None:
        """Look through the weights; those of the towers may lie in a file `towers_path`.

        Raises:
            CheckpointError: they are not Gemma 3n's, or a file is missing or cut short.
        """
        self.path = path
        self.assets = assets
        self.config = config
        self.remarks = remarks
        self.towers_from = towers_from
        self._towers_path = towers_path or path
        self.on_bytes: Callable[[int], None] = lambda _: None
        self._reader = reader
        tensors = reader.tensors()
        self.text = _normalise(tensors)
        self.encoders = {
            bare: info
            for name, info in tensors.items()
            if (bare := name.removeprefix("model.")).startswith(ENCODER_MODULES)
        }

    def _info(self, name: str) -> TensorInfo:
        info = self.text.get(name) or self.encoders.get(name)
        if info is None:
            raise CheckpointError(
                f"{self._file(name)} lacks the weight {name}: is every shard of the checkpoint "
                "there?"
            )
        return info

    def _file(self, name: str) -> Path:
        return self._towers_path if name.startswith(ENCODER_MODULES) else self.path

    def expect(self, name: str, shape: tuple[int, ...]) -> TensorInfo:
        """Return the tensor's info; CheckpointError unless it is a float tensor of `shape`."""
        info = self._info(name)
        if info.shape != shape:
            raise CheckpointError(
                f"{self._file(name)}: {name} has shape {list(info.shape)}, config.json asks for "
                f"{list(shape)}: config and weights belong to different models"
            )
        if info.dtype not in self._reader.dtypes:
            raise CheckpointError(
                f"{self._file(name)}: {name} has dtype {info.dtype}; convert from a checkpoint in "
                f"one of {', '.join(self._reader.dtypes)}"
            )
        return info

    def tensor(self, name: str, shape: tuple[int, ...]) -> Float32:
        """Return a whole (small) tensor of the given shape as float32."""
        info = self.expect(name, shape)
        return self._floats(info, self._reader.rows(info, 0, shape[0]))

    def rows(
        self, name: str, shape: tuple[int, ...], start: int = 0, stop: int | None = None
    ) -> Iterator[Float32]:
        """Yield rows `start` to `stop` of a tensor of `shape` as float32, at most 64 MB a piece.

        A row is flat, whatever the tensor's rank: the kernel of a 1x1 convolution is a matrix.
        """
        info = self.expect(name, shape)
        step = max(1, CHUNK_BYTES // (4 * math.prod(shape[1:])))
        end = shape[0] if stop is None else stop
        for first in range(start, end, step):
            piece = self._reader.rows(info, first, min(first + step, end))
            yield self._floats(info, piece.reshape(len(piece), -1))

    def _floats(self, info: TensorInfo, value: Floats) -> Float32:
        self.on_bytes(info.nbytes * value.size // info.elements)
        floats: Float32 = value.astype(np.float32)
        if not np.isfinite(floats).all():
            raise CheckpointError(
                f"{self.path}: {info.name} holds NaN or infinity: download the checkpoint again"
            )
        return floats


def _normalise(tensors: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    for prefix in TEXT_PREFIXES:
        if f"{prefix}embed_tokens.weight" in tensors:
            return {
                name.removeprefix(prefix).replace(*MISNAMED): info
                for name, info in tensors.items()
                if name.startswith(prefix)
            }
    raise CheckpointError(
        "the checkpoint has no embed_tokens.weight: it is no Gemma 3n model, or a shard is missing"
    )
