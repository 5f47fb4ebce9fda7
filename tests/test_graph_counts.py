"""What a token costs in operators and bytes, counted in the graphs: no clock, so no luck."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
from support.onnx_graphs import branches, graphs
from support.tiny import write_checkpoint

from nestd.bundle.manifest import Bundle, Submodel
from nestd.conversion.convert import ConvertOptions, convert
from nestd.conversion.weights import ALIGNMENT
from nestd.daemon.engine.sessions import save_prepared

LAYERS, SHARED = 35, 15


def make(root: Path, layers: int, shared: int, **changes: Any) -> Bundle:
    checkpoint = write_checkpoint(root / "checkpoint", num_layers=layers, shared=shared, **changes)
    return convert(str(checkpoint), root / "bundle", ConvertOptions(), io.StringIO())


@pytest.fixture(scope="module")
def e4b(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """E4B's layers, of tiny widths, with the sixteen published sub-models."""
    return make(tmp_path_factory.mktemp("e4b"), LAYERS, SHARED)


def load(bundle: Bundle, name: str = "decoder") -> onnx.GraphProto:
    return onnx.load(bundle.file(f"{name}.onnx"), load_external_data=False).graph


def tail_layer(bundle: Bundle, layer: int, name: str = "decoder") -> dict[str, onnx.GraphProto]:
    """The branches of the If around a layer without a cache of its own."""
    (node,) = (
        node
        for graph in graphs(load(bundle, name))
        for node in graph.node
        if node.op_type == "If" and branches(node)["then_branch"].name == f"layers.{layer}"
    )
    return branches(node)


@pytest.mark.parametrize(("sparsity", "most"), [(0.0, 54), (0.95, 58)])
def test_operators_of_a_layer_with_a_cache(tmp_path: Path, sparsity: float, most: int) -> None:
    counts = []
    for layers in (10, 15):
        pattern = [sparsity] * layers
        bundle = make(tmp_path / str(layers), layers, 5, activation_sparsity_pattern=pattern)
        counts.append(len(load(bundle).node))
    assert (counts[1] - counts[0]) / 5 <= most


def test_operators_of_a_layer_without_a_cache(e4b: Bundle) -> None:
    assert len(tail_layer(e4b, 20)["then_branch"].node) <= 51


def test_operators_of_a_wide_half(e4b: Bundle) -> None:
    sizes = {graph.name: len(graph.node) for graph in graphs(load(e4b)) if "layers." in graph.name}
    assert sizes["layers.0.wide"] <= 19
    assert sizes["layers.0.narrow"] <= 9
    assert sizes["layers.10.wide"] <= 5
    assert sizes["layers.10.narrow"] == 1


def test_operators_outside_of_the_layers(e4b: Bundle) -> None:
    (node,) = (node for node in load(e4b).node if "logits" in node.output)
    tail = [item for item in branches(node)["then_branch"].node if item.op_type != "If"]
    assert len(tail) <= 45
    assert len(branches(node)["else_branch"].node) <= 2


def test_a_skipped_layer_runs_one_operator(e4b: Bundle) -> None:
    (node,) = tail_layer(e4b, 20)["else_branch"].node
    assert node.op_type == "Identity"


def test_a_skipped_layer_on_an_int8_cache_passes_its_source_on(e4b: Bundle) -> None:
    kinds = [node.op_type for node in tail_layer(e4b, 20, "decoder_int8_cache")["else_branch"].node]
    assert kinds == ["Identity"] * 3


def touched(graph: onnx.GraphProto, item: Submodel) -> Iterator[onnx.TensorProto]:
    """Weights of the graph, as far as a token on the sub-model `item` meets them."""
    yield from graph.initializer
    for node in graph.node:
        for branch in branches(node).values():
            _, _, layer = branch.name.partition(".")
            number = int(layer.split(".")[0]) if layer else None
            if layer.endswith("wide") and number not in item.wide_layers:
                continue
            if number not in item.skipped_layers:
                yield from touched(branch, item)


def test_bytes_that_a_token_touches_are_those_of_the_manifest(e4b: Bundle) -> None:
    graph = load(e4b)
    assert len(e4b.manifest.submodels) == 16
    for item in e4b.manifest.submodels:
        total = count = 0
        for tensor in touched(graph, item):
            place = {entry.key: entry.value for entry in tensor.external_data}
            if place:
                count += 1
                total += int(place["length"])
        # The file's own figure has up to a page of alignment for each tensor.
        assert total <= item.decoder_bytes < total + count * ALIGNMENT


def test_published_slices_touch_weights_and_scales_and_little_more(tmp_path: Path) -> None:
    """A byte a weight and a float32 scale a block, at widths that alignment does not hide."""
    bundle = make(tmp_path, LAYERS, SHARED, hidden_size=256, intermediate_size=[1024] * LAYERS)
    model, quantization = bundle.manifest.model, bundle.manifest.quantization
    for item in bundle.manifest.submodels:
        weights = item.effective_params + model.vocab_size * model.hidden_size
        assert item.decoder_bytes < 1.07 * weights * (1 + 4 / quantization.block_size)


def test_nothing_is_cast_or_transposed(e4b: Bundle, tmp_path: Path) -> None:
    """Neither as written nor as ONNX Runtime rewrites it at load."""
    save_prepared(e4b.file("decoder.onnx"), tmp_path / "d.onnx", tmp_path / "d.data", threads=1)
    loaded = onnx.load(tmp_path / "d.onnx", load_external_data=False).graph
    counts = []
    for graph in (load(e4b), loaded):
        kinds = Counter(node.op_type for part in graphs(graph) for node in part.node)
        assert kinds["Cast"] == 1  # lengths become positions, once a step
        for kind in ("Transpose", "Expand", "Where", "DequantizeLinear", "QuantizeLinear", "Pad"):
            assert kinds[kind] == 0, kind
        counts.append(kinds.total())
    assert counts[1] <= counts[0] <= 2430


def test_values_that_a_step_binds(e4b: Bundle) -> None:
    caches = 2 * (LAYERS - SHARED)
    graph, int8 = load(e4b), load(e4b, "decoder_int8_cache")
    assert len(graph.input) == len(int8.input) == 9 + caches
    assert len(graph.output) == 1 + caches
    assert len(int8.output) == 1 + caches + 2 * SHARED
