"""The vision encoders: backbones of transformers and two of our own behind one interface, and their checkpoints."""

from .encoder import VisionEncoder

__all__ = ["VisionEncoder"]
