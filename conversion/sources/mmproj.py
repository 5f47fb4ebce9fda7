"""The file of Gemma 3n's towers beside a text GGUF, as `convert_hf_to_gguf.py --mmproj` writes it.

Source of names and layout: llama.cpp, conversion/gemma.py (Gemma3nVisionAudioModel) and
gguf-py/gguf/tensor_mapping.py. Which towers are in it, its tensors decide: the header says both
even where there is one.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from nestd.bundle.errors import CheckpointError
from nestd.conversion.sources.gguf import TOWERS_ARCHITECTURE
from nestd.conversion.sources.gguf_file import GgufFile, read_header
from nestd.conversion.sources.tensors import TensorInfo

PROJECTORS: Final = ("gemma3nv", "gemma3na")
# Where the header names the projectors; the first where there is one tower.
PROJECTOR_KEYS: Final = (
    "clip.projector_type", "clip.vision.projector_type", "clip.audio.projector_type",
)  # fmt: skip
HOW_TO_GET: Final = "llama.cpp's `convert_hf_to_gguf.py --mmproj` writes it"
PROJECTOR_TENSORS: Final = {
    "embedding": "embedding",
    "hard_emb_norm": "hard_embedding_norm",
    "soft_emb_norm": "soft_embedding_norm",
    "input_projection": "embedding_projection",
}
AUDIO_TENSORS: Final = {
    "conv1d.0": "subsample_conv_projection.conv_0.conv",
    "conv1d.0.norm": "subsample_conv_projection.conv_0.norm",
    "conv1d.1": "subsample_conv_projection.conv_1.conv",
    "conv1d.1.norm": "subsample_conv_projection.conv_1.norm",
    "pre_encode.out": "subsample_conv_projection.input_proj_linear",
}
AUDIO_LAYER_TENSORS: Final = {
    "ffn_norm": "ffw_layer_start.pre_layer_norm",
    "ffn_up": "ffw_layer_start.ffw_layer_1",
    "ffn_down": "ffw_layer_start.ffw_layer_2",
    "ffn_post_norm": "ffw_layer_start.post_layer_norm",
    "ln1": "attention.pre_attn_norm",
    "attn_q": "attention.attn.q_proj",
    "attn_k": "attention.attn.k_proj",
    "attn_v": "attention.attn.v_proj",
    "per_dim_scale": "attention.attn.per_dim_scale",
    "linear_pos": "attention.attn.relative_position_embedding.pos_proj",
    "attn_out": "attention.post",
    "ln2": "attention.post_norm",
    "conv_norm": "lconv1d.pre_layer_norm",
    "conv_pw1": "lconv1d.linear_start",
    "conv_dw": "lconv1d.depthwise_conv1d",
    "norm_conv": "lconv1d.conv_norm",
    "conv_pw2": "lconv1d.linear_end",
    "ffn_norm_1": "ffw_layer_end.pre_layer_norm",
    "ffn_up_1": "ffw_layer_end.ffw_layer_1",
    "ffn_down_1": "ffw_layer_end.ffw_layer_2",
    "ffn_post_norm_1": "ffw_layer_end.post_layer_norm",
    "layer_pre_norm": "norm",
}
# Vectors in Hugging Face's checkpoint, [1, C, 1, 1] here.
VECTORS: Final = ("conv_stem.conv.bias", "layer_scale.gamma")


def projectors(header: Any) -> set[str]:  # noqa: ANN401  (gguf.GGUFReader)
    """Return the kinds of projectors that the header names."""
    fields = (header.fields.get(key) for key in PROJECTOR_KEYS)
    return {str(field.contents()) for field in fields if field is not None}


class Mmproj(GgufFile):
    """Reads the towers of one file."""

    def __init__(self, path: Path, header: Any = None) -> None:  # noqa: ANN401  (gguf.GGUFReader)
        """Take the header in, or read it where it is not given.

        Raises:
            CheckpointError: it is damaged or cut short, or holds no tower of Gemma 3n.
        """
        header = header or read_header(path)
        super().__init__(path, header)
        kind = self.keys.get("general.architecture")
        if kind != TOWERS_ARCHITECTURE:
            raise CheckpointError(
                f"{path} is no mmproj file, but a model of the architecture {kind!r}: {HOW_TO_GET}"
            )
        found = projectors(header)
        if not found or not found <= set(PROJECTORS):
            raise CheckpointError(
                f"{path} holds the towers of another model (projector "
                f"{', '.join(sorted(found)) or 'unnamed'}): take the mmproj file of Gemma 3n "
                f"({', '.join(PROJECTORS)}); {HOW_TO_GET}"
            )
        self._infos: dict[str, TensorInfo] = {}
        for name, info in self.stored.items():
            if (bare := _checkpoint_name(name)) is not None:
                vector = bare.endswith(VECTORS)
                self._infos[bare] = replace(info, shape=(info.elements,)) if vector else info
        if not any("_tower." in name for name in self._infos):
            raise CheckpointError(f"{path} holds no tower: {HOW_TO_GET}")

    def tensors(self) -> dict[str, TensorInfo]:
        """Return all tensors by their name in `Gemma3nModel`."""
        return dict(self._infos)


def _checkpoint_name(name: str) -> str | None:
    """Return the name in `Gemma3nModel`; None for what nestd has no use for."""
    base = name.removesuffix(".weight")
    if base.startswith("v."):  # the names of timm, but for one word
        return "vision_tower.timm_model." + re.sub(r"^blk\.", "blocks.", name[len("v.") :])
    if match := re.fullmatch(r"mm\.(a\.)?(\w+)", base):
        modality = "audio" if match[1] else "vision"
        part = PROJECTOR_TENSORS.get(match[2])
        return part and f"embed_{modality}.{part}.weight"
    if match := re.fullmatch(r"a\.blk\.(\d+)\.(\w+)", base):
        part = AUDIO_LAYER_TENSORS.get(match[2])
        suffix = name[len(base) :]  # none behind a bare parameter
        return part and f"audio_tower.conformer.{match[1]}.{part}{suffix}"
    part = AUDIO_TENSORS.get(base.removeprefix("a.")) if base.startswith("a.") else None
    return part and f"audio_tower.{part}.weight"
