"""A Hugging Face checkpoint directory, read lazily: config.json and safetensors shards.

Tensors are read as row ranges, so nothing larger than a chunk is ever in memory. Names are
normalised to those of `Gemma3nTextModel` (`layers.0.self_attn.q_proj.weight`), whichever class
wrote the checkpoint; those of the encoders to `Gemma3nModel`'s (`vision_tower.timm_model. ...`).
Needs safetensors, never torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy, which safetensors needs)
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from nestd.bundle.errors import CheckpointError

Float32 = npt.NDArray[np.float32]

# Where the text decoder's weights hang, by the class that saved them:
# Gemma3nForConditionalGeneration (transformers >= 4.54, and its older layout), Gemma3nForCausalLM.
TEXT_PREFIXES = ("model.language_model.", "language_model.model.", "model.")
# Pictures and sound: `model.` in transformers >= 4.54, bare in its older layout.
ENCODER_MODULES = ("vision_tower.", "embed_vision.", "audio_tower.", "embed_audio.")
# Gemma3nForCausalLM.save_pretrained of transformers 4.57 inserts its prefix inside this name too.
MISNAMED = ("per_layer_model.language_model_projection", "per_layer_model_projection")
DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
CHUNK_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies: its shard, its name there, shape and safetensors dtype."""

    shard: str
    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in its shard."""
        return math.prod(self.shape) * DTYPE_BYTES.get(self.dtype, 1)


class Checkpoint:
    """A checkpoint whose shards have been looked through; nothing stays open or mapped.

    A mapped shard would count towards the resident memory as far as it has been read, so each read
    maps the shard anew: at E4B's size that is 0.3 GB at the peak instead of 13.6 GB.

    Attributes:
        path: the directory.
        config: the parsed config.json.
        text: tensors of the text decoder by normalised name.
        encoders: tensors of both towers and their projectors by normalised name.
        on_bytes: called with the number of bytes after each read.
    """

    def __init__(self, path: Path) -> None:
        """Open the checkpoint in directory `path`.

        Raises:
            CheckpointError: no checkpoint there, a shard is missing or cut short.
        """
        self.path = path
        self.config = read_json(path / "config.json")
        self.on_bytes: Callable[[int], None] = lambda _: None
        tensors: dict[str, TensorInfo] = {}
        for shard in _shard_names(path):
            tensors.update(self._look_through(shard))
        self.text = _normalise(tensors)
        self.encoders = {
            bare: info
            for name, info in tensors.items()
            if (bare := name.removeprefix("model.")).startswith(ENCODER_MODULES)
        }

    @contextmanager
    def _open(self, shard: str) -> Iterator[Any]:
        path = self.path / shard
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: download the checkpoint again")
        try:
            with safe_open(path, framework="numpy") as handle:
                yield handle
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} is damaged or cut short ({error}): download the checkpoint again"
            ) from error

    def _look_through(self, shard: str) -> dict[str, TensorInfo]:
        infos = {}
        with self._open(shard) as handle:
            for name in handle.keys():  # noqa: SIM118  (safe_open is no mapping)
                piece = handle.get_slice(name)
                shape, dtype = tuple(piece.get_shape()), str(piece.get_dtype())
                infos[name] = TensorInfo(shard, name, shape, dtype)
        return infos

    def _info(self, name: str) -> TensorInfo:
        info = self.text.get(name) or self.encoders.get(name)
        if info is None:
            raise CheckpointError(
                f"{self.path} lacks the weight {name}: is every shard of the checkpoint there?"
            )
        return info

    def expect(self, name: str, shape: tuple[int, ...]) -> TensorInfo:
        """Return the tensor's info; CheckpointError unless it is a float tensor of `shape`."""
        info = self._info(name)
        if info.shape != shape:
            raise CheckpointError(
                f"{self.path}: {name} has shape {list(info.shape)}, config.json asks for "
                f"{list(shape)}: config and weights belong to different models"
            )
        if info.dtype not in DTYPE_BYTES:
            raise CheckpointError(
                f"{self.path}: {name} has dtype {info.dtype}; convert from an unquantised "
                f"checkpoint ({', '.join(DTYPE_BYTES)})"
            )
        return info

    def tensor(self, name: str, shape: tuple[int, ...]) -> Float32:
        """Return a whole (small) tensor of the given shape as float32."""
        info = self.expect(name, shape)
        with self._open(info.shard) as handle:
            return self._read(handle.get_tensor(info.name), name)

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
            with self._open(info.shard) as handle:
                piece = handle.get_slice(info.name)[first : min(first + step, end)]
            yield self._read(piece.reshape(len(piece), -1), name)

    def _read(self, value: npt.NDArray[Any], name: str) -> Float32:
        self.on_bytes(value.nbytes)
        floats: Float32 = value.astype(np.float32)
        if not np.isfinite(floats).all():
            raise CheckpointError(
                f"{self.path}: {name} holds NaN or infinity: download the checkpoint again"
            )
        return floats


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`; CheckpointError if there is none."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is missing: CHECKPOINT must be a Hugging Face model directory"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return document


def _shard_names(path: Path) -> list[str]:
    index = path / "model.safetensors.index.json"
    if not index.is_file():
        return ["model.safetensors"]
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map: download the checkpoint again")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(f"{index} names a shard outside its directory: {name!r}")
    return names


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
