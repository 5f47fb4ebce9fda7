"""What run.py measures: random checkpoints, bundles and GGUF files, made where missing.

A step whose result is there is skipped. Nothing half-made is ever taken for a result, and the disk
is looked at before each step. Sizes of files are those of Gemma 3n's real shapes.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from nestd.bundle.manifest import MANIFEST

HERE = Path(__file__).parent
FEWER_BYTES = "nestd, fewer bytes"
GB = 10**9
# Decimal gigabytes, rounded up.
CHECKPOINT_GB = {"E2B": 9, "E4B": 14}
BUNDLE_GB = {8: 9, 4: 7}
PREPARED_GB = {8: 11, 4: 7}
GGUF_GB = {("E2B", 8): 5, ("E2B", 4): 4, ("E4B", 8): 8, ("E4B", 4): 5}
TYPES = {8: "q8_0", 4: "q4_0"}


class Artefacts:
    """Files of one work directory; `bundles` and `ggufs` that are given are used as they are."""

    def __init__(
        self,
        work: Path,
        llama_python: str | None,
        bundles: dict[int, Path],
        ggufs: dict[tuple[str, int], Path],
    ) -> None:
        self._work = work
        self._llama_python = llama_python
        self._bundles, self._ggufs = bundles, ggufs
        work.mkdir(parents=True, exist_ok=True)

    def checkpoint(self, size: str) -> Path:
        """Return the random checkpoint of this size."""
        path = self._work / f"checkpoint-{size}"
        if not path.is_dir():
            self._need(CHECKPOINT_GB[size], path)
            made = _fresh(path)
            _run(sys.executable, HERE.parent / "random_checkpoint.py", size, made)
            made.rename(path)
        return path

    def bundle(self, bits: int, fewer_bytes: bool = False) -> Path:
        """Return E4B's bundle, which holds all smaller sizes; or one that reads fewer bytes."""
        if bits in self._bundles and not fewer_bytes:
            return self._bundles[bits]
        path = self._work / (f"int{bits}-fewer" if fewer_bytes else f"int{bits}")
        if not (path / MANIFEST).is_file():
            checkpoint = self.checkpoint("E4B")
            self._need(BUNDLE_GB[bits] + PREPARED_GB[bits], path)
            nestd = Path(sys.executable).with_name("nestd")
            options = ("--sparse-rows", "--lm-head-screen") if fewer_bytes else ()
            _run(nestd, "convert", checkpoint, _fresh(path), "--bits", bits, *options)
            _partial(path).rename(path)
        return path

    def gguf(self, size: str, bits: int) -> Path:
        """Return the file of one size for llama.cpp."""
        if (size, bits) in self._ggufs:
            return self._ggufs[size, bits]
        path = self._work / f"{size}-{TYPES[bits]}.gguf"
        if not path.is_file():
            checkpoint = self.checkpoint("E4B")
            # Its converter writes all of it in bfloat16 first.
            self._need(GGUF_GB[size, bits] + CHECKPOINT_GB[size], path)
            made = _fresh(path)
            command = [self.llama_python, HERE / "gguf_checkpoint.py", checkpoint, made]
            _run(*command, "--type", TYPES[bits], "--submodel", size)
            made.rename(path)
        return path

    def mistralrs(self) -> Path:
        """Return E4B's checkpoint in mistral.rs's form, with towers."""
        path = self._work / "checkpoint-mistralrs"
        if not path.is_dir():
            self._need(CHECKPOINT_GB["E4B"] + 1, path)
            made = _fresh(path)
            _run(sys.executable, HERE / "mistralrs_checkpoint.py", made)
            made.rename(path)
        return path

    @property
    def llama_python(self) -> str:
        """The interpreter that has llama-cpp-python."""
        if self._llama_python is None:
            raise SystemExit("llama.cpp needs --llama-python, or leave it out of --peers")
        return self._llama_python

    def drop(self, bits: int) -> None:
        """Remove what was made here for one width."""
        for name in (f"int{bits}", f"int{bits}-fewer"):
            shutil.rmtree(self._work / name, ignore_errors=True)
        for path in self._work.glob(f"*-{TYPES.get(bits)}.gguf"):
            path.unlink()

    def drop_checkpoints(self) -> None:
        """Remove the checkpoints that were made here."""
        for path in self._work.glob("checkpoint-*"):
            shutil.rmtree(path)

    def _need(self, gigabytes: int, path: Path) -> None:
        free = shutil.disk_usage(self._work).free
        if free < gigabytes * GB:
            raise SystemExit(
                f"{path} needs {gigabytes} GB while it is made, {self._work} has {free / GB:.1f} "
                "GB free: free some, take one width of --bits at a time with --keep-less, or give "
                "what you have with --bundle and --gguf"
            )


def _partial(path: Path) -> Path:
    return path.with_name(f"partial-{path.name}")


def _fresh(path: Path) -> Path:
    """Return where `path` is made, empty."""
    partial = _partial(path)
    if partial.is_dir():
        shutil.rmtree(partial)
    partial.unlink(missing_ok=True)
    return partial


def _run(*command: object) -> None:
    words = [str(word) for word in command]
    print(" ".join(Path(word).name for word in words), file=sys.stderr)
    if subprocess.run(words, check=False, stdout=subprocess.DEVNULL).returncode:
        raise SystemExit(f"{words[0]} has failed, see above")
