from .op import token_downsample as token_downsample
from .reference import StageWeights as StageWeights

__all__ = ["StageWeights", "token_downsample"]
