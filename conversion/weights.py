"""Where weights come from and where they go: matrices read in chunks, and a file to stream to."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt
from onnx import StringStringEntryProto, TensorProto

from nestd.conversion.checkpoint import Checkpoint, Float32
from nestd.conversion.quantize import quantize

# Page-aligned, so that the daemon can hand the pages of one matrix back to the kernel.
ALIGNMENT = 4096
DATA_TYPES = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.uint8): TensorProto.UINT8,
    np.dtype(np.int8): TensorProto.INT8,
}


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix [rows, columns] (output features first) that is read in row chunks of float32."""

    rows: int
    columns: int
    chunks: Callable[[], Iterator[Float32]]


def matrix(
    checkpoint: Checkpoint,
    name: str,
    shape: tuple[int, ...],
    rows: tuple[int, int] | None = None,
    columns: tuple[int, int] | None = None,
) -> Matrix:
    """Return the tensor `name` of `shape`, or the part of it within `rows` and `columns`.

    A tensor of higher rank is a matrix of flat rows.
    """
    checkpoint.expect(name, shape)
    first, last = rows or (0, shape[0])
    left, right = columns or (0, math.prod(shape[1:]))

    def chunks() -> Iterator[Float32]:
        for chunk in checkpoint.rows(name, shape, first, last):
            yield chunk[:, left:right]

    return Matrix(last - first, right - left, chunks)


def stack(*parts: Matrix) -> Matrix:
    """Return the matrices one below the other: linears that share their input become one."""

    def chunks() -> Iterator[Float32]:
        for part in parts:
            yield from part.chunks()

    return Matrix(sum(part.rows for part in parts), parts[0].columns, chunks)


class WeightFile:
    """A file of external tensor data, written front to back.

    Attributes:
        path: the file; graphs name it relative to their own directory.
        size: bytes so far.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)

    def __enter__(self) -> WeightFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            os.ftruncate(self._descriptor, self.size)
            os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)

    def array(self, name: str, value: npt.NDArray[np.generic]) -> TensorProto:
        """Write a whole array; return the initializer that refers to it."""
        offset = self._reserve(value.nbytes)
        self._write(np.ascontiguousarray(value), offset)
        return self._tensor(name, value.shape, value.dtype, offset, value.nbytes)

    def floats(self, name: str, source: Matrix) -> TensorProto:
        """Stream a matrix as float32 [rows, columns]."""
        nbytes = 4 * source.rows * source.columns
        offset = start = self._reserve(nbytes)
        for chunk in source.chunks():
            offset = self._write(np.ascontiguousarray(chunk), offset)
        shape = (source.rows, source.columns)
        return self._tensor(name, shape, np.dtype(np.float32), start, nbytes)

    def quantized(
        self, name: str, source: Matrix, bits: int, block_size: int
    ) -> tuple[TensorProto, TensorProto]:
        """Stream a matrix quantised; return the initializers (packed, scales).

        Shapes: uint8 [rows, columns * bits / 8] and float32 [rows, columns / block_size].
        """
        packed_shape = (source.rows, source.columns * bits // 8)
        scales_shape = (source.rows, source.columns // block_size)
        packed_bytes = packed_shape[0] * packed_shape[1]
        scales_bytes = 4 * scales_shape[0] * scales_shape[1]
        packed_start = packed_offset = self._reserve(packed_bytes)
        scales_start = scales_offset = self._reserve(scales_bytes)
        for chunk in source.chunks():
            packed, scales = quantize(chunk, bits, block_size)
            packed_offset = self._write(packed, packed_offset)
            scales_offset = self._write(scales, scales_offset)
        return (
            self._tensor(name, packed_shape, np.dtype(np.uint8), packed_start, packed_bytes),
            self._tensor(
                f"{name}.scales", scales_shape, np.dtype(np.float32), scales_start, scales_bytes
            ),
        )

    def _reserve(self, nbytes: int) -> int:
        offset = -(-self.size // ALIGNMENT) * ALIGNMENT
        self.size = offset + nbytes
        return offset

    def _write(self, value: npt.NDArray[np.generic], offset: int) -> int:
        view = memoryview(value.reshape(-1).view(np.uint8).data)
        while view:
            written = os.pwrite(self._descriptor, view, offset)
            offset += written
            view = view[written:]
        return offset

    def _tensor(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: np.dtype[np.generic],
        offset: int,
        length: int,
    ) -> TensorProto:
        tensor = TensorProto(name=name, data_type=DATA_TYPES[dtype], dims=shape)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", self.path.name), ("offset", offset), ("length", length)):
            tensor.external_data.append(StringStringEntryProto(key=key, value=str(value)))
        return tensor
