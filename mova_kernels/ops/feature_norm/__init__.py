from .op import CentredFeatures, centred_features, feature_norm, resamples_later

__all__ = ["CentredFeatures", "centred_features", "feature_norm", "resamples_later"]
