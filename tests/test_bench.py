"""`nestd bench` on the tiny bundle: what it measures, what it writes down, what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from nestd.bundle.manifest import Bundle
from nestd.cli.bench_report import Report
from nestd.cli.main import main


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prepared")


@pytest.fixture(scope="module")
def report(tiny_bundle: Bundle, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Both ends of the bundle, with operators."""
    path = tmp_path_factory.mktemp("bench") / "report.json"
    names = [tiny_bundle.manifest.submodels[0].name, tiny_bundle.manifest.submodels[-1].name]
    command = ["bench", str(tiny_bundle.path), "--prepared", str(prepared), "--json", str(path)]
    command += ["--prompt", "8", "200", "--decode", "4", "--runs", "3", "--threads", "1"]
    assert main([*command, "--profile-ops", "--submodel", *names]) == 0
    return Report.model_validate_json(path.read_text())


def test_every_figure_is_positive_and_lies_within_its_spread(report: Report) -> None:
    for item in report.submodels:
        assert [speed.prompt_tokens for speed in item.speeds] == [8, 200]
        spreads = [item.load_seconds, item.first_token_seconds]
        for speed in item.speeds:
            spreads += [speed.prefill, speed.decode]
        for spread in spreads:
            assert 0 < spread.minimum <= spread.median <= spread.maximum
        for memory in (item.steady, item.peak):
            assert min(memory.anonymous, memory.file) > 0
        assert item.steady.rss >= item.steady.anonymous + item.steady.file
        assert item.load_seconds.median < item.first_token_seconds.median
    assert report.machine.memory_bytes > report.submodels[0].peak.rss


def test_what_a_token_reads_is_the_manifests_bytes_times_the_speed(
    report: Report, tiny_bundle: Bundle
) -> None:
    for item in report.submodels:
        stated = tiny_bundle.manifest.submodel(item.name).decoder_bytes
        assert item.bytes_per_token == stated
        for speed in item.speeds:
            read = speed.decode.median * stated
            assert speed.read_bytes_per_second == pytest.approx(read)
            bandwidth = report.machine.read_bytes_per_second
            assert speed.read_share == pytest.approx(read / bandwidth)


def test_bytes_on_disk_are_those_of_the_files(
    report: Report, tiny_bundle: Bundle, prepared: Path
) -> None:
    files = [tiny_bundle.path / name for name in tiny_bundle.manifest.files]
    assert report.bundle_bytes == sum(file.stat().st_size for file in files)
    made = [file for file in prepared.rglob("*") if file.is_file()]
    assert report.preparation.disk_bytes == sum(file.stat().st_size for file in made)
    assert report.preparation.seconds is not None


def test_the_table_of_operators_accounts_for_the_whole_run(report: Report) -> None:
    for item in report.submodels:
        assert item.operators is not None
        assert list(item.operators) == ["prefill", "decode"]
        for phase in item.operators.values():
            assert "MatMulNBits" in {cost.name for cost in phase.operators}
            assert {"feed-forward", "attention, keys and values", "lm_head"} <= {
                cost.name for cost in phase.kinds
            }
            for costs in (phase.operators, phase.kinds):
                assert sum(cost.share for cost in costs) == pytest.approx(1)
                spent = sum(cost.milliseconds for cost in costs)
                assert spent == pytest.approx(phase.milliseconds)


def test_a_larger_submodel_multiplies_more_often(report: Report) -> None:
    def calls(index: int) -> float:
        operators = report.submodels[index].operators
        assert operators is not None
        return next(c.calls for c in operators["decode"].operators if c.name == "MatMulNBits")

    assert calls(0) < calls(1)


@pytest.mark.usefixtures("report")
def test_weights_that_are_prepared_already_are_not_prepared_again(
    tiny_bundle: Bundle, prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["bench", str(tiny_bundle.path), "--prepared", str(prepared), "--threads", "1"]
    assert main([*command, "--prompt", "4", "--decode", "2", "--runs", "1"]) == 0
    shown = capsys.readouterr().out
    assert ", were there" in shown
    assert f"\n{tiny_bundle.manifest.submodels[-1].name}: " in shown


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--submodel", "E9"], "no sub-model 'E9'"),
        (["--prompt", "600"], "more than the 512 tokens of this model"),
        (["--json", "/nonexistent/report.json"], "there is no directory /nonexistent"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_runs(
    arguments: list[str],
    sentence: str,
    tiny_bundle: Bundle,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prepared = tmp_path / "prepared"
    command = ["bench", str(tiny_bundle.path), "--prepared", str(prepared), *arguments]
    assert main(command) == 2
    assert sentence in capsys.readouterr().err
    assert not prepared.exists()


def test_a_graph_that_does_not_load_is_one_sentence(
    tiny_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "bundle"
    broken.mkdir()
    for name in ("manifest.json", *tiny_bundle.manifest.files):
        (broken / name).symlink_to(tiny_bundle.path / name)
    graph = broken / "decoder.onnx"
    size = graph.stat().st_size
    graph.unlink()
    graph.write_bytes(b"\0" * size)
    assert main(["bench", str(broken), "--runs", "1", "--threads", "1"]) == 2
    assert capsys.readouterr().err.startswith("nestd: ONNX Runtime cannot load ")


@pytest.mark.parametrize("number", ["0", "-3", "many"])
def test_a_count_is_a_number_above_0(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "anything", "--runs", number])
    assert number in capsys.readouterr().err
