from .op import feature_norm as feature_norm

__all__ = ["feature_norm"]
