"""The local store of Ollama: a manifest for each model, its layers as blobs by their sha256.

Source: Ollama, server/manifest.go, server/modelpath.go and docs/faq (where models are stored).
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Final

from nestd.bundle.errors import CheckpointError
from nestd.conversion.documents import read_json

MODEL_LAYER: Final = "application/vnd.ollama.image.model"
REGISTRY: Final = "registry.ollama.ai"
# Where the service of the Linux package keeps its models, beside the user's own.
SERVICE_STORE: Final = Path("/usr/share/ollama/.ollama/models")
DIGEST: Final = re.compile(r"sha256:([0-9a-f]{64})")
NAME: Final = re.compile(r"[\w.-]+(/[\w.-]+){0,2}(:[\w.-]+)?")


def find(name: str) -> Path:
    """Return the GGUF file of the model `name`, for example `gemma3n:e4b`.

    Raises:
        CheckpointError: no such model, or its file is missing or cut short.
    """
    if not NAME.fullmatch(name):
        raise CheckpointError(
            f"{name!r} is no name of an Ollama model: give for example gemma3n:e4b"
        )
    manifest, store = _manifest(name)
    layer = _model_layer(manifest)
    digest, size = DIGEST.fullmatch(str(layer.get("digest"))), layer.get("size")
    if digest is None:
        raise CheckpointError(f"{manifest} has no digest for its model: ollama pull {name}")
    blob = store / "blobs" / f"sha256-{digest[1]}"
    found = blob.stat().st_size if blob.is_file() else None
    if found != size:
        what = "is missing" if found is None else f"has {found} bytes of {size}"
        raise CheckpointError(f"{blob} {what}: ollama pull {name}")
    return blob


def _stores() -> list[Path]:
    chosen = os.environ.get("OLLAMA_MODELS")
    return [Path(chosen)] if chosen else [Path.home() / ".ollama" / "models", SERVICE_STORE]


def _manifest(name: str) -> tuple[Path, Path]:
    model, _, tag = name.partition(":")
    parts = model.split("/")
    parts = [*(REGISTRY, "library")[: 3 - len(parts)], *parts]
    for store in _stores():
        path = store / "manifests" / Path(*parts) / (tag or "latest")
        if path.is_file():
            return path, store
    looked = " and ".join(str(store) for store in _stores())
    raise CheckpointError(
        f"Ollama has no model {name} in {looked}: ollama pull {name}, or set OLLAMA_MODELS to the "
        "store"
    )


def _model_layer(manifest: Path) -> dict[str, Any]:
    layers = read_json(manifest).get("layers")
    for layer in layers if isinstance(layers, list) else []:
        if isinstance(layer, dict) and layer.get("mediaType") == MODEL_LAYER:
            return layer
    raise CheckpointError(f"{manifest} names no model file: ollama pull it again")
