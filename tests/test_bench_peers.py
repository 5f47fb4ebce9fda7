"""benchmarks/peers/run.py on the tiny bundle and checkpoint, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from nestd.bundle.manifest import Bundle

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "peers" / "run.py"
SHORT = ("--prompt", "4", "20", "--decode", "2", "--runs", "2", "--threads", "1")
needs_matplotlib = pytest.mark.skipif(not find_spec("matplotlib"), reason="needs matplotlib")


def run(tmp_path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), str(tmp_path / "work"), *SHORT]
    command += ["--out", str(tmp_path / "results"), *options]
    return subprocess.run(command, capture_output=True, text=True)


def rows(tmp_path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((tmp_path / "results" / "peers.json").read_text())
    return found


@needs_matplotlib
def test_every_size_is_a_row_of_medians_that_says_what_it_was_measured_with(
    tiny_bundle: Bundle, tmp_path: Path
) -> None:
    names = [tiny_bundle.manifest.submodels[0].name, tiny_bundle.manifest.submodels[-1].name]
    given = ("--bundle", f"8={tiny_bundle.path}", "--bits", "8", "--peers", "nestd")
    done = run(tmp_path, *given, "--sizes", *names)
    assert done.returncode == 0, done.stderr
    for row in rows(tmp_path):
        assert row["size"] in names
        assert len(row["runs"]) == len(row["peaks"]) == 2
        assert row["machine"]["threads"] == 1
        assert row["disk_bytes"] > sum(file.bytes for file in tiny_bundle.manifest.files.values())
    text = (tmp_path / "results" / "peers.md").read_text()
    lines = [line for line in text.splitlines() if "| nestd |" in line]
    assert len(lines) == len(names)
    for line in lines:
        assert "1 threads of" in line
        assert "onnxruntime" in line
        assert "commit" in line
    assert (tmp_path / "results" / "peers.svg").read_text().count("decode after") == 1


@needs_matplotlib
def test_rows_of_another_width_stay_when_one_is_measured_again(
    tiny_bundle: Bundle, tmp_path: Path
) -> None:
    largest = tiny_bundle.manifest.submodels[-1].name
    given = ("--bundle", f"8={tiny_bundle.path}", "--bundle", f"4={tiny_bundle.path}")
    for bits in ("8", "4", "8"):
        done = run(tmp_path, *given, "--bits", bits, "--peers", "nestd", "--sizes", largest)
        assert done.returncode == 0, done.stderr
    assert [row["bits"] for row in rows(tmp_path)] == [4, 8]


@needs_matplotlib
@pytest.mark.parity
@pytest.mark.skipif(not find_spec("transformers"), reason="needs transformers")
def test_transformers_runs_the_same_lengths(tiny_checkpoint: Path, tmp_path: Path) -> None:
    given = ("--checkpoint", str(tiny_checkpoint), "--bits", "16", "--peers", "transformers")
    done = run(tmp_path, *given, "--sizes", "E4B")
    assert done.returncode == 0, done.stderr
    (row,) = rows(tmp_path)
    for measured in row["runs"]:
        assert [rate["prompt_tokens"] for rate in measured["rates"]] == [4, 20]
        assert min(rate["decode"] for rate in measured["rates"]) > 0


@pytest.fixture
def artefacts(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    return import_module("artefacts")


def test_keep_less_removes_what_was_made_for_one_width_and_nothing_that_was_given(
    artefacts: ModuleType, tiny_bundle: Bundle, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    made = [work / "int8", work / "int4", work / "checkpoint-E4B"]
    for directory in made:
        directory.mkdir(parents=True)
    (work / "E4B-q8_0.gguf").touch()
    made_here = artefacts.Artefacts(work, None, {8: tiny_bundle.path}, {})
    made_here.drop(8)
    assert [directory.is_dir() for directory in made] == [False, True, True]
    assert not (work / "E4B-q8_0.gguf").exists()
    made_here.drop_checkpoints()
    assert [directory.is_dir() for directory in made] == [False, True, False]
    assert Bundle.open(made_here.bundle(8)).manifest == tiny_bundle.manifest


def test_the_disk_is_looked_at_before_anything_is_written(
    artefacts: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(artefacts.CHECKPOINT_GB, "E4B", 10**6)
    with pytest.raises(SystemExit, match="1000000 GB while it is made"):
        artefacts.Artefacts(tmp_path / "work", None, {}, {}).bundle(8)
    assert not any((tmp_path / "work").iterdir())


def test_llama_cpp_without_its_interpreter_is_refused(tmp_path: Path) -> None:
    gguf = tmp_path / "model.gguf"
    gguf.touch()
    done = run(tmp_path, "--gguf", f"E4B-4={gguf}", "--sizes", "E4B", "--peers", "llama.cpp")
    assert done.returncode == 1
    assert "llama.cpp needs --llama-python" in done.stderr
