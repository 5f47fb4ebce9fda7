"""The arrows between packages, who may import what, and a conversion without torch."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# cli -> client -> daemon -> bundle <- conversion
ARROWS = {
    "bundle": {"bundle"},
    "device_profiles": {"device_profiles", "bundle"},
    "systemd": {"systemd"},
    "conversion": {"conversion", "bundle"},
    "daemon": {"daemon", "bundle", "device_profiles"},
    "client": {"client", "daemon", "bundle"},
    "dashboard": {"dashboard", "bundle"},
    "cli": {
        "cli",
        "client",
        "daemon",
        "conversion",
        "bundle",
        "dashboard",
        "device_profiles",
        "systemd",
    },
}
# Each has one owner, a file in this folder.
OWNERS = {"httpx2": "daemon/remote", "onnxruntime": "daemon/engine", "paho": "daemon/mqtt"}
# Imported inside functions that say what to install where they are missing; and what pydantic pins.
OPTIONAL = {"gguf", "av", "httpx2", "huggingface-hub", "kagglehub", "pydantic-core"}
# The encoders' conversion, which convert.py imports where a checkpoint has encoders.
CONVERT = {"torch", "transformers", "timm", "optimum", "optimum-onnx"}
HEAVY = ("torch", "torchvision", "transformers", "optimum", "timm", "huggingface_hub")
FILES = sorted(file for package in ARROWS for file in (ROOT / package).rglob("*.py"))


def imports(file: Path) -> Iterator[str]:
    """Yield the dotted name of everything that `file` imports, wherever in the file."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def ours(file: Path) -> set[str]:
    """Return the names below `nestd.` that `file` imports."""
    return {name.removeprefix("nestd.") for name in imports(file) if name.startswith("nestd.")}


def relative(file: Path) -> str:
    return str(file.relative_to(ROOT))


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_a_package_imports_only_along_the_arrows(file: Path) -> None:
    package = file.relative_to(ROOT).parts[0]
    assert {name.partition(".")[0] for name in ours(file)} <= ARROWS[package]


@pytest.mark.parametrize("library", OWNERS)
def test_a_library_behind_a_seam_is_imported_by_one_file_only(library: str) -> None:
    users = [
        relative(file)
        for file in FILES
        if any(name.partition(".")[0] == library for name in imports(file))
    ]
    assert len(users) == 1, users
    assert users[0].startswith(OWNERS[library])


def test_the_engine_knows_no_mqtt_and_no_policy() -> None:
    for file in (ROOT / "daemon" / "engine").glob("*.py"):
        outside = {name for name in ours(file) if name.startswith("daemon.")}
        for name in outside:
            assert name.startswith(("daemon.engine.", "daemon.prompt.", "daemon.logs.")), (
                f"{relative(file)}: {name}"
            )


def test_every_library_is_a_declared_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = {re.split(r"[<>=\[ ]", item)[0].lower() for item in project["dependencies"]}
    distributions = packages_distributions()
    for file in FILES:
        for module in {name.partition(".")[0] for name in imports(file)} - {"nestd"}:
            if module not in sys.stdlib_module_names:
                found = {name.lower().replace("_", "-") for name in distributions.get(module, [])}
                found = found or {module.replace("_", "-")}
                allowed = named | OPTIONAL | (CONVERT if "encoders" in file.parts else set())
                assert found & allowed, f"{relative(file)} imports {module}"


def run_without(modules: tuple[str, ...], code: str, *arguments: str) -> list[str]:
    """Run `code` where `modules` cannot be imported; return the modules that it loaded."""
    preamble = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {modules!r}:
            raise ImportError(name + " is refused by the test")
sys.meta_path.insert(0, Refuse())
"""
    ending = "\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", preamble + code + ending, *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].split()


def test_conversion_engine_and_daemon_work_where_torch_cannot_be_imported(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    code = """
import io
from pathlib import Path
from nestd.cli.main import build_parser
from nestd.conversion.convert import ConvertOptions, convert
from nestd.daemon.engine.generate import Generation
from nestd.daemon.engine.graphs import Graphs
from nestd.daemon.engine.messages import ChatMessage, EngineOptions, Sampling
from nestd.daemon.engine.media import EncodedPrompt
from nestd.daemon.prompt.template import Prompt
import nestd.daemon.engine.worker
import nestd.daemon.mqtt.transport
import nestd.daemon.service
build_parser()
bundle = convert(sys.argv[1], Path(sys.argv[2]), ConvertOptions(), io.StringIO())
graphs, prompt = Graphs(bundle, EngineOptions(threads=1)), Prompt(bundle)
ids = prompt.encode([ChatMessage(role="user", content="hello")])
answer = Generation(
    graphs,
    prompt.tokenizer,
    EncodedPrompt(ids),
    Sampling(max_tokens=4),
    bundle.manifest.submodels[0],
    graphs.new_cache(64),
    64,
)
while answer.finish_reason is None:
    answer.step()
assert answer.completion_tokens > 0
"""
    loaded = run_without(HEAVY, code, str(tiny_checkpoint), str(tmp_path / "bundle"))
    assert "onnxruntime" in loaded
    assert not set(HEAVY) & set(loaded)


def test_the_daemon_process_carries_no_graphs_and_no_converter() -> None:
    """The engine's libraries belong to the engine process, the converter to the command line."""
    code = "import nestd.daemon.service, nestd.daemon.mqtt.transport, nestd.daemon.engine.process"
    loaded = run_without((*HEAVY, "onnxruntime", "onnx", "nestd.conversion"), code)
    assert not any(name.startswith("nestd.conversion") for name in loaded)
