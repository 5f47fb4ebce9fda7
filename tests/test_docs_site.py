"""The documentation as a site: generated pages are current, it builds, and its quickstart runs."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest
from support.clients import PATIENCE, Listener, listening, nestd
from support.mosquitto import Mosquitto
from support.shell import shell

from nestd.cli.main import main

ROOT = Path(__file__).parents[1]
PARTS = ("docs", "scripts", "benchmarks/results", "device_profiles")
FILES = ("mkdocs.yml", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")


@pytest.fixture
def generator(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """scripts/reference/write.py as a module; what it imports is forgotten again."""
    folder = ROOT / "scripts" / "reference"
    monkeypatch.syspath_prepend(str(folder))
    spec = importlib.util.spec_from_file_location("write", folder / "write.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for path in folder.glob("*.py"):
        sys.modules.pop(path.stem, None)


def test_generated_pages_are_what_the_models_say(generator: ModuleType) -> None:
    for path, text in generator.generated().items():
        assert path.read_text(encoding="utf-8") == text, f"{path}: write it anew: scripts/docs"


def test_every_setting_has_a_meaning() -> None:
    page = (ROOT / "docs" / "reference" / "settings.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `.*$", page, re.MULTILINE)
    assert len(rows) > 80
    assert [row for row in rows if row.endswith("|  |")] == []


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "images").glob("*.svg")))
def test_a_drawing_has_a_title_and_knows_a_dark_ground(path: Path) -> None:
    root = ElementTree.parse(path).getroot()
    title = root.find("{http://www.w3.org/2000/svg}title")
    assert title is not None
    assert title.text
    assert "prefers-color-scheme:dark" in path.read_text(encoding="utf-8")


def test_what_the_boards_page_shows_is_what_plan_says(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs" / "boards" / "index.md").read_text(encoding="utf-8")
    command, shown = re.findall(r"^\$ nestd (plan .*)\n\.\.\.\n(.*)$", page, re.MULTILINE)[0]
    assert main(command.split()) == 0
    assert shown in capsys.readouterr().out.splitlines()


def test_the_metrics_of_the_alerts_exist() -> None:
    told = (ROOT / "docs" / "observability.md").read_text(encoding="utf-8")
    alerts = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    names = set(re.findall(r"nestd_[a-z_]+", alerts))
    assert len(names) >= 4
    assert {name for name in names if f"`{name}`" not in told} == set()


# The site


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what the site is made of: scripts/docs writes into the tree that it stands in."""
    pytest.importorskip("mkdocs", reason="mkdocs (the extra `docs`) is not installed")
    for name in PARTS:
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignore)
    for path in (*(ROOT / name for name in FILES), *ROOT.glob("examples/*/README.md")):
        target = tmp_path / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    return tmp_path


def build(tree: Path, *options: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = [str(tree / "scripts" / "docs"), *options]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(tree: Path) -> None:
    done = build(tree, "--links")
    assert done.returncode == 0, done.stderr
    listed = done.stdout.splitlines()
    assert "https://huggingface.co/google/gemma-3n-E4B-it" in listed
    pages = list((tree / "build" / "site").rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe)[^>]*\ssrc=\"?(https?:[^\s\">]+)", text)
        loaded += re.findall(r"<link[^>]*rel=\"?stylesheet\"?[^>]*href=\"?(https?:[^\s\">]+)", text)
        assert loaded == [], page
        # Python-Markdown wants a blank line before a list, GitHub does not.
        prose = re.sub(r"<(pre|code).*?</\1>", "", text, flags=re.DOTALL)
        stuck = re.findall(r"<p>[^<]*\n(?:- |\d+\. |\| )", prose)
        assert stuck == [], page
    # What lies outside docs/ is a page, too, and linked as one.
    engine = (tree / "build" / "site" / "bundle.html").read_text(encoding="utf-8")
    assert 'href="benchmarks/results/encoders.html"' in engine


def test_broken_links_are_errors(tree: Path) -> None:
    page, broken = tree / "docs" / "client.md", ("nowhere.md", "mqtt.md#nowhere", "#nowhere")
    links = "\n\n".join(f"[x]({target})" for target in broken)
    page.write_text(f"{page.read_text(encoding='utf-8')}\n{links}\n", encoding="utf-8")
    done = build(tree)
    assert done.returncode != 0
    for target in broken:
        assert f"'{target}'" in done.stderr


# The quickstart


def blocks(language: str) -> list[str]:
    text = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


@pytest.mark.broker
def test_the_commands_of_the_quickstart_run_in_their_order(
    mosquitto: Mosquitto, tmp_path: Path
) -> None:
    clone = tmp_path / "clone"
    clone.mkdir()
    (clone / "examples").symlink_to(ROOT / "examples")
    start = next(block for block in blocks("console") if block.startswith("nestd run"))
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "NESTD_MQTT__PORT": str(mosquitto.port),
        "NESTD_STATE_DIRECTORY": str(tmp_path / "state"),
    }
    convert, *rest = blocks("sh")
    shell(convert, clone, environment)
    with (
        listening(mosquitto, "nestd/v1/kitchen/state") as states,
        (tmp_path / "log").open("wb") as log,
        subprocess.Popen(
            nestd(*start.split()[1:]), cwd=clone, env=environment, stdout=log, stderr=log
        ) as node,
    ):
        try:
            wait_until_ready(states)
            port = rf"\1 -p {mosquitto.port}"
            said = [
                shell(
                    re.sub(r"^(mosquitto_\w+)", port, block, flags=re.MULTILINE), clone, environment
                )
                for block in rest
            ]
        finally:
            node.terminate()
            node.wait(PATIENCE)
    assert said[0] == '{"action":"on","device":"lamp","room":"kitchen"}\n'
    assert said[0] in (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")


def wait_until_ready(states: Listener) -> None:
    states.until(lambda state: state["phase"] == "ready")
