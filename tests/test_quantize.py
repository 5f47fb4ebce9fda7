"""Blockwise quantisation: how large its error may be, and which blocks it takes."""

from __future__ import annotations

import numpy as np
import pytest

from nestd.conversion.quantize import block_for, dequantize, quantize


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [16, 32, 128])
def test_quantisation_error_stays_within_half_a_step(bits: int, block: int) -> None:
    weights = np.random.default_rng(0).standard_normal((7, 256)).astype(np.float32)
    weights[3, :block] = 0
    packed, scales = quantize(weights, bits, block)
    error = np.abs(dequantize(packed, scales, bits) - weights).reshape(7, -1, block)
    step = np.abs(scales)[..., None]
    # At 4 bits a few of the largest values are clipped, for the sake of all others.
    inside = np.abs(weights).reshape(7, -1, block) <= (1 << (bits - 1)) * step - step
    assert inside.mean() > 0.85
    assert (error <= 0.5 * step + 1e-6)[inside].all()
    assert (error <= 3.5 * step).all()
    assert not dequantize(packed, scales, bits)[3, :block].any()


@pytest.mark.parametrize(
    ("columns", "wanted", "block"), [(256, 128, 128), (96, 128, 32), (48, 32, 16), (24, 32, None)]
)
def test_the_largest_block_that_divides_a_row_is_taken(
    columns: int, wanted: int, block: int | None
) -> None:
    assert block_for(columns, wanted) == block


@pytest.mark.parametrize(("block_size", "most"), [(32, 0.94), (128, 0.91)])
def test_int4_scales_lose_less_than_those_that_keep_the_largest_magnitude(
    block_size: int, most: float
) -> None:
    weights = np.random.default_rng(3).standard_normal((64, 1024)).astype(np.float32)
    packed, scales = quantize(weights, 4, block_size)
    blocks = weights.reshape(64, -1, block_size)
    index = np.abs(blocks).argmax(axis=-1)[..., None]
    whole = np.take_along_axis(blocks, index, axis=-1) / -8
    kept = (np.clip(np.rint(blocks / whole), -8, 7) * whole).reshape(weights.shape)
    errors = [
        float(np.square(item - weights).sum()) for item in (dequantize(packed, scales, 4), kept)
    ]
    assert errors[0] < most * errors[1]


def test_blocks_of_zeros_stay_zeros_at_4_bits() -> None:
    weights = np.zeros((2, 64), np.float32)
    weights[1, 40] = -1e-30
    restored = dequantize(*quantize(weights, 4, 32), 4)
    assert np.isfinite(restored).all()
    assert not restored[0].any()
