"""The model's terms travel with every bundle and are shown once."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pytest

from nestd.bundle.licence import notice
from nestd.bundle.manifest import Bundle
from nestd.cli.main import main
from nestd.cli.notice import show_once
from nestd.conversion.convert import ConvertOptions, convert

TERMS = "ai.google.dev/gemma/terms"
POLICY = "ai.google.dev/gemma/prohibited_use_policy"


def test_a_bundle_of_gemma_carries_the_notice_that_its_terms_ask_for(tiny_bundle: Bundle) -> None:
    text = notice(tiny_bundle)
    assert text is not None
    assert text.startswith(
        "Gemma is provided under and subject to the Gemma Terms of Use found at "
        "ai.google.dev/gemma/terms"
    )
    assert "has modified these files" in text
    assert POLICY in text
    assert "NOTICE" in tiny_bundle.manifest.files  # so a digest or a signature covers it


@pytest.mark.parametrize(
    ("files", "own_notice", "gemmas"),
    [
        ({"LICENSE": "Apache License\n"}, None, False),
        ({"LICENSE": "Gemma Terms of Use\n"}, None, True),
        ({"LICENSE": "Gemma Terms of Use\n", "NOTICE": "Mine.\n"}, "Mine.", False),
        ({"NOTICE": "Mine.\n"}, "Mine.", False),
    ],
)
def test_a_checkpoints_own_licence_is_carried_on(
    tiny_checkpoint: Path,
    tmp_path: Path,
    files: dict[str, str],
    own_notice: str | None,
    gemmas: bool,
) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, checkpoint)
    for name, text in files.items():
        (checkpoint / name).write_text(text)
    bundle = convert(str(checkpoint), tmp_path / "bundle", ConvertOptions(), io.StringIO())
    for name, text in files.items():
        assert bundle.file(name).read_text() == text
    told = str(notice(bundle))
    assert (TERMS in told) == gemmas
    if own_notice is not None:
        assert told == own_notice
    elif not gemmas:
        assert str(bundle.file("LICENSE")) in told


def test_a_notice_is_shown_once_and_again_when_its_words_change(
    tiny_bundle: Bundle, tmp_path: Path
) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(tiny_bundle.path, copy)
    bundle, shown = Bundle.open(copy), list[str]()
    for _ in range(3):
        show_once(bundle, tmp_path / "state", shown.append)
    assert len(shown) == 1
    assert TERMS in shown[0]
    (copy / "NOTICE").write_text("Other terms.\n")
    show_once(bundle, tmp_path / "state", shown.append)
    assert shown[1:] == ["Other terms."]


def test_a_state_directory_that_cannot_be_written_is_told(
    tiny_bundle: Bundle, tmp_path: Path
) -> None:
    (tmp_path / "state").write_text("a file in the way")
    shown = list[str]()
    show_once(tiny_bundle, tmp_path / "state", shown.append)
    assert len(shown) == 2
    assert "cannot remember" in shown[1]


def test_convert_shows_the_notice_the_first_time_and_inspect_every_time(
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path / "state"))
    for name, shown in (("first", True), ("second", False)):
        assert main(["convert", str(tiny_checkpoint), str(tmp_path / name)]) == 0
        assert (POLICY in capsys.readouterr().out) == shown
    for _ in range(2):
        assert main(["inspect", str(tmp_path / "first")]) == 0
        assert POLICY in capsys.readouterr().out
