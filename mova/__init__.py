"""mova: the model around mova_kernels; so far its vision experts as data."""

from . import experts
from .experts import VisionExpert

__all__ = ["VisionExpert", "experts"]
