"""Blockwise symmetric quantisation of matrices, in NumPy.

The layout is that of ONNX Runtime's MatMulNBits and GatherBlockQuantized without zero points: a row
of K weights is cut into blocks of `block_size`, each with one float32 scale; values are unsigned
with an implied zero of 2^(bits-1); two 4-bit values share a byte, the lower half first.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

MINIMUM_BLOCK = 16
# Scales of 4-bit blocks that are tried, as parts of the one that keeps the largest magnitude, and
# how many values are worked on at once: what fits a core's cache is several times as fast.
INT4_TRIALS = (0.8, 0.9, 1.0)
PIECE = 1 << 16


def block_for(columns: int, block_size: int) -> int | None:
    """Return the largest block up to `block_size` that divides `columns`, None if none does.

    Blocks are powers of two of at least 16 (ONNX Runtime's rule).
    """
    block = block_size
    while block >= MINIMUM_BLOCK and columns % block:
        block //= 2
    return block if block >= MINIMUM_BLOCK else None


def quantize(
    weights: npt.NDArray[np.float32], bits: int, block_size: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """Quantise a matrix [rows, columns] to (packed, scales).

    Returns:
        packed: uint8 [rows, columns * bits / 8].
        scales: float32 [rows, columns / block_size].
    """
    rows, columns = weights.shape
    blocks = weights.reshape(rows, columns // block_size, block_size)
    if bits == 8:
        scales = np.abs(blocks).max(axis=-1) / np.float32(127)
    else:
        flat = blocks.reshape(-1, block_size)
        step = max(1, PIECE // block_size)
        pieces = [_int4_scales(flat[at : at + step]) for at in range(0, len(flat), step)]
        scales = np.concatenate(pieces).reshape(blocks.shape[:-1])
    zero = 1 << (bits - 1)
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)
    values = np.multiply(blocks, inverse[..., None])
    np.rint(values, out=values)
    values += zero
    np.clip(values, 0, 2 * zero - 1, out=values)
    packed = values.astype(np.uint8).reshape(rows, columns)
    if bits == 4:
        packed = packed[:, ::2] | (packed[:, 1::2] << 4)
    return packed, scales.astype(np.float32)


def _int4_scales(blocks: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return the scale [n] of each block [n, block_size] with the least squared error of a few.

    The value of the largest magnitude maps to -8, so that all sixteen levels are used; its sign
    moves into the scale (llama.cpp's Q4_0 does the same). Somewhat smaller scales clip it and serve
    the others better. For the levels v that a trial gives to the values x, the best scale is
    x.v / v.v, and the squared error x.x - (x.v)^2 / v.v.
    """
    index = np.abs(blocks).argmax(axis=-1)
    whole = np.take_along_axis(blocks, index[:, None], axis=-1) / np.float32(-8)
    relative = np.divide(blocks, whole, out=np.zeros_like(blocks), where=whole != 0)
    scales = np.zeros(len(blocks), np.float32)
    most = np.zeros(len(blocks), np.float32)
    for part in INT4_TRIALS:
        levels = relative * np.float32(1 / part)
        np.rint(levels, out=levels)
        np.clip(levels, -8, 7, out=levels)
        product = np.einsum("ij,ij->i", blocks, levels)
        square = np.einsum("ij,ij->i", levels, levels)
        fitted = np.divide(product, square, out=np.zeros_like(product), where=square != 0)
        better = fitted * product > most
        most[better] = (fitted * product)[better]
        scales[better] = fitted[better]
    return scales


def dequantize(
    packed: npt.NDArray[np.uint8], scales: npt.NDArray[np.float32], bits: int
) -> npt.NDArray[np.float32]:
    """Undo `quantize`, with its rounding error left in: float32 [rows, columns]."""
    if bits == 4:
        packed = np.stack([packed & 15, packed >> 4], axis=-1).reshape(packed.shape[0], -1)
    rows, columns = packed.shape
    values = packed.astype(np.float32) - (1 << (bits - 1))
    blocks = values.reshape(rows, scales.shape[1], columns // scales.shape[1])
    return (blocks * scales[..., None]).reshape(rows, columns)
