"""A directory or file -> a Checkpoint; what is in it decides what it is."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nestd.bundle.errors import CheckpointError
from nestd.conversion.checkpoint import Checkpoint
from nestd.conversion.documents import read_json
from nestd.conversion.sources.gguf import ARCHITECTURE, Gguf, architecture, is_gguf
from nestd.conversion.sources.gguf_config import read_config
from nestd.conversion.sources.gguf_tokenizer import write_tokenizer
from nestd.conversion.sources.mlx import Mlx, is_mlx
from nestd.conversion.sources.safetensors import Safetensors

# For sources that keep none, or one in a language of their own as Ollama does.
GEMMA_TEMPLATE = Path(__file__).with_name("gemma3n.jinja")
TEXT_ONLY = "the source has the text decoder only, so the bundle will neither see nor hear"


@contextmanager
def open_checkpoint(path: Path) -> Iterator[Checkpoint]:
    """Yield the checkpoint at `path`: a Hugging Face or MLX directory, or a GGUF file.

    Raises:
        CheckpointError: it is none of these, or damaged.
    """
    if path.is_file():
        if not is_gguf(path):
            raise CheckpointError(
                f"{path} is no GGUF file: give that, or the directory of a checkpoint"
            )
        with tempfile.TemporaryDirectory(prefix="nestd-") as assets:
            yield _gguf(path, Path(assets))
        return
    if not (path / "config.json").is_file() and (only := _only_gguf(path)):
        with open_checkpoint(only) as checkpoint:
            yield checkpoint
        return
    config = read_json(path / "config.json")
    if is_mlx(config):
        bits = config["quantization"].get("bits")
        remarks = (TEXT_ONLY, _quantised(f"MLX's {bits} bits"))
        yield Checkpoint(path, config, Mlx(path, config), path, remarks)
    else:
        yield Checkpoint(path, config, Safetensors(path), path)


def _only_gguf(directory: Path) -> Path | None:
    """Return the one Gemma 3n of a directory; a file of towers is another architecture."""
    files = [item for item in directory.iterdir() if item.is_file() and is_gguf(item)]
    models = [item for item in files if architecture(item) == ARCHITECTURE]
    return models[0] if len(models) == 1 else None


def _gguf(path: Path, assets: Path) -> Checkpoint:
    reader = Gguf(path)
    shapes = {name.removeprefix("model."): info.shape for name, info in reader.tensors().items()}
    config = read_config(reader.keys, shapes, str(path))
    write_tokenizer(reader.keys, assets / "tokenizer.json", str(path))
    remarks = [TEXT_ONLY]
    template = reader.keys.get("tokenizer.chat_template")
    if isinstance(template, str):
        (assets / "chat_template.jinja").write_text(template, encoding="utf-8")
    else:
        shutil.copyfile(GEMMA_TEMPLATE, assets / "chat_template.jinja")
        remarks.append("the file has no chat template, so Gemma 3n's turns are taken")
    (assets / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if reader.types:
        remarks.append(_quantised(", ".join(reader.types)))
    if reader.types == ["Q8_0"]:
        remarks.append("--bits 8 --block-size 32 keeps the weights of Q8_0 as they are")
    return Checkpoint(path, config, reader, assets, tuple(remarks))


def _quantised(how: str) -> str:
    return (
        f"the source is quantised already ({how}): quantising once more costs some quality, which "
        "an unquantised checkpoint would keep"
    )
