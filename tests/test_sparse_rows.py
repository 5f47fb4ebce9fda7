"""A single token runs the channels that gaussian top-k leaves above zero, and no others."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from support.onnx_graphs import graphs
from support.tiny import write_checkpoint

from nestd.bundle.errors import CheckpointError
from nestd.bundle.manifest import Bundle, Submodel
from nestd.cli.main import main
from nestd.conversion.convert import ConvertOptions, convert
from nestd.daemon.engine.graphs import Graphs
from nestd.daemon.engine.messages import EngineOptions

LAYERS, SPARSE, HIDDEN, WIDTH = 10, 4, 64, 256
SHAPE: dict[str, Any] = {
    "num_layers": LAYERS,
    "shared": 5,
    "hidden_size": HIDDEN,
    "intermediate_size": [WIDTH] * LAYERS,
    "activation_sparsity_pattern": [0.9] * SPARSE + [0.0] * (LAYERS - SPARSE),
}
IDS = np.random.default_rng(4).integers(5, 300, 40)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("sparse") / "checkpoint", **SHAPE)


@pytest.fixture(scope="module")
def bundles(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Bundle]:
    """With and without tables of rows."""
    return {sparse: make(checkpoint, tmp_path_factory, sparse) for sparse in (False, True)}


@pytest.fixture(scope="module")
def exact(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The same model in float32, which tests/test_parity.py compares with transformers."""
    return make(checkpoint, tmp_path_factory, sparse=False, bits=32)


def make(checkpoint: Path, root: pytest.TempPathFactory, sparse: bool, bits: Any = 8) -> Bundle:
    options = ConvertOptions(bits=bits, sparse_rows=sparse)
    return convert(str(checkpoint), root.mktemp("b") / "bundle", options, io.StringIO())


def logits(bundle: Bundle, submodel: Submodel, ids: Any = IDS) -> Any:
    """Logits of each id, decoded one by one."""
    engine = Graphs(bundle, EngineOptions(threads=1))
    cache = engine.new_cache(64)
    return np.stack([engine.run(ids[at : at + 1], cache, submodel, True) for at in range(len(ids))])


def nearness(values: Any, others: Any) -> float:
    return float((values * others).sum() / np.linalg.norm(values) / np.linalg.norm(others))


@pytest.mark.parametrize("size", ["full", "nested", "half"])
def test_a_decoded_token_has_the_logits_of_the_whole_feed_forward(
    bundles: dict[bool, Bundle], exact: Bundle, size: str
) -> None:
    plain, sparse, expected = (
        logits(bundle, bundle.manifest.submodel(size)) for bundle in (*bundles.values(), exact)
    )
    # One scale a row instead of a block: rounding differs, and costs no more.
    assert not np.array_equal(plain, sparse)
    assert nearness(sparse, expected) > max(0.997, nearness(plain, expected) - 1e-4)


def test_a_chunk_of_a_prompt_runs_the_whole_feed_forward(bundles: dict[bool, Bundle]) -> None:
    values = []
    for bundle in bundles.values():
        engine = Graphs(bundle, EngineOptions(threads=1))
        values.append(engine.run(IDS, engine.new_cache(64), bundle.manifest.submodels[-1], True))
    np.testing.assert_allclose(*values, rtol=0, atol=1e-4)


def test_at_4_bits_the_rows_keep_8(
    checkpoint: Path, exact: Bundle, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """So a decoded token is nearer to float32 than one of a bundle without them."""
    expected = logits(exact, exact.manifest.submodels[-1])
    near = []
    for sparse in (False, True):
        bundle = make(checkpoint, tmp_path_factory, sparse, bits=4)
        near.append(nearness(logits(bundle, bundle.manifest.submodels[-1]), expected))
    assert near[1] > near[0]


def test_a_gate_without_a_channel_above_its_cutoff_adds_nothing(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """All channels of this gate are equal: none is above the mean."""
    from safetensors.numpy import load_file, save_file

    checkpoint = write_checkpoint(tmp_path_factory.mktemp("flat") / "checkpoint", **SHAPE)
    (file,) = checkpoint.glob("*.safetensors")
    weights = load_file(file)
    gates = [name for name in weights if "layers.1.mlp.gate_proj" in name]
    for name in gates:
        weights[name] = np.zeros_like(weights[name])
    assert gates
    save_file(weights, file)
    values = []
    for sparse in (False, True):
        bundle = make(checkpoint, tmp_path_factory, sparse)
        values.append(logits(bundle, bundle.manifest.submodels[-1], IDS[:8]))
    assert nearness(*values) > 0.999


def test_the_manifest_says_what_a_token_reads(bundles: dict[bool, Bundle]) -> None:
    for item in bundles[False].manifest.submodels:
        assert item.token_bytes is None
    graph = onnx.load(bundles[True].file("decoder.onnx"), load_external_data=False).graph
    dense = sum(
        int(entry.value)
        for part in graphs(graph)
        if part.name.endswith(".dense")
        for inner in graphs(part)
        for tensor in inner.initializer
        for entry in tensor.external_data
        if entry.key == "length"
    )
    table = 2 * SPARSE * HIDDEN * WIDTH
    full = bundles[True].manifest.submodel("full")
    assert full.token_bytes is not None
    assert full.decoder_bytes - full.token_bytes == pytest.approx(dense + 0.9 * table, rel=0.02)
    assert full.token_bytes < bundles[False].manifest.submodel("full").decoder_bytes


def test_operators_of_the_channels_that_count(bundles: dict[bool, Bundle]) -> None:
    graph = onnx.load(bundles[True].file("decoder.onnx"), load_external_data=False).graph
    counts = [len(part.node) for part in graphs(graph) if part.name.endswith(".sparse")]
    assert len(counts) == SPARSE
    assert max(counts) <= 42


def test_mapped_tables_belong_to_the_halves_of_their_layers(
    bundles: dict[bool, Bundle], tmp_path: Path
) -> None:
    bundle = bundles[True]
    mapped = Graphs(bundle, EngineOptions(threads=1, prepared_directory=tmp_path))
    (prepared,) = tmp_path.iterdir()
    parts = json.loads((prepared / "parts.json").read_text())
    half = HIDDEN * WIDTH // 2
    for part in ("layers.0", "layers.0.wide"):
        assert [length for _, length in parts[part]].count(half) == 2
    for size in ("nested", "full"):
        submodel = bundle.manifest.submodel(size)
        mapped.retain(submodel)
        values = [
            engine.run(IDS[:1], engine.new_cache(64), submodel, need_logits=True)
            for engine in (mapped, Graphs(bundle, EngineOptions(threads=1)))
        ]
        np.testing.assert_allclose(*values, atol=1e-4, rtol=0)


def test_rows_need_quantised_weights(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ConvertOptions(bits=32, sparse_rows=True)
    with pytest.raises(CheckpointError, match="--sparse-rows is for quantised weights"):
        convert(str(checkpoint), tmp_path / "b", options, io.StringIO())
    assert main(["convert", str(checkpoint), str(tmp_path / "c"), "--sparse-rows"]) == 0
    capsys.readouterr()
    assert Bundle.open(tmp_path / "c").manifest.quantization.sparse_rows
