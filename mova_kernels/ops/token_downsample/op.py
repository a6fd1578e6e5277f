"""token_downsample: the adapter's tail, which halves the side of the token grid."""

from __future__ import annotations

from torch import Tensor

from ... import backends
from ..._checks import check, check_floats, check_tensor
from . import reference
from .reference import StageWeights

backends.register("token_downsample")


def token_downsample(
    x: Tensor,
    resolution: int,
    stages: tuple[StageWeights, StageWeights],
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> Tensor:
    """Bottleneck stage, average pooling to R // 2, bottleneck stage.

    A stage is x + LN(conv3(SE(SiLU(LN(conv2(SiLU(LN(conv1 x)))))))) with 1x1, depthwise 3x3 and 1x1 convolutions and
    squeeze-excite SE; an odd R pools windows of unequal size, as torch's adaptive average pooling does.

    Args:
        x: (B, R*R, C) row-major tokens, float.
        resolution: R, at least 2.
        stages: the parameters of the two stages.
        eps: added to the variances.
        backend: see :mod:`mova_kernels.backends`.

    Returns:
        (B, (R // 2)**2, C) in the dtype of ``x``. Source: RegNet's bottleneck (arXiv 2003.13678) as MoVA uses it.

    Raises:
        TypeError, ValueError: an argument of the wrong type or shape.
    """
    check(resolution >= 2, "resolution", "must be at least 2", resolution)
    check_floats("x", x, ("B", resolution * resolution, "C"))
    check(len(stages) == 2, "stages", "must be two", len(stages))
    for i, stage in enumerate(stages):
        _check_stage(f"stages[{i}]", stage, x.shape[2])
    backends.choose("token_downsample", backend, x.device, x.dtype)
    return reference.token_downsample(x, resolution, stages, eps)


def _check_stage(name: str, stage: StageWeights, width: int) -> None:
    squeezed = len(stage.squeeze[0])
    shapes = {
        "conv1": (stage.conv1, (width, width, 1, 1)),
        "conv2": (stage.conv2, (width, 1, 3, 3)),
        "conv3": (stage.conv3, (width, width, 1, 1)),
        "squeeze[0]": (stage.squeeze[0], (squeezed, width, 1, 1)),
        "squeeze[1]": (stage.squeeze[1], (squeezed,)),
        "excite[0]": (stage.excite[0], (width, squeezed, 1, 1)),
        "excite[1]": (stage.excite[1], (width,)),
    }
    for norm in ("norm1", "norm2", "norm3"):
        for i, affine in enumerate(getattr(stage, norm)):
            shapes[f"{norm}[{i}]"] = (affine, (width,))
    for field, (tensor, shape) in shapes.items():
        check_tensor(f"{name}.{field}", tensor, shape)
