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
    # At 4 bits the far end of the range has one level less, so its error may be a whole step.
    limit = np.abs(scales)[..., None] * (0.5 if bits == 8 else 1.0)
    assert (error <= limit + 1e-6).all()
    assert not dequantize(packed, scales, bits)[3, :block].any()


@pytest.mark.parametrize(
    ("columns", "wanted", "block"), [(256, 128, 128), (96, 128, 32), (48, 32, 16), (24, 32, None)]
)
def test_the_largest_block_that_divides_a_row_is_taken(
    columns: int, wanted: int, block: int | None
) -> None:
    assert block_for(columns, wanted) == block
