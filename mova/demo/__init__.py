"""A demo without weights or files: drawn pictures, a small model with random weights, and a run over both."""

from .pictures import Picture
from .run import ANSWERS, run
from .small_model import small_config, small_model

__all__ = ["ANSWERS", "Picture", "run", "small_config", "small_model"]
