"""The KV cache in int8: scales without calibration, and what they cost."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import onnx
import pytest
from support.decoder import Decoder
from support.tiny import WINDOW, write_checkpoint

from nestd.bundle.manifest import Bundle
from nestd.conversion.convert import ConvertOptions, convert

CONTEXT = 6 * WINDOW


@pytest.fixture(scope="module", params=[16, 64])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    root = tmp_path_factory.mktemp("int8_cache")
    checkpoint = write_checkpoint(root / "checkpoint", head_dim=request.param)
    return convert(str(checkpoint), root / "bundle", ConvertOptions(bits=32), io.StringIO())


@pytest.fixture(scope="module")
def ids() -> Any:
    return np.random.default_rng(6).integers(5, 300, (3, CONTEXT))


def scales(bundle: Bundle) -> dict[str, Any]:
    graph = onnx.load(bundle.file("decoder_int8_cache.onnx"), load_external_data=False).graph
    return {
        ".".join(item.name.split(".")[1:4:2]): onnx.numpy_helper.to_array(item, bundle.path)
        for item in graph.initializer
        if ".cache." in item.name
    }


def test_no_key_and_no_value_is_clipped_whatever_the_text(bundle: Bundle, ids: Any) -> None:
    batch = Decoder(bundle).batch(1, CONTEXT)
    batch.step(ids[:1])
    known = scales(bundle)
    assert known.keys() == batch.buffers.keys()
    for name, buffer in batch.buffers.items():
        largest = np.abs(buffer / known[name]).max()
        assert 20 < largest <= 127.001, name


@pytest.mark.parametrize("chunk", [1, 7, CONTEXT])
def test_logits_stay_near_those_of_a_float32_cache(bundle: Bundle, ids: Any, chunk: int) -> None:
    expected = Decoder(bundle).batch(1, CONTEXT).step(ids[:1], CONTEXT)[0]
    batch = Decoder(bundle, kv_bits=8).batch(1, CONTEXT)
    pieces = [ids[:1, at : at + chunk] for at in range(0, CONTEXT, chunk)]
    logits = np.concatenate([batch.step(piece, piece.shape[1])[0] for piece in pieces])
    errors = np.linalg.norm(logits - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert 0 < np.mean(errors) < 0.1


def test_int8_caches_of_a_window_equal_those_of_full_length_in_a_batch(
    bundle: Bundle, ids: Any
) -> None:
    decoder = Decoder(bundle, kv_bits=8)
    batch = decoder.batch(3, CONTEXT, WINDOW + 5)
    full = decoder.batch(3, CONTEXT)
    lengths = (1, WINDOW, 3 * WINDOW)
    for index, length in enumerate(lengths):
        for target, capacity in ((batch, WINDOW + 5), (full, CONTEXT)):
            alone = decoder.batch(1, CONTEXT, capacity)
            for at in range(0, length, 6):
                alone.step(ids[index : index + 1, at : min(at + 6, length)], 0)
            for name, buffer in alone.buffers.items():
                target.buffers[name][index] = buffer[0]
            target.lengths[index], target.starts[index] = alone.lengths[0], alone.starts[0]
    for _ in range(2 * WINDOW):
        step = ids[np.arange(3), batch.lengths][:, np.newaxis]
        one, other = batch.step(step), full.step(step)
        # Sums of another order may round a key to its other neighbour; a wrong row shows far more.
        assert np.linalg.norm(one - other) < 0.01 * np.linalg.norm(other)


def test_layers_that_read_anothers_cache_leave_it_as_it_is(bundle: Bundle, ids: Any) -> None:
    """Their `present` is bound to the same memory; skipped or not, no row of it may change."""
    decoder = Decoder(bundle, kv_bits=8)
    first = decoder.model.first_kv_shared_layer
    results = []
    for rows, skipped in ((0, ()), (1, ()), (1, (first, first + 2))):
        batch = decoder.batch(1, CONTEXT)
        batch.step(ids[:1], rows, skipped)
        results.append(batch.buffers)
    for name, buffer in results[0].items():
        for other in results[1:]:
            np.testing.assert_array_equal(buffer, other[name])
