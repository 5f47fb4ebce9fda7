"""The units as systemd reads them: free of mistakes, and as closed as docs/systemd.md says."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from nestd.systemd import DROP_INS, text

ROOT = Path(__file__).parents[1]
# systemd's own measure, from 0 (closed) to 10.
MOST_EXPOSED = {"jetson-gpu": 2.5}
MOST_EXPOSED_CPU = 1.4

needs_systemd_analyze = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed"
)


@pytest.fixture(params=["", *DROP_INS])
def unit(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The unit with one of the drop-ins, or with none."""
    path = tmp_path / "nestd.service"
    # verify wants a program that exists.
    path.write_text(text("nestd.service").replace("/usr/bin/nestd", "/bin/true"))
    if request.param:
        drop_in = tmp_path / "nestd.service.d" / f"{request.param}.conf"
        drop_in.parent.mkdir()
        drop_in.write_text(text(drop_in.name))
    return path


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True)


@needs_systemd_analyze
def test_systemd_finds_no_mistake(unit: Path) -> None:
    done = analyze("verify", "--recursive-errors=no", str(unit))
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@needs_systemd_analyze
def test_a_mistake_would_be_found(tmp_path: Path) -> None:
    path = tmp_path / "nestd.service"
    path.write_text(text("nestd.service").replace("KillMode=mixed", "KillMode=gentle"))
    assert "gentle" in analyze("verify", "--recursive-errors=no", str(path)).stderr


@needs_systemd_analyze
def test_the_service_is_as_closed_as_promised(unit: Path) -> None:
    names = [path.stem for path in unit.parent.glob("nestd.service.d/*")]
    most = max([MOST_EXPOSED_CPU, *(MOST_EXPOSED.get(name, 0) for name in names)])
    done = analyze("security", "--offline=true", "--no-pager", str(unit))
    found = re.search(r"Overall exposure level for nestd.service: ([\d.]+)", done.stdout)
    assert found, done.stdout + done.stderr
    assert float(found[1]) <= most


def test_the_unit_keeps_what_sensing_and_hearing_need() -> None:
    """ProcSubset=pid hides /proc/meminfo, PrivateNetwork= the broker.

    MemoryDenyWriteExecute= forbids cffi's callbacks, by which libsndfile reads a clip.
    """
    unit = text("nestd.service")
    assert "ProcSubset=" not in unit
    assert "PrivateNetwork=" not in unit
    assert "MemoryDenyWriteExecute=" not in unit
    assert "OOMPolicy=continue\n" in unit


def test_every_line_of_the_unit_is_explained() -> None:
    page = (ROOT / "docs/systemd.md").read_text(encoding="utf-8")
    for name in ("nestd.service", *(f"{drop_in}.conf" for drop_in in DROP_INS)):
        for key in set(re.findall(r"^(\w+)=", text(name), re.MULTILINE)):
            assert f"`{key}=" in page, f"{key}= of {name} is not explained"


def test_every_drop_in_is_listed() -> None:
    assert {path.stem for path in (ROOT / "systemd").glob("*.conf")} == set(DROP_INS)
