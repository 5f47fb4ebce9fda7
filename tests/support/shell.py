"""Runs the shell blocks of the documentation."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path

from support.clients import PATIENCE


def shell(block: str, cwd: Path, environment: Mapping[str, str]) -> str:
    """Run a block, which must not fail, and return what it prints."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
        timeout=2 * PATIENCE,
    )
    assert done.returncode == 0, (block, done.stderr)
    return done.stdout
