from .op import feature_resample as feature_resample

__all__ = ["feature_resample"]
