"""The definition of token_downsample, in pure torch, on channels-last tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from ..._gradients import layer_norm


class StageWeights(NamedTuple):
    """The parameters of one bottleneck stage with C channels and S squeezed channels, shaped as in the checkpoint."""

    conv1: Tensor  # (C, C, 1, 1)
    norm1: tuple[Tensor, Tensor]  # weight and bias, (C,)
    conv2: Tensor  # (C, 1, 3, 3), depthwise
    norm2: tuple[Tensor, Tensor]
    squeeze: tuple[Tensor, Tensor]  # (S, C, 1, 1), (S,)
    excite: tuple[Tensor, Tensor]  # (C, S, 1, 1), (C,)
    conv3: Tensor  # (C, C, 1, 1)
    norm3: tuple[Tensor, Tensor]

    def flat(self) -> list[Tensor]:
        """The 13 tensors, in the order of the fields."""
        return [t for field in self for t in ((field,) if isinstance(field, Tensor) else field)]

    @classmethod
    def of(cls, flat: Sequence[Tensor]) -> StageWeights:
        """The inverse of :meth:`flat`."""
        conv1, g1, b1, conv2, g2, b2, squeeze, squeeze_b, excite, excite_b, conv3, g3, b3 = flat
        return cls(conv1, (g1, b1), conv2, (g2, b2), (squeeze, squeeze_b), (excite, excite_b), conv3, (g3, b3))


def token_downsample(x: Tensor, resolution: int, stages: tuple[StageWeights, StageWeights], eps: float) -> Tensor:
    """(B, R*R, C) -> (B, (R // 2)**2, C): stage, average pooling, stage."""
    x = one_stage(x, resolution, stages[0], eps, pool=True)
    return one_stage(x, resolution // 2, stages[1], eps, pool=False)


def one_stage(x: Tensor, resolution: int, w: StageWeights, eps: float, pool: bool) -> Tensor:
    """(B, R*R, C) -> (B, R*R, C), or (B, (R // 2)**2, C) with the pooling behind the stage."""
    y = _stage(x, resolution, w, eps)
    return _tokens(F.adaptive_avg_pool2d(_grid(y, resolution), resolution // 2)) if pool else y


def _stage(x: Tensor, resolution: int, w: StageWeights, eps: float) -> Tensor:
    y = F.silu(_norm(F.linear(x, w.conv1.flatten(1)), w.norm1, eps))
    y = _tokens(F.conv2d(_grid(y, resolution), w.conv2, padding=1, groups=y.shape[2]))
    y = F.silu(_norm(y, w.norm2, eps))
    squeezed = F.silu(F.linear(y.mean(1), w.squeeze[0].flatten(1), w.squeeze[1]))
    y = y * F.linear(squeezed, w.excite[0].flatten(1), w.excite[1]).sigmoid()[:, None]
    return x + _norm(F.linear(y, w.conv3.flatten(1)), w.norm3, eps)


def _norm(x: Tensor, affine: tuple[Tensor, Tensor], eps: float) -> Tensor:
    return layer_norm(x, affine[0].to(x.dtype), affine[1].to(x.dtype), eps)


def _grid(x: Tensor, resolution: int) -> Tensor:
    return x.unflatten(1, (resolution, resolution)).permute(0, 3, 1, 2)


def _tokens(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).flatten(1, 2)
