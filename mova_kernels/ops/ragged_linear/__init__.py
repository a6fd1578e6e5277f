from .op import ragged_linear as ragged_linear

__all__ = ["ragged_linear"]
