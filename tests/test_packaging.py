"""What is installed is what is in the tree: wheel and sdist, built from a copy of it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = (
    "bundle",
    "cli",
    "client",
    "conversion",
    "daemon",
    "dashboard",
    "device_profiles",
    "systemd",
)
# Paths and hosts of one machine; the brackets keep this line from matching itself.
MACHINES = re.compile(r"[/]work/|[/]root/|[p]ypi\.org|[p]ythonhosted")


def build(source: Path, destination: Path, kind: str) -> Path:
    """Build the wheel or the sdist of `source` into `destination`."""
    command = [sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "--outdir"]
    done = subprocess.run([*command, str(destination), str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (result,) = destination.iterdir()
    return result


def contents(wheel: Path) -> dict[str, bytes]:
    """Return the files of a wheel, without the list of their digests."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/RECORD")]
        return {name: archive.read(name) for name in names}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what packaging sees: setuptools leaves its own files in the tree it builds."""
    path = tmp_path_factory.mktemp("tree")
    for package in PACKAGES:
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, path / package, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, path)
    return path


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tree, tmp_path_factory.mktemp("wheel"), "wheel")


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that holds the installed wheel and nothing else."""
    target = tmp_path_factory.mktemp("installed")
    options = ["--quiet", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(wheel)], check=True)
    return target


def test_pyproject_lists_every_package_of_the_tree() -> None:
    document = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    folders = {file.parent for package in PACKAGES for file in (ROOT / package).rglob("*.py")}
    names = {".".join(("nestd", *folder.relative_to(ROOT).parts)) for folder in folders}
    assert set(document["tool"]["setuptools"]["packages"]) == names


def test_the_wheel_holds_every_file_of_the_packages(wheel: Path) -> None:
    files = (file for package in PACKAGES for file in (ROOT / package).rglob("*"))
    wanted = {
        f"nestd/{file.relative_to(ROOT)}"
        for file in files
        if file.is_file() and "__pycache__" not in file.parts
    }
    found = {name for name in contents(wheel) if name.startswith("nestd/")}
    assert found == wanted
    data = {"nestd/bundle/published_slices.yaml", "nestd/bundle/py.typed", "nestd/daemon/py.typed"}
    assert data <= found
    assert "nestd/device_profiles/generic.yaml" in found


def test_the_wheel_installs_nothing_beside_nestd(wheel: Path) -> None:
    tops = {name.partition("/")[0] for name in contents(wheel)}
    assert tops == {"nestd", next(top for top in tops if top.endswith(".dist-info"))}


def test_the_wheel_carries_the_licence_and_the_command(wheel: Path) -> None:
    files = {name.partition("/")[2]: text for name, text in contents(wheel).items()}
    assert files["licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()
    assert b"nestd = nestd.cli.main:main" in files["entry_points.txt"]


def test_the_sdist_builds_the_same_wheel(
    tree: Path, wheel: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    sdist = build(tree, tmp_path_factory.mktemp("sdist"), "sdist")
    unpacked = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        # Debian 12's Python 3.11.2 has no filters yet and ignores this.
        archive.extraction_filter = getattr(tarfile, "data_filter", None)
        archive.extractall(unpacked)
    (source,) = unpacked.iterdir()
    assert contents(build(source, tmp_path_factory.mktemp("again"), "wheel")) == contents(wheel)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--help"], "convert"),
        (["profiles"], "raspberry-pi-5-8gb"),
        (["check-config", "--profile", "generic"], "mqtt.host"),
    ],
)
def test_the_installed_command_runs_from_anywhere(
    installed: Path, tmp_path: Path, arguments: list[str], expected: str
) -> None:
    environment = {**os.environ, "PYTHONPATH": str(installed), "PYTHONWARNINGS": "error"}
    command = [sys.executable, str(installed / "bin" / "nestd"), *arguments]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout


def test_the_installed_command_is_not_the_trees(installed: Path, tmp_path: Path) -> None:
    """Otherwise the tests above would say nothing about the wheel."""
    code = (
        "import nestd.cli.main as main, nestd.device_profiles as data; print(main.__file__, data)"
    )
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.stdout.count(str(installed)) == 2, done.stdout + done.stderr


def test_tracked_files_name_no_machine_and_no_package_index() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.split("\0"):
        file = ROOT / name
        if name and file.is_file() and b"\0" not in (data := file.read_bytes()):
            found = MACHINES.search(data.decode("utf-8", "replace"))
            assert found is None, f"{name} holds {found[0] if found else ''}"
