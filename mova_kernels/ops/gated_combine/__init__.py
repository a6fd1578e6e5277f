from .op import gated_combine as gated_combine

__all__ = ["gated_combine"]
