"""The arm64 package as scripts/build-deb makes it, on any machine, of what is committed.

scripts/test-appliance installs the one for its own machine; here is what can be seen from outside.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SITE = "usr/lib/nestd/lib/python3.11/site-packages"
# e_machine of an ELF file's header.
AARCH64 = 183


def output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("dpkg-deb") is None:
        pytest.skip("dpkg-deb is not installed")
    if sys.version_info[:2] != (3, 11):
        pytest.skip("the package is for Python 3.11")
    if subprocess.run(["git", "rev-parse"], cwd=ROOT, capture_output=True).returncode:
        pytest.skip("not a git checkout")
    directory = tmp_path_factory.mktemp("deb")
    output("scripts/build-deb", "arm64", str(directory))
    (file,) = directory.iterdir()
    return file


@pytest.fixture(scope="module")
def unpacked(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("unpacked")
    output("dpkg-deb", "--extract", str(package), str(directory))
    return directory


def test_the_package_says_what_it_is_and_what_it_needs(package: Path) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    field = dict(
        line.split(": ", 1)
        for line in output("dpkg-deb", "--field", str(package)).splitlines()
        if ": " in line and not line.startswith(" ")
    )
    assert package.name == f"nestd_{version}_arm64.deb"
    assert (field["Version"], field["Architecture"]) == (version, "arm64")
    assert {"python3.11", "systemd (>= 252)"} <= set(field["Depends"].split(", "))
    assert int(field["Installed-Size"]) < 300_000


def test_every_compiled_file_is_for_the_architecture(unpacked: Path) -> None:
    headers = {path: path.read_bytes()[:20] for path in (unpacked / SITE).rglob("*.so*")}
    elf = {path: header for path, header in headers.items() if header[:4] == b"\x7fELF"}
    assert len(elf) > 20
    wrong = [p for p, h in elf.items() if int.from_bytes(h[18:20], "little") != AARCH64]
    assert wrong == []


def test_everything_is_below_usr_and_the_interpreter_is_debians(unpacked: Path) -> None:
    assert [path.name for path in unpacked.iterdir()] == ["usr"]
    python = unpacked / "usr/lib/nestd/bin/python3"
    assert python.parent / python.readlink() == python.parent / "../../../bin/python3.11"
    command = unpacked / "usr/bin/nestd"
    assert command.resolve() == (unpacked / "usr/lib/nestd/bin/nestd").resolve()
    assert command.read_text().startswith("#!/usr/lib/nestd/bin/python3\n")


def test_unit_user_and_directories_are_those_of_the_tree(unpacked: Path) -> None:
    for name, place in (
        ("nestd.service", "systemd/system/nestd.service"),
        ("nestd.sysusers", "sysusers.d/nestd.conf"),
        ("nestd.tmpfiles", "tmpfiles.d/nestd.conf"),
    ):
        packed = (unpacked / "usr/lib" / place).read_bytes()
        assert packed == output("git", "show", f"HEAD:systemd/{name}").encode()


def test_no_start_has_to_compile_python(unpacked: Path) -> None:
    """The service may not write into /usr: bytecode that is missing is made at every start."""
    missing = [
        source
        for source in (unpacked / SITE / "nestd").rglob("*.py")
        if not (source.parent / "__pycache__" / f"{source.stem}.cpython-311.pyc").exists()
    ]
    assert missing == []


def test_lintian_finds_nothing_that_is_not_explained(package: Path) -> None:
    if shutil.which("lintian") is None:
        pytest.skip("lintian is not installed")
    done = subprocess.run(
        ["lintian", "--allow-root", "--fail-on", "error,warning", str(package)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
