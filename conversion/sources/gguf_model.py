"""The GGUF file of a text decoder, and the one of its towers where there is one -> a Checkpoint."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from nestd.bundle.errors import CheckpointError
from nestd.conversion.checkpoint import Checkpoint
from nestd.conversion.sources.gguf import ARCHITECTURE, TOWERS_ARCHITECTURE, Gguf
from nestd.conversion.sources.gguf_config import read_config
from nestd.conversion.sources.gguf_file import architecture, is_gguf, quantised_types, read_header
from nestd.conversion.sources.gguf_tokenizer import write_tokenizer
from nestd.conversion.sources.mmproj import HOW_TO_GET, PROJECTORS, Mmproj, projectors
from nestd.conversion.sources.mmproj_config import first_media_id, read_towers
from nestd.conversion.sources.tensors import Together

# For sources that keep none, or one in a language of their own as Ollama does.
GEMMA_TEMPLATE = Path(__file__).with_name("gemma3n.jinja")
TEXT_ONLY = "the source has the text decoder only, so the bundle will neither see nor hear"
WITHOUT = {"vision": "see", "audio": "hear"}


@dataclass(frozen=True, slots=True)
class GgufModel:
    """Both files of one model, `towers` None where there is none; what was left aside, said."""

    text: Gguf
    towers: Mmproj | None
    remarks: tuple[str, ...] = ()

    def checkpoint(self, assets: Path) -> Checkpoint:
        """Return the checkpoint; tokenizer, chat template and config go to the directory `assets`.

        Raises:
            CheckpointError: a file lacks something, or they are of different models.
        """
        text, towers, where = self.text, self.towers, str(self.text.path)
        remarks = list(self.remarks)
        more = {}
        if towers is not None:
            shapes = {name: info.shape for name, info in towers.tensors().items()}
            more = read_towers(towers.keys, shapes, text.keys, str(towers.path), where)
            text.cut_per_layer_table(first_media_id(more))
        remarks += _lacking(towers, more)
        tensors = text.tensors()
        shapes = {name.removeprefix("model."): info.shape for name, info in tensors.items()}
        config = read_config(text.keys, shapes, where)
        if more:
            names = ["Gemma3nForConditionalGeneration"]
            config = {
                "model_type": "gemma3n", "architectures": names, "text_config": config, **more
            }  # fmt: skip
        write_tokenizer(text.keys, assets / "tokenizer.json", where)
        template = text.keys.get("tokenizer.chat_template")
        if isinstance(template, str):
            (assets / "chat_template.jinja").write_text(template, encoding="utf-8")
        else:
            shutil.copyfile(GEMMA_TEMPLATE, assets / "chat_template.jinja")
            remarks.append("the file has no chat template, so Gemma 3n's turns are taken")
        (assets / "config.json").write_text(json.dumps(config), encoding="utf-8")
        reader = Together(text, towers) if towers is not None else text
        types = quantised_types(reader.tensors())
        if types:
            remarks.append(quantised(", ".join(types)))
        if types == ["Q8_0"]:
            remarks.append("--bits 8 --block-size 32 keeps the weights of Q8_0 as they are")
        return Checkpoint(
            text.path,
            config,
            reader,
            assets,
            tuple(remarks),
            towers.path if towers is not None else None,
            f"give an mmproj file that holds it with --mmproj ({HOW_TO_GET})",
        )


def open_gguf(path: Path, mmproj: Path | None) -> GgufModel:
    """Return the model of the text file `path` and the towers `mmproj`.

    Raises:
        CheckpointError: a file is damaged, or of another kind or model.
    """
    return GgufModel(Gguf(path), _open_towers(mmproj))


def find_gguf(directory: Path, mmproj: Path | None) -> GgufModel | None:
    """Return the one Gemma 3n among the GGUF files of a directory, None where it has no such file.

    Its towers are `mmproj`, or the one mmproj file of Gemma 3n there. Each header is read once.

    Raises:
        CheckpointError: none of them is, or several are, or a file is damaged.
    """
    files = sorted(item for item in directory.iterdir() if item.is_file() and is_gguf(item))
    headers = {path: read_header(path) for path in files}
    kinds = {path: architecture(header) for path, header in headers.items()}
    models = [path for path, kind in kinds.items() if kind == ARCHITECTURE]
    if not files:
        return None
    if not models:
        raise CheckpointError(
            f"{directory} holds no text model of Gemma 3n ({_names(files)}): give the directory or "
            "the GGUF file that has it"
        )
    if len(models) > 1:
        raise CheckpointError(
            f"{directory} holds several Gemma 3n models ({_names(models)}): give the one to convert"
        )
    text = Gguf(models[0], headers[models[0]])
    if mmproj is not None:
        return GgufModel(text, _open_towers(mmproj))
    towers: list[Path] = []
    others: list[Path] = []
    for path in (path for path, kind in kinds.items() if kind == TOWERS_ARCHITECTURE):
        known = projectors(headers[path]) & set(PROJECTORS)
        (towers if known else others).append(path)
    if len(towers) > 1:
        raise CheckpointError(
            f"{directory} holds several mmproj files of Gemma 3n ({_names(towers)}): name one with "
            "--mmproj"
        )
    remarks = tuple(f"{path.name} holds another model's towers, left aside" for path in others)
    if not towers:
        return GgufModel(text, None, remarks)
    return GgufModel(text, Mmproj(towers[0], headers[towers[0]]), remarks)


def quantised(how: str) -> str:
    """Return the remark about a source that is quantised already, `how` in words."""
    return (
        f"the source is quantised already ({how}): quantising once more costs some quality, which "
        "an unquantised checkpoint would keep"
    )


def _open_towers(mmproj: Path | None) -> Mmproj | None:
    if mmproj is None:
        return None
    if not mmproj.is_file() or not is_gguf(mmproj):
        raise CheckpointError(f"{mmproj} is no GGUF file: give --mmproj a file; {HOW_TO_GET}")
    return Mmproj(mmproj)


def _lacking(towers: Mmproj | None, config: dict[str, object]) -> list[str]:
    """Return what to say about towers that are not there."""
    if towers is None:
        return [TEXT_ONLY]
    return [
        f"{towers.path.name} holds no {name} tower, so the bundle will not {verb}"
        for name, verb in WITHOUT.items()
        if f"{name}_config" not in config
    ]


def _names(paths: list[Path]) -> str:
    return ", ".join(path.name for path in paths)
