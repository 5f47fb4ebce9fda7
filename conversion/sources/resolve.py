"""What the user names -> a directory or a file: local, or from Hugging Face, Kaggle or Ollama."""

from __future__ import annotations

import re
from pathlib import Path

from nestd.bundle.errors import CheckpointError
from nestd.conversion.sources import ollama

PATTERNS = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "LICENSE*", "NOTICE*"]
REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def resolve(checkpoint: str) -> Path:
    """Return the local directory or file of `checkpoint`, downloading it where it names a hub.

    Args:
        checkpoint: a directory, a GGUF file, `OWNER/MODEL` on Hugging Face,
            `kaggle:OWNER/MODEL/...` or `ollama:MODEL:TAG`.

    Raises:
        CheckpointError: nothing there, the download failed, or the hub's package is not installed.
    """
    if checkpoint.startswith("kaggle:"):
        return _kaggle(checkpoint.removeprefix("kaggle:"))
    if checkpoint.startswith("ollama:"):
        return ollama.find(checkpoint.removeprefix("ollama:"))
    path = Path(checkpoint)
    if path.exists():
        return path
    if REPO_ID.fullmatch(checkpoint):
        return _hugging_face(checkpoint)
    raise CheckpointError(
        f"there is no directory or file {path}: give a checkpoint directory, a GGUF file, a "
        "Hugging Face repository (OWNER/MODEL), kaggle:OWNER/MODEL/FRAMEWORK/VARIATION or "
        "ollama:MODEL:TAG"
    )


def _hugging_face(repository: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        raise CheckpointError(
            f"to download {repository}, install huggingface-hub: pip install 'nestd[convert]'"
        ) from error
    try:
        return Path(snapshot_download(repository, allow_patterns=PATTERNS))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"cannot download {repository} from Hugging Face ({first_line}): check the name, "
            "accept the licence on the model's page, and log in with `hf auth login`"
        ) from error


def _kaggle(handle: str) -> Path:
    try:
        import kagglehub
        from kagglehub.exceptions import KaggleApiHTTPError
    except ImportError as error:
        raise CheckpointError(
            "to download from Kaggle, install kagglehub: pip install kagglehub"
        ) from error
    try:
        return Path(kagglehub.model_download(handle))
    except (KaggleApiHTTPError, OSError, ValueError) as error:
        raise CheckpointError(
            f"cannot download {handle} from Kaggle ({error}): check the handle "
            "(OWNER/MODEL/FRAMEWORK/VARIATION) and your Kaggle credentials"
        ) from error
