"""The header and shapes of an mmproj file -> what config.json says of Gemma 3n's towers.

Numbers that no weight depends on (the conformer's windows, epsilons, strides) are in no mmproj
file: transformers' configs have Gemma 3n's own values for them. Which ids media have, the text
model's vocabulary says.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Final

from nestd.bundle.errors import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]

# Named by Gemma 3n's tokenizer; the id that ends a medium is the first of its hard embeddings.
TOKENS: Final = {
    "vision": {
        "boi_token_id": "<start_of_image>",
        "image_token_id": "<image_soft_token>",
        "eoi_token_id": "<end_of_image>",
    },
    "audio": {
        "boa_token_id": "<start_of_audio>",
        "audio_token_id": "<audio_soft_token>",
        "eoa_token_id": "<end_of_audio>",
    },
}
END: Final = {"vision": "eoi_token_id", "audio": "eoa_token_id"}
AUDIO_SOFT_TOKENS: Final = 188
TIMM: Final = "vision_tower.timm_model."


def read_towers(
    keys: Mapping[str, Any], shapes: Shapes, text: Mapping[str, Any], where: str, text_where: str
) -> dict[str, Any]:
    """Return the keys of config.json beside `text_config`.

    Args:
        keys: the mmproj file's metadata.
        shapes: of its tensors, by their name in `Gemma3nModel`.
        text: the text file's metadata.
        where: the mmproj file, for errors.
        text_where: the text file, for errors.

    Raises:
        CheckpointError: a key or tensor is missing, or both files are of different models.
    """
    config: dict[str, Any] = {}
    tokens = text.get("tokenizer.ggml.tokens") or []
    for modality in TOKENS:
        if not any(name.startswith(f"{modality}_tower.") for name in shapes):
            continue
        for key, token in TOKENS[modality].items():
            if token not in tokens:
                raise CheckpointError(
                    f"{text_where} has no token {token}: take a text GGUF file that was converted "
                    "for pictures and sound, or leave the mmproj file out"
                )
            config[key] = tokens.index(token)
        rows, width = _shape(shapes, f"embed_{modality}.embedding.weight", 2, where)
        projection = _shape(shapes, f"embed_{modality}.embedding_projection.weight", 2, where)
        hidden = text.get("gemma3n.embedding_length")
        if projection != (hidden, width):
            raise CheckpointError(
                f"{where} makes {modality} tokens of {projection[0]} numbers, {text_where} takes "
                f"{hidden}: take the mmproj file of the same model"
            )
        offset = config[END[modality]]
        if offset + rows > len(tokens):
            raise CheckpointError(
                f"{where} has {rows} embeddings of {modality} from id {offset} on, {text_where} "
                f"has {len(tokens)} ids: take the mmproj file of the same model"
            )
        common = {"hidden_size": width, "vocab_size": rows, "vocab_offset": offset}
        read = _vision if modality == "vision" else _audio
        config |= read(keys, shapes, where, common)
    return config


def first_media_id(towers: Mapping[str, Any]) -> int:
    """Return the first id that is no text, of the keys that `read_towers` gives."""
    return min(int(towers[key]) for key in END.values() if key in towers)


def _vision(
    keys: Mapping[str, Any], shapes: Shapes, where: str, common: Mapping[str, int]
) -> dict[str, Any]:
    # The converter writes patch_size as image_size // number of tokens.
    size, patch = (
        _positive(keys, f"clip.vision.{name}_size", where) for name in ("image", "patch")
    )
    count = size // patch
    side = math.isqrt(count)
    if side**2 != count:
        raise CheckpointError(
            f"{where}: clip.vision.image_size {size} and patch_size {patch} make {count} tokens, "
            "which is no square: convert the towers again"
        )
    model_args = {
        "block_args": block_args(shapes, where),
        "stem_size": _shape(shapes, f"{TIMM}conv_stem.conv.weight", 4, where)[0],
        "msfa_output_resolution": side,
    }
    section = {**common, "architecture": "mobilenetv5_300m_enc", "model_args": model_args}
    return {"vision_config": section, "vision_soft_tokens_per_image": count}


def _audio(
    keys: Mapping[str, Any], shapes: Shapes, where: str, common: Mapping[str, int]
) -> dict[str, Any]:
    names = ("conv_0", "conv_1")
    convolutions = [
        _shape(shapes, f"audio_tower.subsample_conv_projection.{name}.conv.weight", 4, where)
        for name in names
    ]
    depthwise = _shape(shapes, "audio_tower.conformer.0.lconv1d.depthwise_conv1d.weight", 3, where)
    section = {
        **common,
        "input_feat_size": _positive(keys, "clip.audio.num_mel_bins", where),
        "conf_num_hidden_layers": _positive(keys, "clip.audio.block_count", where),
        "conf_num_attention_heads": _positive(keys, "clip.audio.attention.head_count", where),
        "conf_conv_kernel_size": depthwise[-1],
        "sscp_conv_channel_size": [shape[0] for shape in convolutions],
        "sscp_conv_kernel_size": [list(shape[2:]) for shape in convolutions],
    }
    return {"audio_config": section, "audio_soft_tokens_per_image": AUDIO_SOFT_TOKENS}


def block_args(shapes: Shapes, where: str) -> list[list[str]]:
    """Return timm's block strings of MobileNet-V5, `["er_r1_k3_s2_e4_c128", ...]` a stage.

    What a block is, its tensors say; the first of each stage halves the picture, as in llama.cpp's
    tools/mtmd/models/mobilenetv5.cpp.

    Raises:
        CheckpointError: a block is of no known kind, or one is missing.
    """
    stages: dict[int, dict[int, dict[str, tuple[int, ...]]]] = {}
    for name, shape in shapes.items():
        match = re.fullmatch(rf"{re.escape(TIMM)}blocks\.(\d+)\.(\d+)\.(.+)\.weight", name)
        if match and len(shape) == 4:
            stage, block = int(match[1]), int(match[2])
            stages.setdefault(stage, {}).setdefault(block, {})[match[3]] = shape
    return [
        [
            _block(stages[stage].get(block, {}), 2 if block == 0 else 1, f"{stage}.{block}", where)
            for block in range(max(stages[stage]) + 1)
        ]
        for stage in sorted(stages)
    ]


def _block(parts: Shapes, stride: int, name: str, where: str) -> str:
    def kernel(part: str) -> int:
        return parts[part][-1] if part in parts else 0

    def expansion(wide: str, narrow: int) -> str:
        return f"{parts[wide][0] / narrow:g}"

    if {"conv_exp", "conv_pwl"} <= set(parts):
        grown = expansion("conv_exp", parts["conv_exp"][1])
        out = parts["conv_pwl"][0]
        return f"er_r1_k{kernel('conv_exp')}_s{stride}_e{grown}_c{out}"
    if {"pw_exp.conv", "pw_proj.conv"} <= set(parts):
        grown = expansion("pw_exp.conv", parts["pw_exp.conv"][1])
        first, middle = kernel("dw_start.conv"), kernel("dw_mid.conv")
        out = parts["pw_proj.conv"][0]
        return f"uir_r1_a{first}_k{middle}_s{stride}_e{grown}_c{out}"
    if {"attn.query.proj", "attn.key.proj", "attn.output.proj"} <= set(parts):
        width, out = parts["attn.key.proj"][0], parts["attn.output.proj"][0]
        heads = parts["attn.query.proj"][0] // width
        down = kernel("attn.key.down_conv")
        # Where keys are not halved there is no kernel, and timm has no use for its size.
        keys = f"k{down}_h{heads}_v2" if down else f"k3_h{heads}"
        return f"mqa_r1_{keys}_s{stride}_d{width}_c{out}"
    raise CheckpointError(
        f"{where}: block {name} of the vision tower is missing or of no known kind "
        f"({', '.join(sorted(parts)) or 'no tensor'}): convert the towers again"
    )


def _shape(shapes: Shapes, name: str, rank: int, where: str) -> tuple[int, ...]:
    shape = shapes.get(name)
    if shape is None or len(shape) != rank:
        held = "none" if shape is None else f"one of shape {list(shape)}"
        raise CheckpointError(
            f"{where} must have a tensor of rank {rank} for {name}, and has {held}: convert the "
            "towers again"
        )
    return shape


def _positive(keys: Mapping[str, Any], key: str, where: str) -> int:
    value = keys.get(key)
    if not isinstance(value, int) or value < 1:
        raise CheckpointError(
            f"{where}: {key} is {value!r}, which is no positive whole number: convert the towers "
            "again"
        )
    return value
