"""An MLX directory: safetensors whose large matrices are quantised in affine groups.

A quantised matrix is three tensors: `X.weight` uint32 [rows, columns * bits / 32], a little-endian
stream of unsigned values, `X.scales` and `X.biases` [rows, columns / group]; a value stands for
`scale * value + bias`. Source: MLX's documentation of `mlx.core.quantize`, mode "affine", and the
`quantization` entry that mlx-lm writes into config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from nestd.bundle.errors import CheckpointError
from nestd.conversion.checkpoint import ENCODER_MODULES
from nestd.conversion.sources.safetensors import FLOATS, Safetensors
from nestd.conversion.sources.tensors import Floats, TensorInfo

WIDTHS: Final = (2, 3, 4, 5, 6, 8)
GROUP: Final = "group of MLX"


def is_mlx(config: Mapping[str, Any]) -> bool:
    """Say whether a config.json is one that MLX wrote for quantised weights."""
    return isinstance(config.get("quantization"), Mapping)


class Mlx:
    """Reads one directory; matrices come out dequantised.

    The towers are left out: MLX transposes their convolutions.
    """

    dtypes = (*FLOATS, GROUP)

    def __init__(self, directory: Path, config: Mapping[str, Any]) -> None:
        """Check how the weights are quantised.

        Raises:
            CheckpointError: in a way that has no affine groups.
        """
        self._directory = directory
        self._files = Safetensors(directory)
        self._stored = self._files.tensors()
        self._quantization: Mapping[str, Any] = config["quantization"]
        mode = self._quantization.get("mode", "affine")
        if mode != "affine":
            raise CheckpointError(
                f"{directory} is quantised in MLX's mode {mode!r}: nestd reads affine groups, or "
                "take a checkpoint that is not quantised"
            )

    def tensors(self) -> dict[str, TensorInfo]:
        """Return the text decoder's tensors, quantised ones with the shape that they stand for."""
        return {
            name: self._info(name, info)
            for name, info in self._stored.items()
            if not name.removeprefix("model.").startswith(ENCODER_MODULES)
            and not name.endswith((".scales", ".biases"))
        }

    def rows(self, info: TensorInfo, start: int, stop: int) -> Floats:
        """Return rows `start` to `stop` of a tensor."""
        stored = self._stored[info.name]
        rows = self._files.rows(stored, start, stop)
        if info.dtype != GROUP:
            return rows
        scales, biases = (
            self._files.rows(self._stored[name], start, stop).astype(np.float32)
            for name in self._beside(info.name)
        )
        columns = info.shape[1]
        bits = 32 * stored.shape[1] // columns
        stream = np.ascontiguousarray(rows).view(np.uint8).reshape(len(rows), -1)
        lines = np.unpackbits(stream, axis=1, bitorder="little").reshape(len(rows), columns, bits)
        values = np.packbits(lines, axis=2, bitorder="little")[:, :, 0].astype(np.float32)
        groups = values.reshape(len(rows), scales.shape[1], -1)
        result: Floats = groups * scales[:, :, np.newaxis] + biases[:, :, np.newaxis]
        return result.reshape(len(rows), columns)

    def _info(self, name: str, info: TensorInfo) -> TensorInfo:
        """Return the tensor that a quantised one stands for."""
        if info.dtype != "U32":
            return info
        own = self._quantization.get(name.removesuffix(".weight"))
        entry = own if isinstance(own, Mapping) else self._quantization
        bits, group = entry.get("bits"), entry.get("group_size")
        columns = 32 * info.shape[1] // bits if bits in WIDTHS else 0
        for beside in self._beside(name):
            if beside not in self._stored or self._stored[beside].shape != (
                info.shape[0],
                columns // group if group else 0,
            ):
                raise CheckpointError(
                    f"{self._directory}: {beside} is missing or does not fit {name} at {bits} bits "
                    f"in groups of {group}: download the checkpoint again"
                )
        return TensorInfo(info.file, name, (info.shape[0], columns), GROUP, info.nbytes)

    @staticmethod
    def _beside(name: str) -> tuple[str, str]:
        base = name.removesuffix("weight")
        return f"{base}scales", f"{base}biases"
