"""A directory or file -> a Checkpoint; what is in it decides what it is."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nestd.bundle.errors import CheckpointError
from nestd.conversion.checkpoint import Checkpoint
from nestd.conversion.documents import read_json
from nestd.conversion.sources.gguf_file import is_gguf
from nestd.conversion.sources.gguf_model import TEXT_ONLY, find_gguf, open_gguf, quantised
from nestd.conversion.sources.mlx import Mlx, is_mlx
from nestd.conversion.sources.safetensors import Safetensors


@contextmanager
def open_checkpoint(path: Path, mmproj: Path | None = None) -> Iterator[Checkpoint]:
    """Yield the checkpoint at `path`: a Hugging Face or MLX directory, or a GGUF file.

    Args:
        path: the directory, or the GGUF file of the text decoder.
        mmproj: the GGUF file of the towers; None takes the one beside it, where `path` is a
            directory.

    Raises:
        CheckpointError: it is none of these, or damaged.
    """
    files = None
    if path.is_file():
        if not is_gguf(path):
            raise CheckpointError(
                f"{path} is no GGUF file: give that, or the directory of a checkpoint"
            )
        files = open_gguf(path, mmproj)
    elif not (path / "config.json").is_file():
        files = find_gguf(path, mmproj)
    if files is not None:
        with tempfile.TemporaryDirectory(prefix="nestd-") as assets:
            yield files.checkpoint(Path(assets))
        return
    if mmproj is not None:
        raise CheckpointError(
            f"--mmproj goes with a GGUF file, and {path} is a directory that has its own towers or "
            "none: leave --mmproj out"
        )
    config = read_json(path / "config.json")
    if is_mlx(config):
        bits = config["quantization"].get("bits")
        remarks = (TEXT_ONLY, quantised(f"MLX's {bits} bits"))
        yield Checkpoint(path, config, Mlx(path, config), path, remarks)
    else:
        yield Checkpoint(path, config, Safetensors(path), path)
