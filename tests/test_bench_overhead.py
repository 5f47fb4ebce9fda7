"""benchmarks/overhead.py on the tiny bundle: the daemon stays small, and every figure is there."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nestd.bundle.manifest import Bundle

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "overhead.py"
MEGABYTE = 10**6


@pytest.mark.broker
@pytest.mark.skipif(not shutil.which("mosquitto"), reason="Mosquitto is not installed")
def test_the_daemon_stays_small_and_mqtts_part_is_told_apart(
    tiny_bundle: Bundle, tmp_path: Path
) -> None:
    largest = tiny_bundle.manifest.submodels[-1].name
    command = [sys.executable, str(SCRIPT), str(tiny_bundle.path), str(tmp_path / "work")]
    command += ["--submodel", largest, "--idle", "1", "--starts", "1", "--requests", "3"]
    command += ["--answer", "6", "--out", str(tmp_path / "results")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "results" / "overhead.json").read_text())
    assert report["submodel"] == largest
    assert 0 < report["memory"]["daemon"]["rss"] < 80 * MEGABYTE
    assert 0 < report["without_model"]["rss_bytes"] < 80 * MEGABYTE
    for times in (report["mqtt"]["first_token_ms"], report["mqtt"]["token_ms"]):
        for side in ("mqtt", "direct"):
            assert len(times[side]) == 3
            assert min(times[side]) > 0
    assert min(report["start_seconds"]) > 0
    text = (tmp_path / "results" / "overhead.md").read_text()
    assert "| daemon RSS, MB |" in text
    assert "MQTT adds to the first token, ms" in text
