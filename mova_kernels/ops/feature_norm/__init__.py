import torch.nn.functional as F

from ..feature_resample import feature_resample


def feature_norm(features, in_sizes, out_size, rows, eps=1e-5, *, backend=None):
    y = [feature_resample(f, s, out_size, r) for f, s, r in zip(features, in_sizes, rows, strict=True)]
    return tuple(F.layer_norm(t, t.shape[-1:], eps=eps) for t in y)
