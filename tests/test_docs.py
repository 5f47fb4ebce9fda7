"""What README and docs/ say about the code is so."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import get_args

import pytest

from nestd.bundle.manifest import Manifest
from nestd.bundle.submodels import published_slices
from nestd.cli.main import COMMANDS
from nestd.daemon.engine.messages import Command, Event

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *ROOT.glob("examples/*/*.md")])


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def table(page: str, heading: str) -> list[list[str]]:
    """Return the cells of the first table behind `heading`, without its head."""
    rows = text(page).partition(heading)[2].splitlines()
    first = next(number for number, row in enumerate(rows) if row.startswith("|"))
    cells = []
    for row in rows[first + 2 :]:
        if not row.startswith("|"):
            break
        cells.append([cell.strip() for cell in row.strip("|").split("|")])
    return cells


def quoted(cells: list[list[str]]) -> set[str]:
    """Return the words in backquotes of each row's first cell."""
    return {word for row in cells for word in re.findall(r"`(\w+)`", row[0])}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://", "#")):
            assert (page.parent / target.partition("#")[0]).exists(), target


def test_the_readme_lists_the_published_submodels() -> None:
    stated = [
        (name, int(wide), int(skipped), float(score))
        for name, _, wide, skipped, score in table("README.md", "## Sub-models")
    ]
    published = [
        (item.name, len(item.wide_layers), len(item.skipped_layers), item.mmlu_percent)
        for item in published_slices()
    ]
    assert sorted(stated) == sorted(published)


def test_shown_commands_exist() -> None:
    known = {name.replace("_", "-") for name in COMMANDS}
    for page in PAGES:
        for block in page.read_text(encoding="utf-8").split("```")[1::2]:
            shown = re.findall(r"^(?:\$ )?nestd ([a-z][a-z-]+)", block, re.MULTILINE)
            assert set(shown) <= known, page


def test_the_readmes_tree_has_every_folder() -> None:
    tree = text("README.md").partition("## The tree")[2].partition("```\n")[2].partition("```")[0]
    stated, parent = set(), ""
    for line in tree.splitlines():
        if match := re.match(r"( *)(\w+)/", line):
            parent = parent if match[1] else match[2]
            stated.add(f"{parent}/{match[2]}" if match[1] else match[2])
    assert all((ROOT / folder).is_dir() for folder in stated)
    document = tomllib.loads(text("pyproject.toml"))
    packages = {name.removeprefix("nestd.") for name in document["tool"]["setuptools"]["packages"]}
    assert {name.replace(".", "/") for name in packages} <= stated


def test_the_manifests_fields_are_explained() -> None:
    assert quoted(table("docs/bundle.md", "## manifest.json")) == set(Manifest.model_fields)


def test_the_engines_messages_are_explained() -> None:
    for heading, union in (("One JSON object a line", Command), ("| `stop` |", Event)):
        kinds = {kind.model_fields["kind"].default for kind in get_args(get_args(union)[0])}
        assert quoted(table("docs/engine.md", heading)) == kinds
