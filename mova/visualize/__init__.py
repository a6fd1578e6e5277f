"""Figures of what a MoVA model chose and where it looked. They need matplotlib, and no display."""

from .attention import attention_figure
from .routing import routing_figure

__all__ = ["attention_figure", "routing_figure"]
