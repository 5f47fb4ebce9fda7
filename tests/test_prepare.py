"""Prepared weights: the same answers, little private memory, pages that come and go."""

from __future__ import annotations

import io
import itertools
import logging
import mmap
import shutil
from pathlib import Path

import numpy as np
import psutil
import pytest
from support.tiny import write_checkpoint

from nestd.bundle.errors import BundleError
from nestd.bundle.manifest import Bundle, Submodel
from nestd.conversion.convert import ConvertOptions, convert
from nestd.daemon.engine import prepare
from nestd.daemon.engine.graphs import Graphs
from nestd.daemon.engine.messages import EngineOptions
from nestd.daemon.engine.residency import needed_parts
from nestd.daemon.engine.sessions import load_graph


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Wide enough that each half of a feed-forward has many pages."""
    root = tmp_path_factory.mktemp("wide")
    changes = {"hidden_size": 256, "intermediate_size": [1024] * 10}
    checkpoint = write_checkpoint(root / "checkpoint", **changes)
    return convert(str(checkpoint), root / "wide", ConvertOptions(), io.StringIO())


@pytest.fixture(scope="module")
def prepared(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("prepared")
    prepare.prepared_decoder(bundle, directory, 1)
    return directory


def open_graphs(bundle: Bundle, directory: Path | None) -> Graphs:
    return Graphs(bundle, EngineOptions(threads=1, prepared_directory=directory))


def logits(graphs: Graphs, submodel: Submodel) -> np.ndarray:
    result = graphs.run(np.arange(5, 25), graphs.new_cache(32), submodel, need_logits=True)
    assert result is not None
    return result


def resident_bytes(path: Path) -> int:
    """Return how much of the mapped file `path` is in this process's memory."""
    total, counting = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if "-" in first and not first.endswith(":"):
            counting = bool(rest) and rest[-1] == str(path)
        elif counting and first == "Rss:":
            total += int(rest[0]) * 1024
    return total


def test_prepared_weights_give_the_same_logits_at_every_size(
    bundle: Bundle, prepared: Path
) -> None:
    plain, mapped = open_graphs(bundle, None), open_graphs(bundle, prepared)
    for submodel in bundle.manifest.submodels:
        np.testing.assert_array_equal(logits(plain, submodel), logits(mapped, submodel))


def test_retaining_a_small_size_hands_back_the_pages_of_larger_ones(
    bundle: Bundle, prepared: Path
) -> None:
    graphs = open_graphs(bundle, prepared)
    data = next(prepared.glob("wide-*")) / "decoder.data"
    full, nested = bundle.manifest.submodel("full"), bundle.manifest.submodel("nested")
    assert resident_bytes(data) < 0.3 * full.decoder_bytes
    before = logits(graphs, full)
    loaded = resident_bytes(data)
    graphs.retain(nested)
    small = resident_bytes(data)
    logits(graphs, nested)
    # The wide halves go; what is left is
    # what nested needs and the incomplete pages at the ends of regions.
    assert small < 0.8 * loaded
    parts = prepare._parts(data.with_name(prepare.GRAPH), 512)
    needed = needed_parts(bundle.manifest.model, nested)
    kept = sum(length for name in needed for _, length in parts[name])
    edges = 2 * mmap.PAGESIZE * sum(len(regions) for regions in parts.values())
    assert small <= kept + edges
    assert resident_bytes(data) <= kept + edges
    np.testing.assert_array_equal(logits(graphs, full), before)
    assert resident_bytes(data) > small
    graphs.retain(full)
    np.testing.assert_array_equal(logits(graphs, full), before)


def test_every_weight_belongs_to_a_part_and_parts_do_not_overlap(
    bundle: Bundle, prepared: Path
) -> None:
    target = prepare.prepared_decoder(bundle, prepared, 1)
    parts = prepare._parts(target / prepare.GRAPH, bundle.manifest.model.nested_intermediate_size)
    model = bundle.manifest.model
    names = {"common", "originals"}
    names |= needed_parts(model, bundle.manifest.submodel("full"))
    assert set(parts) == names
    regions = sorted(region for regions in parts.values() for region in regions)
    for (first, length), (second, _) in itertools.pairwise(regions):
        assert first + length <= second
    size = (target / prepare.DATA).stat().st_size
    assert sum(length for _, length in regions) > 0.95 * size


def test_a_second_start_uses_what_the_first_prepared(bundle: Bundle, prepared: Path) -> None:
    target = prepare.prepared_decoder(bundle, prepared, 1)
    before = (target / prepare.DATA).stat().st_mtime_ns
    assert prepare.prepared_decoder(bundle, prepared, 1) == target
    assert (target / prepare.DATA).stat().st_mtime_ns == before


def test_another_onnx_runtime_prepares_anew_and_removes_the_old(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare.prepared_decoder(bundle, tmp_path, 1)
    monkeypatch.setattr(prepare, "VERSION", "99.0")
    second = prepare.prepared_decoder(bundle, tmp_path, 1)
    assert second != first
    assert list(tmp_path.iterdir()) == [second]


def test_a_broken_attempt_is_cleared_away(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / ".preparing-old").mkdir()
    (tmp_path / "other-bundle").mkdir()
    target = prepare.prepared_decoder(bundle, tmp_path, 1)
    assert set(tmp_path.iterdir()) == {target, tmp_path / "other-bundle"}


def test_too_small_a_disk_says_how_much_is_needed(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(BundleError, match="weights: resident"):
        prepare.prepared_decoder(bundle, tmp_path, 1)
    assert not list(tmp_path.iterdir())


def test_an_unwritable_directory_is_one_sentence(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match="cannot write prepared weights"):
        prepare.prepared_decoder(bundle, tmp_path / "file" / "below", 1)


def test_preparing_is_announced(
    bundle: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        prepare.prepared_decoder(bundle, tmp_path, 1)
    assert "preparing weights for this CPU" in caplog.text


def private_bytes() -> int:
    memory = psutil.Process().memory_info()
    return int(memory.rss - memory.shared)


def test_the_per_layer_embeddings_stay_on_storage(tmp_path: Path) -> None:
    """A table of 100 MB costs next to no private memory, loaded and read."""
    changes = {"vocab_size_per_layer_input": 300_000, "hidden_size_per_layer_input": 32}
    checkpoint = write_checkpoint(tmp_path / "checkpoint", **changes)
    bundle = convert(str(checkpoint), tmp_path / "b", ConvertOptions(), io.StringIO())
    shutil.rmtree(checkpoint)
    assert bundle.manifest.sections["per_layer_embeddings"] > 96e6
    before = private_bytes()
    table = load_graph(bundle.file("per_layer_embeddings.onnx"), 1)
    ids = np.random.default_rng(0).integers(0, 300_000, (1, 512))
    table.run(None, {"input_ids": ids})
    assert private_bytes() - before < 20e6
