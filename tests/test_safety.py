"""Nothing that ships runs data as code: no pickle, no eval, no shell, no unsafe YAML."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGING = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
FOLDERS = sorted({name.split(".")[1] for name in PACKAGING["packages"]})
FILES = sorted(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))
# Modules that turn bytes into objects by running what the bytes say.
DESERIALISERS = {
    "pickle",
    "cPickle",
    "_pickle",
    "marshal",
    "shelve",
    "dill",
    "cloudpickle",
    "joblib",
}
CODE = {"eval", "exec", "compile", "__import__"}
SHELLS = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"}
YAML = {"yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "yaml.unsafe_load_all"}


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def is_true(keyword: ast.keyword) -> bool:
    """A switch that is set, or set to something that only running it would tell."""
    return not (isinstance(keyword.value, ast.Constant) and not keyword.value.value)


def dangers(source: str) -> Iterator[str]:
    """Yield what is dangerous in `source`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = {alias.name.partition(".")[0] for alias in node.names}
            yield from (f"imports {name}" for name in names & DESERIALISERS)
        elif isinstance(node, ast.ImportFrom):
            module = (node.module or "").partition(".")[0]
            if module in DESERIALISERS:
                yield f"imports {module}"
            if module in {"os", "subprocess", "yaml"}:
                whole = {f"{module}.{alias.name}" for alias in node.names}
                yield from (f"imports {name}" for name in whole & (SHELLS | YAML))
        elif isinstance(node, ast.Call):
            name = dotted(node.func)
            if name in CODE | SHELLS | YAML:
                yield f"calls {name}"
            switches = {keyword.arg: keyword for keyword in node.keywords}
            for switch in ("shell", "allow_pickle", "trust_remote_code"):
                if switch in switches and is_true(switches[switch]):
                    yield f"sets {switch}"
            if name == "torch.load" and "weights_only" not in switches:
                yield "calls torch.load without weights_only"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_nothing_that_ships_runs_data_as_code(file: Path) -> None:
    assert list(dangers(file.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "eval('1')",
        "exec('1')",
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "run('ls', shell=wish)",
        "import os\nos.system('ls')",
        "from os import system",
        "import yaml\nyaml.load(text, yaml.Loader)",
        "import numpy\nnumpy.load(file, allow_pickle=True)",
        "import torch\ntorch.load(file)",
    ],
)
def test_each_danger_would_be_seen(source: str) -> None:
    assert list(dangers(source))


def test_what_is_safe_passes() -> None:
    safe = "import re, yaml\nre.compile('a')\nyaml.safe_load(t)\nrun(['ls'], shell=False)\nm.eval()"
    assert list(dangers(safe)) == []
