"""Derives a decoder whose 8-bit linears are per-channel, for CPUs without a blockwise int8 kernel.

There ONNX Runtime dequantises a blockwise 8-bit matrix whole at every run. `MatMulInteger` with one
scale a channel has a kernel on every CPU, which multiplies the bytes as they are; activations are
quantised to int8 row by row, so that a token's values depend on no other token of its chunk. The
bundle stays as it is. Matrices of 4 bits keep their form: they have a kernel in float32.

Source of the form: XNNPACK's dynamically quantised linears (qd8, qc8w).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:  # imported where it is needed: once in a bundle's life on a device
    import onnx

GRAPH = "per_channel.onnx"
DATA = "per_channel.data"
# What replaces a MatMulNBits: rows of activations to int8, times int8 [K, N], times both scales.
_LINEAR = """
<domain: "nestd", opset_import: ["": 23]>
PerChannelLinear (x, weight, channel_scales) => (y)
{
    last = Constant <value_ints = [-1]> ()
    steps = Constant <value_float = 127.0> ()
    smallest = Constant <value_float = 1e-30> ()
    magnitudes = Abs (x)
    largest = ReduceMax <keepdims = 1> (magnitudes, last)
    ranges = Max (largest, smallest)
    row_scales = Div (ranges, steps)
    quotients = Div (x, row_scales)
    rounded = Round (quotients)
    values = Cast <to = 3> (rounded)
    sums = MatMulInteger (values, weight)
    products = Cast <to = 1> (sums)
    rows = Mul (products, channel_scales)
    y = Mul (rows, row_scales)
}
"""
_PAGE = 4096
_CHUNK_BYTES = 64 * 2**20


def derive(graph: Path, directory: Path) -> Path:
    """Write the graph at `graph` to `directory`, with its 8-bit linears per channel.

    Needs as much room as the weights of `graph`. Returns the new graph's file.

    Raises:
        OSError: a file cannot be read or written.
    """
    import onnx
    import onnx.inliner

    directory.mkdir()
    model = onnx.load(graph, load_external_data=False)
    with (directory / DATA).open("w+b") as data:
        _rewrite(model.graph, _Weights(graph.parent, data))
    function = onnx.parser.parse_function(_LINEAR)
    model.functions.append(function)
    model.opset_import.append(onnx.helper.make_opsetid(function.domain, 1))
    # Inlined here: ONNX Runtime's own inlining uses a name in a graph and in a branch of it.
    model = onnx.inliner.inline_local_functions(model)
    path = directory / GRAPH
    path.write_bytes(model.SerializeToString())
    return path


class _Weights:
    """The external data of the old graph, and the one file of the new."""

    def __init__(self, directory: Path, data: BinaryIO) -> None:
        self._directory = directory
        self._data = data
        self._size = 0

    def read(self, tensor: onnx.TensorProto) -> npt.NDArray[np.uint8]:
        """Return the mapped bytes of an external `tensor`, flat."""
        place = {entry.key: entry.value for entry in tensor.external_data}
        return np.memmap(
            self._directory / place["location"],
            np.uint8,
            "r",
            int(place["offset"]),
            int(place["length"]),
        )

    def add(
        self, tensor: onnx.TensorProto, shape: tuple[int, ...], dtype: npt.DTypeLike
    ) -> npt.NDArray[Any]:
        """Give `tensor` a place in the new file, and return that place, mapped, to be filled."""
        offset = -(-self._size // _PAGE) * _PAGE
        length = math.prod(shape) * np.dtype(dtype).itemsize
        # Now, for a full disk under a mapping would be a signal and no error.
        os.posix_fallocate(self._data.fileno(), offset, length)
        value = np.memmap(self._data, dtype, "r+", offset, shape)
        self._size = offset + length
        place = {"location": DATA, "offset": offset, "length": length}
        del tensor.external_data[:]
        for key, number in place.items():
            tensor.external_data.add(key=key, value=str(number))
        return value


def _rewrite(graph: onnx.GraphProto, weights: _Weights) -> None:
    """Replace the linears of `graph` and of its branches, and bring all its weights along.

    An initializer stays in the graph, branch included, of the node that reads it.
    """
    from onnx import TensorProto

    initializers = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _rewrite(attribute.g, weights)
        bits = [attribute.i for attribute in node.attribute if attribute.name == "bits"]
        if node.op_type == "MatMulNBits" and bits == [8]:
            packed, scales = (initializers.pop(name) for name in node.input[1:3])
            _to_channels(packed, scales, weights)
            node.op_type, node.domain = "PerChannelLinear", "nestd"
            del node.attribute[:]
    for tensor in initializers.values():
        if tensor.data_location == TensorProto.EXTERNAL:
            old = weights.read(tensor)
            weights.add(tensor, old.shape, np.uint8)[:] = old


def _to_channels(packed: onnx.TensorProto, scales: onnx.TensorProto, weights: _Weights) -> None:
    """Turn blockwise weights [N, blocks, block] and scales into int8 [K, N] and float32 [N]."""
    from onnx import TensorProto

    rows, blocks, block = packed.dims
    old = weights.read(packed).reshape(rows, blocks, block)
    block_scales = weights.read(scales).view(np.float32).reshape(rows, blocks, 1)
    values = weights.add(packed, (blocks * block, rows), np.int8)
    channel_scales = np.empty(rows, np.float32)
    for begin, end in _chunks(rows, 4 * blocks * block):
        floats = (old[begin:end].astype(np.float32) - 128) * block_scales[begin:end]
        floats = floats.reshape(end - begin, blocks * block)
        largest = np.abs(floats).max(axis=1)
        # A channel of zeros keeps them at any scale.
        channel_scales[begin:end] = scale = np.where(largest > 0, largest, 1) / np.float32(127)
        values[:, begin:end] = np.rint(floats / scale[:, np.newaxis]).T
    packed.data_type = TensorProto.INT8
    packed.dims[:] = values.shape
    scales.ClearField("external_data")
    scales.data_location = TensorProto.DEFAULT
    scales.dims[:] = [rows]
    scales.raw_data = channel_scales.tobytes()


def _chunks(rows: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    step = max(1, _CHUNK_BYTES // row_bytes)
    for begin in range(0, rows, step):
        yield begin, min(begin + step, rows)
