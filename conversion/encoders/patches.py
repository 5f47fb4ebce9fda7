"""What torch's tracing cannot follow, replaced while optimum's exporter runs.

Tracing records one run: a branch on a tensor's size is recorded as it went, and a size that must be
a Python number is not one. Sources: transformers 4.57 `Gemma3nAudioAttention`, timm's
`MobileNetV5MultiScaleFusionAdapter` and `get_same_padding`.
"""

from __future__ import annotations

import torch
from optimum.exporters.onnx.model_patcher import PatchingSpec
from timm.layers import padding
from timm.models.mobilenetv5 import MobileNetV5MultiScaleFusionAdapter
from torch.nn import functional
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nAudioAttention

_get_same_padding = padding.get_same_padding


def _convert_to_block(self: Gemma3nAudioAttention, x: torch.Tensor) -> torch.Tensor:
    """[B, T, ...] -> [B, blocks, chunk, ...], padded always, if by nothing."""
    size, (batch, time) = self.chunk_size, x.shape[:2]
    blocks = (time + size - 1) // size
    x = self._pad_dim1(x, 0, blocks * size - time)
    return x.reshape(batch, blocks, size, *x.shape[2:])


def _extract_block_context(self: Gemma3nAudioAttention, x: torch.Tensor) -> torch.Tensor:
    """[B, T, ...] -> [B, blocks, context, ...]: the frames that each block of queries may see."""
    size, context, (batch, time) = self.chunk_size, self.context_size, x.shape[:2]
    blocks = (time + size - 1) // size
    x = self._pad_dim1(x, self.max_past_horizon, self.max_future_horizon + size - 1)
    rows = torch.arange(blocks).unsqueeze(1) * size + torch.arange(context)
    return x.index_select(1, rows.reshape(-1)).reshape(batch, blocks, context, *x.shape[2:])


def _fuse_scales(
    self: MobileNetV5MultiScaleFusionAdapter, inputs: list[torch.Tensor]
) -> torch.Tensor:
    """Fuse feature maps [B, C, H, W] at the first one's size and pool them to the output's."""
    height, width = (int(n) for n in inputs[0].shape[-2:])
    resized = [
        functional.interpolate(x, size=(height, width), mode=self.interpolation_mode)
        if int(x.shape[-2]) < height or int(x.shape[-1]) < width
        else x
        for x in inputs
    ]
    x = self.ffn(torch.cat(resized, dim=1))
    rows, columns = self.output_resolution
    if height % rows or width % columns:
        x = functional.interpolate(x, size=(rows, columns), mode="bilinear")
    elif (height, width) != (rows, columns):
        x = functional.avg_pool2d(x, (height // rows, width // columns))
    fused: torch.Tensor = self.norm(x)
    return fused


def _static_same_padding(x: int, kernel_size: int, stride: int, dilation: int) -> int:
    return int(_get_same_padding(int(x), kernel_size, stride, dilation))


VISION_PATCHES = [
    PatchingSpec(MobileNetV5MultiScaleFusionAdapter, "forward", _fuse_scales),
    PatchingSpec(padding, "get_same_padding", _static_same_padding),
]
AUDIO_PATCHES = [
    PatchingSpec(Gemma3nAudioAttention, "_convert_to_block", _convert_to_block),
    PatchingSpec(Gemma3nAudioAttention, "_extract_block_context", _extract_block_context),
]
