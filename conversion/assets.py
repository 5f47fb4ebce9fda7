"""What a bundle carries beside graphs: tokenizer, chat template, token ids, defaults, licence."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from tokenizers import Tokenizer

from nestd.bundle.errors import CheckpointError
from nestd.bundle.licence import LICENCE_FILES
from nestd.bundle.manifest import GenerationDefaults, Tokens
from nestd.conversion.documents import read_json

# The notice that Gemma's terms ask every copy to carry (section 3.1 of the Gemma Terms of Use: its
# first sentence, that files were modified, and the use restrictions).
GEMMA_NOTICE = """\
Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms

nestd convert has modified these files: the weights of a Gemma checkpoint were quantised and laid
out anew. The bundle is a model derivative under these terms. Whoever uses it or passes it on is
bound by them, and by the Gemma Prohibited Use Policy, which is part of them:
ai.google.dev/gemma/prohibited_use_policy
"""


def copy_tokenizer(checkpoint: Path, bundle: Path) -> None:
    """Copy tokenizer.json after reading it once; CheckpointError if it is missing or damaged."""
    source = checkpoint / "tokenizer.json"
    if not source.is_file():
        raise CheckpointError(
            f"{source} is missing: download the checkpoint with its tokenizer files"
        )
    try:
        Tokenizer.from_file(str(source))
    except Exception as error:  # tokenizers raises plain Exception
        raise CheckpointError(f"{source} is damaged: {error}") from error
    shutil.copyfile(source, bundle / "tokenizer.json")


def write_chat_template(checkpoint: Path, bundle: Path) -> bool:
    """Write chat_template.jinja from wherever the checkpoint keeps it; False if it has none."""
    template = _chat_template(checkpoint)
    if template is None:
        return False
    (bundle / "chat_template.jinja").write_text(template, encoding="utf-8")
    return True


def _chat_template(checkpoint: Path) -> str | None:
    file = checkpoint / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        if (checkpoint / name).is_file():
            value = read_json(checkpoint / name).get("chat_template")
            if isinstance(value, list):  # several named templates
                named = {item.get("name"): item.get("template") for item in value}
                value = named.get("default")
            if isinstance(value, str):
                return value
    return None


def read_tokens(checkpoint: Path, config: Mapping[str, Any]) -> Tokens:
    """Return the special ids, generation_config.json before config.json."""
    generation = _optional_json(checkpoint / "generation_config.json")
    text = config.get("text_config", {})

    def find(key: str) -> Any:  # noqa: ANN401  (JSON)
        for document in (generation, config, text):
            if document.get(key) is not None:
                return document[key]
        return None

    eos = find("eos_token_id")
    try:
        return Tokens(
            bos=find("bos_token_id"),
            eos=tuple(eos) if isinstance(eos, list) else (eos,),
            pad=find("pad_token_id") or 0,
        )
    except ValidationError as error:
        raise CheckpointError(
            f"{checkpoint}: bos_token_id, eos_token_id or pad_token_id is missing or no number"
        ) from error


def read_generation_defaults(checkpoint: Path) -> GenerationDefaults:
    """Return the sampling defaults of generation_config.json, Gemma 3n's own where it is silent."""
    generation = _optional_json(checkpoint / "generation_config.json")
    known = {
        key: generation[key]
        for key in GenerationDefaults.model_fields
        if generation.get(key) is not None
    }
    try:
        return GenerationDefaults(**known)
    except ValidationError as error:
        first = error.errors()[0]
        raise CheckpointError(
            f"generation_config.json: {first['loc'][0]}: {first['msg']}"
        ) from error


def write_licence(checkpoint: Path, bundle: Path) -> None:
    """Copy the checkpoint's licence files; write Gemma's notice where it is owed and missing."""
    found = [name for name in LICENCE_FILES if (checkpoint / name).is_file()]
    text = ""
    for name in found:
        shutil.copyfile(checkpoint / name, bundle / name)
        text += (checkpoint / name).read_text(encoding="utf-8", errors="replace")
    has_notice = any(name.startswith("NOTICE") for name in found)
    if not found or ("Gemma Terms of Use" in text and not has_notice):
        (bundle / "NOTICE").write_text(GEMMA_NOTICE, encoding="utf-8")


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
