"""Encoders -> ONNX graphs with placeholders for large matrices, by optimum's exporter.

Source: optimum.exporters.onnx (optimum-onnx 0.1), which traces with torch.onnx.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import onnx
import torch
from optimum.exporters.onnx import OnnxConfig
from optimum.exporters.onnx.convert import export_pytorch
from optimum.utils import NormalizedConfig
from torch.jit._trace import TracerWarning

from nestd.conversion.encoders.patches import AUDIO_PATCHES, VISION_PATCHES
from nestd.conversion.encoders.towers import AudioEncoder, VisionEncoder

# The newest that torch's tracing exporter writes; it has Gelu as one operator.
OPSET = 20
# Enough for several blocks of queries, and no multiple of anything.
EXAMPLE_FRAMES = 397

Axes = dict[str, dict[int, str]]


class VisionOnnxConfig(OnnxConfig):  # type: ignore[misc]
    """Pictures of one size: height and width are numbers in the graph, the batch is not."""

    NORMALIZED_CONFIG_CLASS = NormalizedConfig
    PATCHING_SPECS = VISION_PATCHES

    def __init__(self, config: Any, size: int) -> None:  # noqa: ANN401  (any PretrainedConfig)
        super().__init__(config, task="feature-extraction")
        self.size = size

    @property
    def inputs(self) -> Axes:
        """The dynamic axes of the inputs."""
        return {"pixel_values": {0: "batch"}}

    @property
    def outputs(self) -> Axes:
        """The dynamic axes of the outputs."""
        return {"image_features": {0: "batch"}}

    def generate_dummy_inputs(self, framework: str = "pt", **_: Any) -> dict[str, torch.Tensor]:  # noqa: ANN401
        """Return the inputs to trace with."""
        assert framework == "pt"
        return {"pixel_values": torch.rand(1, 3, self.size, self.size)}


class AudioOnnxConfig(OnnxConfig):  # type: ignore[misc]
    """Mel frames of any number."""

    NORMALIZED_CONFIG_CLASS = NormalizedConfig
    PATCHING_SPECS = AUDIO_PATCHES

    @property
    def inputs(self) -> Axes:
        """The dynamic axes of the inputs."""
        axes = {0: "batch", 1: "frames"}
        return {"input_features": axes, "input_features_mask": axes}

    @property
    def outputs(self) -> Axes:
        """The dynamic axes of the outputs."""
        axes = {0: "batch", 1: "tokens"}
        return {"audio_features": axes, "audio_features_mask": axes}

    def generate_dummy_inputs(self, framework: str = "pt", **_: Any) -> dict[str, torch.Tensor]:  # noqa: ANN401
        """Return the inputs to trace with."""
        assert framework == "pt"
        bands = self._config.audio_config.input_feat_size
        mask = torch.ones(2, EXAMPLE_FRAMES, dtype=torch.bool)
        mask[1, EXAMPLE_FRAMES // 2 :] = False
        return {
            "input_features": torch.randn(2, EXAMPLE_FRAMES, bands),
            "input_features_mask": mask,
        }


def export_vision(encoder: VisionEncoder, size: int, folder: Path) -> onnx.ModelProto:
    """Return the graph for pictures of `size` pixels; `folder` takes the exporter's files."""
    return _export(encoder, VisionOnnxConfig(encoder.config, size), folder)


def export_audio(encoder: AudioEncoder, folder: Path) -> onnx.ModelProto:
    """Return the graph for mel frames; `folder` takes the exporter's files."""
    return _export(encoder, AudioOnnxConfig(encoder.config, task="feature-extraction"), folder)


def _export(
    encoder: VisionEncoder | AudioEncoder, config: OnnxConfig, folder: Path
) -> onnx.ModelProto:
    path = folder / "exported.onnx"
    with warnings.catch_warnings():
        # Shape checks that hold for every input; what cannot be folded; the exporter being old.
        warnings.simplefilter("ignore", TracerWarning)
        warnings.filterwarnings("ignore", "Constant folding", UserWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        export_pytorch(encoder, config, OPSET, path)
    return onnx.load(path)
