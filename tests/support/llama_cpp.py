"""llama.cpp's own converter, from llama-cpp-python's source package, kept in the user's cache."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest

PACKAGE, VERSION = "llama-cpp-python", "0.3.36"
VENDORED = f"llama_cpp_python-{VERSION}/vendor/llama.cpp/"
NEEDED = ("convert_hf_to_gguf.py", "conversion/", "gguf-py/")


def converter() -> Path:
    """Return the directory with convert_hf_to_gguf.py."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    directory = cache / "nestd-tests" / f"llama.cpp-{VERSION}"
    if directory.is_dir():
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as work:
        # The source package: the wheel has no converter.
        options = ["--no-deps", "--no-binary", PACKAGE, "--quiet", "--dest", work]
        command = [sys.executable, "-m", "pip", "download", *options, f"{PACKAGE}=={VERSION}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.fail(f"pip could not fetch {PACKAGE}: {done.stderr.strip()}", pytrace=False)
        ready = Path(work) / "ready"
        (archive,) = Path(work).glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            for member in tar.getmembers():
                inner = member.name.removeprefix(VENDORED)
                if member.isfile() and inner.startswith(NEEDED):
                    member.name = inner
                    tar.extract(member, ready, filter="data")
        ready.rename(directory)
    return directory


def to_gguf(checkpoint: Path, out: Path, kind: str) -> None:
    """Convert a checkpoint as a user of llama.cpp does; `kind` is f32, bf16, f16 or q8_0."""
    command = [sys.executable, converter() / "convert_hf_to_gguf.py", checkpoint]
    done = subprocess.run(
        [*command, "--outfile", out, "--outtype", kind], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
