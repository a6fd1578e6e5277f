"""The ops, in data-flow order. One op is one noun: its folder here, in csrc/, its test and its README row."""

from .expert_attention import expert_attention
from .expert_gate import expert_gate
from .feature_norm import CentredFeatures, centred_features, feature_norm, resamples_later
from .feature_resample import feature_resample
from .gated_combine import gated_combine
from .ragged_linear import ragged_linear
from .rope2d import rope2d, rope2d_table
from .swiglu_norm import swiglu_norm
from .token_downsample import StageWeights, token_downsample

__all__ = [
    "CentredFeatures",
    "StageWeights",
    "centred_features",
    "expert_attention",
    "expert_gate",
    "feature_norm",
    "feature_resample",
    "gated_combine",
    "ragged_linear",
    "resamples_later",
    "rope2d",
    "rope2d_table",
    "swiglu_norm",
    "token_downsample",
]
