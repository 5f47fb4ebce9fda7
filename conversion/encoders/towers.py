"""Torch modules of one tower and its projector each, without the text model.

The modules carry the names of `Gemma3nModel`, so a weight's name is its name in the checkpoint; and
they run `Gemma3nModel`'s own methods. Small weights are loaded, large ones are left out
(`linears`): a module of 660 million parameters takes a few megabytes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from timm.layers.norm import RmsNorm2d
from timm.models._efficientnet_builder import decode_arch_def
from torch import nn
from transformers import (
    Gemma3nAudioConfig,
    Gemma3nAudioEncoder,
    Gemma3nConfig,
    Gemma3nTextConfig,
    Gemma3nVisionConfig,
    TimmWrapperModel,
)
from transformers.integrations.accelerate import init_empty_weights
from transformers.models.gemma3n.modeling_gemma3n import (
    Gemma3nAudioRelativePositionEmbedding,
    Gemma3nModel,
    Gemma3nMultimodalEmbedder,
    Gemma3nRMSNorm,
)

from nestd.bundle.errors import CheckpointError
from nestd.conversion.checkpoint import Checkpoint
from nestd.conversion.encoders.linears import NamedRMSNorm, StreamedLinear

VISION_ARCHITECTURE = "mobilenetv5_300m_enc"
# What config.json may change about it; timm takes many more, among them files to read.
MODEL_ARGS = ("block_args", "stem_size", "msfa_output_resolution")
MEL_BANDS = 128
# Converted in float32, whatever the checkpoint's.
DTYPES = ("dtype", "torch_dtype")
# What timm and transformers raise at a config that describes no network.
BUILD_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


class VisionEncoder(nn.Module):
    """MobileNet-V5, its scale and `embed_vision`."""

    def __init__(self, config: Gemma3nConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_tower = TimmWrapperModel(config.vision_config)  # type: ignore[arg-type]
        self.embed_vision = Gemma3nMultimodalEmbedder(config.vision_config, config.text_config)

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """float32 [B, 3, size, size] in 0..1 -> image_features [B, count, hidden_size]."""
        return {"image_features": Gemma3nModel.get_image_features(self, pixel_values)}  # type: ignore[arg-type]


class AudioEncoder(nn.Module):
    """The conformer and `embed_audio`."""

    def __init__(self, config: Gemma3nConfig) -> None:
        super().__init__()
        self.config = config
        self.audio_tower = Gemma3nAudioEncoder(config.audio_config)
        self.embed_audio = Gemma3nMultimodalEmbedder(config.audio_config, config.text_config)

    def forward(
        self, input_features: torch.Tensor, input_features_mask: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Mel frames [B, frames, 128] -> audio_features [B, tokens, hidden_size] and their mask.

        In both masks True is sound; inside the tower True is padding.
        """
        padding = torch.logical_not(input_features_mask)
        features, padding = Gemma3nModel.get_audio_features(self, input_features, padding)  # type: ignore[arg-type]
        return {"audio_features": features, "audio_features_mask": torch.logical_not(padding)}


Encoder = TypeVar("Encoder", VisionEncoder, AudioEncoder)


def vision_encoder(checkpoint: Checkpoint) -> VisionEncoder:
    """Return the vision encoder with its small weights; CheckpointError where one does not fit."""
    values = checkpoint.config["vision_config"]
    vision = _config(Gemma3nVisionConfig, values, model_args=_model_args(values))
    if vision.architecture != VISION_ARCHITECTURE:
        raise CheckpointError(
            f"config.json: vision_config.architecture is {vision.architecture!r}, nestd converts "
            f"{VISION_ARCHITECTURE!r} only"
        )
    count = checkpoint.config["vision_soft_tokens_per_image"]
    config = Gemma3nConfig(
        text_config=_text_config(checkpoint),
        vision_config=vision,
        vision_soft_tokens_per_image=count,
    )
    encoder = _build(VisionEncoder, config, "vision_config")
    fusion = encoder.vision_tower.timm_model.msfa
    rows, columns = fusion.output_resolution
    if (rows * columns, fusion.out_channels) != (count, vision.hidden_size):
        raise CheckpointError(
            f"config.json: the vision tower makes {rows} x {columns} soft tokens of "
            f"{fusion.out_channels} numbers, but vision_soft_tokens_per_image is {count} and "
            f"vision_config.hidden_size {vision.hidden_size}"
        )
    return _load(encoder, checkpoint)


def audio_encoder(checkpoint: Checkpoint) -> AudioEncoder:
    """Return the audio encoder with its small weights; CheckpointError where one does not fit."""
    audio = _config(Gemma3nAudioConfig, checkpoint.config["audio_config"])
    if audio.input_feat_size != MEL_BANDS:
        raise CheckpointError(
            f"config.json: audio_config.input_feat_size is {audio.input_feat_size}, nestd's mel "
            f"frames have {MEL_BANDS} bands"
        )
    config = Gemma3nConfig(text_config=_text_config(checkpoint), audio_config=audio)
    return _load(_build(AudioEncoder, config, "audio_config"), checkpoint)


