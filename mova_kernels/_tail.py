"""The parts of the adapter's tail: RegNet's bottleneck, as timm names it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from . import ops
from ._readable import normalised, reads

EPS = 1e-5  # of every LayerNorm, also where the official code asks for 1e-6 and timm replaces its norm class


@reads()
class RegStage(nn.Module):
    """One RegNet bottleneck, under the name that timm gives it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.b1 = Bottleneck(width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        return self.b1(x)


@reads()
class Bottleneck(nn.Module):
    """x + LN(1x1(SE(SiLU(LN(depthwise 3x3(SiLU(LN(1x1 x))))))))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(nn.Conv2d(width, width, 1, bias=False))
        self.conv2 = ConvNorm(nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False))
        self.se = SqueezeExcite(width)
        self.conv3 = ConvNorm(nn.Conv2d(width, width, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        return x + self.conv3(self.se(F.silu(self.conv2(F.silu(self.conv1(x))))))

    def weights(self) -> ops.StageWeights:
        """The parameters as token_downsample takes them."""
        norms = affine(c.bn for c in (self.conv1, self.conv2, self.conv3))
        squeeze, excite = affine((self.se.fc1, self.se.fc2))
        return ops.StageWeights(
            conv1=self.conv1.conv.weight, norm1=norms[0], conv2=self.conv2.conv.weight, norm2=norms[1],
            squeeze=squeeze, excite=excite, conv3=self.conv3.conv.weight, norm3=norms[2],
        )  # fmt: skip


@reads()
class ConvNorm(nn.Module):
    """A convolution and a LayerNorm over its channels."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        self.bn = nn.LayerNorm(conv.out_channels, EPS)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C', h, w)."""
        return normalised(self.bn, self.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@reads()
class SqueezeExcite(nn.Module):
    """x * sigmoid(fc2(SiLU(fc1(mean of x))))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        squeezed = round(width * 0.25)
        self.fc1 = nn.Conv2d(width, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        return x * self.fc2(F.silu(self.fc1(x.mean((2, 3), keepdim=True)))).sigmoid()


def affine(modules: Iterable[Any]) -> list[tuple[Tensor, Tensor]]:
    """Weight and bias of each."""
    return [(module.weight, module.bias) for module in modules]
