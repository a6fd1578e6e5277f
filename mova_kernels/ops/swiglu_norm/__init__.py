from .op import swiglu_norm as swiglu_norm

__all__ = ["swiglu_norm"]
