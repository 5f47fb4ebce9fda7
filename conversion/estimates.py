"""What a conversion will read, and what its bundle will take: said before the work starts."""

from __future__ import annotations

import shutil
from pathlib import Path

from nestd.bundle.errors import BundleError
from nestd.bundle.manifest import ModelConfig, Quantization
from nestd.conversion.checkpoint import Checkpoint
from nestd.conversion.encoders.config import ENCODER_BLOCK_SIZE, EncoderPlan


def bytes_to_read(
    checkpoint: Checkpoint, model: ModelConfig, quantization: Quantization, encoders: EncoderPlan
) -> int:
    """Return how many bytes of the checkpoint the conversion reads, some of them repeatedly."""
    unused = tuple(
        f"layers.{layer}.self_attn.{part}"
        for layer in range(model.first_kv_shared_layer, model.num_layers)
        for part in ("k_", "v_")
    )
    # The columns of down_proj are read once for the narrow and once for the wide half.
    twice = tuple(
        f"layers.{layer}.mlp.down_proj."
        for layer, width in enumerate(model.intermediate_size)
        if width > model.nested_intermediate_size
    )
    text = sum(
        info.nbytes * (2 if name.startswith(twice) else 1)
        for name, info in checkpoint.text.items()
        if not name.startswith(unused)
    )
    if quantization.lm_head_screen:
        text += checkpoint.text["embed_tokens.weight"].nbytes
    if quantization.sparse_rows:
        # A table of up's rows takes one more reading, one of down's columns two.
        text += sum(
            checkpoint.text[name].nbytes * (1 if ".up_proj." in name else 2)
            for name in _tabled(checkpoint, model)
        )
    return text + sum(
        info.nbytes
        for name, info in checkpoint.encoders.items()
        if name.startswith(encoders.weights)
    )


def check_disk(
    destination: Path,
    checkpoint: Checkpoint,
    model: ModelConfig,
    quantization: Quantization,
    encoders: EncoderPlan,
) -> None:
    """Refuse before the work starts what would end in a full disk.

    Raises:
        BundleError: the disk of `destination` is too small, or there is no such directory.
    """
    tables = ("embed_tokens.weight", "embed_tokens_per_layer.weight")
    overhead = 4 / quantization.block_size if quantization.bits != 32 else 0.0
    needed = 0.0
    for name, info in checkpoint.text.items():
        bits = quantization.bits if name not in tables else quantization.embedding_bits
        needed += info.elements * (bits / 8 + overhead)
        if name == tables[0] and quantization.lm_head_screen:
            needed += info.elements * (0.5 + overhead)
    if quantization.sparse_rows:
        needed += sum(checkpoint.text[name].elements for name in _tabled(checkpoint, model))
    for name, info in checkpoint.encoders.items():
        if name.startswith(encoders.weights):
            needed += info.elements * (4.0 if encoders.bits == 32 else 1 + 4 / ENCODER_BLOCK_SIZE)
    parent = destination.absolute().parent
    if not parent.is_dir():
        raise BundleError(f"there is no directory {parent}: create it first")
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise BundleError(
            f"the bundle needs {needed / 1e9:.1f} GB, {parent} has {free / 1e9:.1f} GB free: "
            "free some space or choose another disk"
        )


def _tabled(checkpoint: Checkpoint, model: ModelConfig) -> list[str]:
    """Return the matrices that `sparse_rows` keeps as tables of rows too."""
    return [
        name
        for layer, sparsity in enumerate(model.activation_sparsity_pattern)
        if sparsity > 0
        for kind in ("up", "down")
        if (name := f"layers.{layer}.mlp.{kind}_proj.weight") in checkpoint.text
    ]
