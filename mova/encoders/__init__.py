"""The vision encoders behind one interface: backbones of transformers, and two that this package adds."""

from .encoder import VisionEncoder

__all__ = ["VisionEncoder"]
