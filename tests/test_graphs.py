"""What the graphs are made of, checked without running a model for its answers."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from nestd.bundle.manifest import Bundle
from nestd.conversion.convert import ConvertOptions, convert

FALLBACK = "weights will be de-quantized to fp32"
# Runs every graph of a bundle once, all layers wide and kept, with ONNX Runtime's INFO log on.
RUN_GRAPHS = """
import sys, numpy as np, onnxruntime as ort
TYPES = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(int32)": np.int32,
         "tensor(bool)": np.bool_, "tensor(int8)": np.int8}
SIZES = {"batch": 1, "sequence": int(sys.argv[2]), "capacity": 16, "window_capacity": 16}
for path in sys.argv[3:]:
    options = ort.SessionOptions()
    options.log_severity_level = 1
    session = ort.InferenceSession(path, options)
    feed = {}
    for item in session.get_inputs():
        shape = [SIZES.get(size, size) for size in item.shape]
        feed[item.name] = np.zeros(shape, TYPES[item.type])
        if item.type == "tensor(bool)":
            feed[item.name][:] = True
        if item.name == "logit_rows":
            feed[item.name][:] = 1
        if item.name.endswith("seqlens_k"):
            feed[item.name][:] = SIZES["sequence"] - 1
        if item.name.endswith("total_sequence_length"):
            feed[item.name] = np.array(SIZES["sequence"], np.int32)
    run = ort.RunOptions()
    run.log_severity_level = 1
    session.run([session.get_outputs()[0].name], feed, run)
"""


def run_log(paths: list[Path], rows: int) -> str:
    command = [sys.executable, "-c", RUN_GRAPHS, "-", str(rows), *map(str, paths)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return result.stderr


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 9])
def test_no_linear_dequantises_its_matrix_at_each_run(
    tiny_checkpoint: Path, tmp_path: Path, bits: int, rows: int
) -> None:
    options = ConvertOptions(bits=bits)  # type: ignore[arg-type]
    bundle = convert(str(tiny_checkpoint), tmp_path / "b", options, io.StringIO())
    paths = [path for path in bundle.path.iterdir() if path.suffix == ".onnx"]
    assert len(paths) == 4
    assert FALLBACK not in run_log(paths, rows)


def test_the_check_for_dequantised_matrices_can_fail(tiny_bundle: Bundle, tmp_path: Path) -> None:
    """Without accuracy_level 4 ONNX Runtime does fall back, and says so."""
    for file in tiny_bundle.path.glob("*.data"):
        shutil.copyfile(file, tmp_path / file.name)
    model = onnx.load(tiny_bundle.path / "decoder.onnx", load_external_data=False)
    node = next(node for node in model.graph.node if node.op_type == "MatMulNBits")
    next(item for item in node.attribute if item.name == "accuracy_level").i = 0
    (tmp_path / "slow.onnx").write_bytes(model.SerializeToString())
    assert FALLBACK in run_log([tmp_path / "slow.onnx"], 1)


def _graphs(graph: onnx.GraphProto) -> list[onnx.GraphProto]:
    found = [graph]
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                found += _graphs(attribute.g)
    return found


def test_each_quantised_weight_belongs_to_the_graph_of_its_node(tiny_bundle: Bundle) -> None:
    """A weight further up would not be prepacked (docs/engine.md)."""
    model = onnx.load(tiny_bundle.path / "decoder.onnx", load_external_data=False)
    linears = 0
    for graph in _graphs(model.graph):
        own = {tensor.name for tensor in graph.initializer}
        for node in graph.node:
            if node.op_type == "MatMulNBits":
                linears += 1
                assert set(node.input[1:]) <= own, node.name
    assert linears > 50


def test_token_embedding_and_lm_head_share_their_bytes(tiny_bundle: Bundle) -> None:
    def places(name: str) -> set[tuple[str, str, str]]:
        model = onnx.load(tiny_bundle.path / name, load_external_data=False)
        return {
            tuple(entry.value for entry in tensor.external_data)
            for graph in _graphs(model.graph)
            for tensor in graph.initializer
            if tensor.data_location == onnx.TensorProto.EXTERNAL
        }

    shared = places("embed_tokens.onnx") & places("decoder.onnx")
    assert len(shared) == 2  # values and scales
    assert {location for location, _, _ in shared} == {"embed_tokens.data"}


def test_layers_without_a_cache_of_their_own_project_no_keys(tiny_bundle: Bundle) -> None:
    model = onnx.load(tiny_bundle.path / "decoder.onnx", load_external_data=False)
    first_shared = tiny_bundle.manifest.model.first_kv_shared_layer
    outputs = {output.name for output in model.graph.output}
    assert f"present.{first_shared - 1}.key" in outputs
    assert f"present.{first_shared}.key" not in outputs
    names = {tensor.name for graph in _graphs(model.graph) for tensor in graph.initializer}
    assert any(name.startswith(f"layers.{first_shared - 1}.self_attn.qkv_proj") for name in names)
    assert any(name.startswith(f"layers.{first_shared}.self_attn.q_proj") for name in names)
    assert not any(name.startswith(f"layers.{first_shared}.self_attn.qkv") for name in names)
