"""The command line as a whole: help is quick and complete, errors are one sentence."""

import subprocess
import sys

import pytest

from nestd.bundle.errors import ConfigError
from nestd.cli import profiles
from nestd.cli.main import COMMANDS, build_parser, main


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    text = build_parser().format_help()
    for name in COMMANDS:
        assert name.replace("_", "-") in text
        with pytest.raises(SystemExit) as done:
            main([name.replace("_", "-"), "--help"])
        assert done.value.code == 0
        assert len(capsys.readouterr().out.splitlines()) > 3


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from nestd.cli.main import build_parser; build_parser();"
        "print(sorted({'numpy', 'onnx', 'onnxruntime', 'paho'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_error_is_one_sentence_and_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: object) -> int:
        raise ConfigError("the sky is green: paint it blue")

    monkeypatch.setattr(profiles, "run", fail)
    assert main(["profiles"]) == 2
    assert capsys.readouterr().err == "nestd: the sky is green: paint it blue\n"


def test_an_interrupt_leaves_with_the_shells_status(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(profiles, "run", interrupted)
    assert main(["profiles"]) == 130
