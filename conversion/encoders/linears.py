"""Large matrices and norms as placeholder nodes of the exported graph.

A linear, or a 1x1 convolution, becomes a node `nestd::Linear` with the name of its weight in the
checkpoint; an RMS norm becomes `nestd::RMSNorm`. So the exporter sees no large weight, memory stays
small, and `placement` puts in the operators that the decoder uses. Both act on the last axis:
convolutions turn their input to channels last and back, pairs of which ONNX Runtime cancels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from nestd.conversion.encoders.placement import DOMAIN


class _LinearNode(torch.autograd.Function):
    @staticmethod
    def symbolic(graph: Any, x: torch.Value, weight: str, features: int) -> torch.Value:  # noqa: ANN401
        sizes = x.type().varyingSizes()  # type: ignore[attr-defined]
        result: torch.Value = graph.op(f"{DOMAIN}::Linear", x, weight_s=weight)
        result.setType(x.type().with_sizes([*sizes[:-1], features]))
        return result

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: str, features: int) -> torch.Tensor:  # noqa: ANN401
        del ctx, weight  # the exporter wants shapes, not values
        return x.new_zeros((*x.shape[:-1], features))


class _RMSNormNode(torch.autograd.Function):
    @staticmethod
    def symbolic(
        graph: Any,  # noqa: ANN401
        x: torch.Value,
        scale: torch.Value,
        epsilon: float,
    ) -> torch.Value:
        result: torch.Value = graph.op(f"{DOMAIN}::RMSNorm", x, scale, epsilon_f=epsilon)
        result.setType(x.type())
        return result

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: torch.Tensor, epsilon: float) -> torch.Tensor:  # noqa: ANN401
        del ctx, scale, epsilon
        return x.clone()


def channels_last(x: torch.Tensor) -> torch.Tensor:
    """[B, C, H, W] -> [B, H, W, C]."""
    return x.permute(0, 2, 3, 1)


def channels_first(x: torch.Tensor) -> torch.Tensor:
    """[B, H, W, C] -> [B, C, H, W]."""
    return x.permute(0, 3, 1, 2)


class StreamedLinear(nn.Module):
    """A linear, or 1x1 convolution, whose weight stays in the checkpoint.

    Attributes:
        weight_name: of the weight in the checkpoint.
        weight_shape: [out, in], or [out, in, 1, 1] of a convolution.
    """

    def __init__(self, weight_name: str, weight_shape: tuple[int, ...], bias: Any) -> None:  # noqa: ANN401
        super().__init__()
        self.weight_name = weight_name
        self.weight_shape = weight_shape
        self.bias: nn.Parameter | None
        self.register_parameter("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply; a convolution's input is [B, C, H, W], a linear's has its features last."""
        convolution = len(self.weight_shape) == 4
        if convolution:
            x = channels_last(x)
        result: torch.Tensor = _LinearNode.apply(x, self.weight_name, self.weight_shape[0])
        if self.bias is not None:
            result = result + self.bias
        return channels_first(result) if convolution else result


class NamedRMSNorm(nn.Module):
    """An RMS norm of one node, over channels [B, C, H, W] where `norm2d`, else the last axis.

    Attributes:
        activation: what timm fuses into some of its norms.
    """

    def __init__(
        self,
        weight: Any,  # noqa: ANN401  (a Parameter, or None for ones)
        epsilon: float,
        norm2d: bool = False,
        activation: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.activation = activation or nn.Identity()
        self.weight: nn.Parameter | None
        self.register_parameter("weight", weight)
        self.epsilon = epsilon
        self.norm2d = norm2d

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise, then activate."""
        if self.norm2d:
            x = channels_last(x)
        scale = torch.ones(int(x.shape[-1])) if self.weight is None else self.weight
        result: torch.Tensor = _RMSNormNode.apply(x, scale, self.epsilon)
        result = self.activation(result)
        return channels_first(result) if self.norm2d else result
