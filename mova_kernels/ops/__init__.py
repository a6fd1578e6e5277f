"""The ops. One op is one noun: its folder here, in csrc/, its tests, its benchmark and its README row."""

from .expert_attention import expert_attention
from .expert_gate import expert_gate
from .feature_norm import feature_norm
from .feature_resample import feature_resample
from .gated_combine import gated_combine
from .ragged_linear import ragged_linear
from .rope2d import rope2d, rope2d_table
from .swiglu_norm import swiglu_norm
from .token_downsample import StageWeights, token_downsample

__all__ = [
    "StageWeights",
    "expert_attention",
    "expert_gate",
    "feature_norm",
    "feature_resample",
    "gated_combine",
    "ragged_linear",
    "rope2d",
    "rope2d_table",
    "swiglu_norm",
    "token_downsample",
]
