"""The definition of feature_norm, in pure torch, behind the resampling, which is feature_resample's."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..._gradients import layer_norm


def feature_norm(resampled: Sequence[Tensor], eps: float) -> tuple[Tensor, ...]:
    """(M_e, H*W, C_e) each -> the same, every token normalised; statistics in fp32, or in fp64 for fp64 inputs."""
    return tuple(layer_norm(y, eps=eps).to(y.dtype).contiguous() for y in resampled)