def decode_model_args(model_args: Mapping[str, Any]) -> dict[str, Any]:
    """Return timm's arguments for the tower, from config.json's.

    `block_args` are strings there, `[["er_r1_k3_s2_e4_c32"], ...]`; timm wants them decoded, and
    changes them while it builds, so each tower needs its own copy.
    """
    decoded = copy.deepcopy(dict(model_args))
    if "block_args" in decoded:
        decoded["block_args"] = decode_arch_def(decoded["block_args"])  # type: ignore[no-untyped-call]
    return decoded


def _model_args(values: Mapping[str, Any]) -> dict[str, Any] | None:
    model_args = values.get("model_args")
    if not model_args:
        return None
    unknown = set(model_args) - set(MODEL_ARGS)
    if unknown:
        raise CheckpointError(
            f"config.json: vision_config.model_args has {', '.join(sorted(unknown))}, nestd "
            f"knows {', '.join(MODEL_ARGS)}"
        )
    try:
        return decode_model_args(model_args)
    except BUILD_ERRORS as error:
        raise CheckpointError(
            "config.json: vision_config.model_args.block_args must be lists of timm's block "
            f"strings such as 'uir_r1_a3_k5_s2_e4_c64' ({error!r})"
        ) from error


def _config(kind: type[Any], values: Mapping[str, Any], **changes: Any) -> Any:  # noqa: ANN401
    known = {key: value for key, value in values.items() if key not in (*DTYPES, "model_type")}
    return kind(**{**known, **changes})


def _text_config(checkpoint: Checkpoint) -> Gemma3nTextConfig:
    return Gemma3nTextConfig(hidden_size=checkpoint.config["text_config"]["hidden_size"])


def _build(kind: type[Encoder], config: Gemma3nConfig, section: str) -> Encoder:
    try:
        with init_empty_weights():
            return kind(config).eval()
    except BUILD_ERRORS as error:
        raise CheckpointError(
            f"config.json: {section} describes no tower that can be built ({error!r})"
        ) from error


def _load(encoder: Encoder, checkpoint: Checkpoint) -> Encoder:
    """Check every weight's shape, leave large ones in the checkpoint, load the others."""
    for name, weight in encoder.state_dict().items():
        checkpoint.expect(name, tuple(weight.shape))
    _fold_positions(encoder, checkpoint)
    for name, module in list(encoder.named_modules()):
        replacement = _replacement(module, name)
        if replacement is not None:
            encoder.set_submodule(name, replacement)
    small = {
        name: torch.from_numpy(checkpoint.tensor(name, tuple(weight.shape)))
        for name, weight in encoder.state_dict().items()
        if weight.is_meta
    }
    encoder.load_state_dict(small, strict=False, assign=True)
    return encoder.requires_grad_(False)


def _replacement(module: nn.Module, name: str) -> nn.Module | None:
    """Return what stands in for a large matrix or a norm of `encoder`, None to keep the module."""
    if isinstance(module, nn.Linear) or _is_pointwise(module):
        shape = tuple(module.weight.shape)  # type: ignore[arg-type]
        return StreamedLinear(f"{name}.weight", shape, module.bias)
    if isinstance(module, Gemma3nRMSNorm):
        return NamedRMSNorm(module.weight if module.with_scale else None, module.eps)
    if isinstance(module, RmsNorm2d):
        activation = getattr(module, "act", None)
        return NamedRMSNorm(module.weight, module.eps, norm2d=True, activation=activation)
    return None


class _Folded(nn.Module):
    """A projection of a constant, worked out."""

    def __init__(self, value: torch.Tensor) -> None:
        super().__init__()
        self.value: torch.Tensor
        self.register_buffer("value", value, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        del x
        return self.value


def _fold_positions(encoder: nn.Module, checkpoint: Checkpoint) -> None:
    """Replace each projection of the (constant) position signal by its result."""
    for name, module in encoder.named_modules():
        if isinstance(module, Gemma3nAudioRelativePositionEmbedding):
            shape = (module.num_heads * module.head_dim, module.channels)
            weight = torch.from_numpy(checkpoint.tensor(f"{name}.pos_proj.weight", shape))
            positions = torch.arange(module.max_backward, -module.max_forward - 1, -1)
            signal = module._get_timing_signal_1d_pos(positions.unsqueeze(0), torch.float32)
            module.set_submodule("pos_proj", _Folded(signal @ weight.T))


def _is_pointwise(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and module.stride == (1, 1)
        and module.groups == 1
    )
