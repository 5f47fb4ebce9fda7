"""The decoder's form for CPUs without a kernel for blockwise int8; its operators run on any CPU."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from support.tiny import write_checkpoint

from nestd.bundle.manifest import Bundle, Submodel
from nestd.conversion.convert import ConvertOptions, convert
from nestd.daemon.engine import prepare
from nestd.daemon.engine.cpu_class import CpuClass, classify
from nestd.daemon.engine.graphs import Graphs
from nestd.daemon.engine.messages import EngineOptions
from nestd.daemon.engine.residency import needed_parts


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Channels of two to eight blocks each."""
    root = tmp_path_factory.mktemp("wide")
    changes = {"hidden_size": 256, "intermediate_size": [1024] * 10}
    return write_checkpoint(root / "checkpoint", **changes)


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Bundle:
    return convert(str(checkpoint), checkpoint.with_name("b8"), ConvertOptions(), io.StringIO())


@pytest.fixture
def old_arm(monkeypatch: pytest.MonkeyPatch) -> CpuClass:
    """Preparation takes this CPU for one without a kernel."""
    cpu = classify("aarch64", ["fp", "asimd"])
    monkeypatch.setattr(prepare, "detect", lambda: cpu)
    return cpu


def graphs_of(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from graphs_of(attribute.g)


def linears(path: Path) -> Counter[str]:
    """Count the linears of a decoder; all must own their weights (docs/engine.md)."""
    found: Counter[str] = Counter()
    for graph in graphs_of(onnx.load(path, load_external_data=False).graph):
        own = {tensor.name for tensor in graph.initializer}
        for node in graph.node:
            if node.op_type in ("MatMulNBits", "MatMulInteger"):
                assert node.input[1] in own, node.name
                bits = [item.i for item in node.attribute if item.name == "bits"]
                found[f"{node.op_type}{bits or ''}"] += 1
    return found


def logits(bundle: Bundle, directory: Path | None, submodel: Submodel) -> np.ndarray:
    graphs = Graphs(bundle, EngineOptions(threads=1, prepared_directory=directory))
    result = graphs.run(np.arange(5, 25), graphs.new_cache(32), submodel, need_logits=True)
    assert result is not None
    return result


def distance(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.linalg.norm(first - second) / np.linalg.norm(second))


@pytest.mark.usefixtures("old_arm")
def test_every_8_bit_linear_becomes_per_channel_in_its_own_graph(
    bundle: Bundle, tmp_path: Path
) -> None:
    blockwise = linears(bundle.file(prepare.GRAPH))
    derived = linears(prepare.prepared_decoder(bundle, tmp_path, 1) / prepare.GRAPH)
    assert derived == {"MatMulInteger": blockwise["MatMulNBits[8]"]}


@pytest.mark.usefixtures("old_arm")
def test_each_part_of_the_model_can_be_handed_back(bundle: Bundle, tmp_path: Path) -> None:
    prepared = prepare.prepared_decoder(bundle, tmp_path, 1)
    parts = json.loads((prepared / prepare.PARTS).read_text())
    full = needed_parts(bundle.manifest.model, bundle.manifest.submodel("full"))
    assert parts.keys() == {"common", "originals"} | full
    length = sum(length for regions in parts.values() for _, length in regions)
    assert length > 0.95 * (prepared / prepare.DATA).stat().st_size


@pytest.mark.usefixtures("old_arm")
def test_4_bit_linears_keep_their_form(checkpoint: Path, tmp_path: Path) -> None:
    options = ConvertOptions(bits=4)
    bundle = convert(str(checkpoint), tmp_path / "b4", options, io.StringIO())
    blockwise = linears(bundle.file(prepare.GRAPH))
    derived = linears(prepare.prepared_decoder(bundle, tmp_path / "p", 1) / prepare.GRAPH)
    assert derived["MatMulNBits[4]"] == blockwise["MatMulNBits[4]"] > 0
    assert derived["MatMulInteger"] == blockwise["MatMulNBits[8]"] > 0


@pytest.mark.usefixtures("old_arm")
def test_answers_are_as_near_to_float32_as_those_of_blocks(
    checkpoint: Path, bundle: Bundle, tmp_path: Path
) -> None:
    options = ConvertOptions(bits=32)
    exact = convert(str(checkpoint), tmp_path / "b32", options, io.StringIO())
    for name in ("nested", "full"):
        wanted = logits(exact, None, exact.manifest.submodel(name))
        submodel = bundle.manifest.submodel(name)
        blockwise = distance(logits(bundle, None, submodel), wanted)
        derived = distance(logits(bundle, tmp_path / "p", submodel), wanted)
        assert 0 < derived < 2 * blockwise


@pytest.mark.usefixtures("old_arm")
def test_a_token_does_not_depend_on_the_others_of_its_chunk(bundle: Bundle, tmp_path: Path) -> None:
    """Rows of activations are quantised each on its own, so a prompt in pieces is the same."""
    graphs = Graphs(bundle, EngineOptions(threads=1, prepared_directory=tmp_path))
    full, ids = bundle.manifest.submodel("full"), np.arange(5, 25)
    whole = graphs.run(ids, graphs.new_cache(32), full, need_logits=True)
    cache = graphs.new_cache(32)
    for piece in (ids[:3], ids[3:16], ids[16:]):
        last = graphs.run(piece, cache, full, need_logits=True)
    np.testing.assert_allclose(last, whole, atol=2e-4)


def test_another_class_prepares_anew(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = []
    for features in (["asimd"], ["asimd", "asimddp"]):
        cpu = classify("aarch64", features)
        monkeypatch.setattr(prepare, "detect", lambda cpu=cpu: cpu)
        names.append(prepare.prepared_decoder(bundle, tmp_path, 1).name)
    assert len(set(names)) == 2
    assert [path.name for path in tmp_path.iterdir()] == names[1:]


def test_the_log_names_the_class(
    bundle: Bundle, tmp_path: Path, old_arm: CpuClass, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        prepare.prepared_decoder(bundle, tmp_path, 1)
    assert str(old_arm) in caplog.text
    assert "one scale a channel" in caplog.text


def test_room_for_the_other_form_is_asked_for(
    bundle: Bundle, request: pytest.FixtureRequest
) -> None:
    usual = prepare.needed_bytes(bundle)
    request.getfixturevalue("old_arm")
    decoder = bundle.manifest.submodels[-1].decoder_bytes
    assert prepare.needed_bytes(bundle) - usual == pytest.approx(decoder, abs=1)
