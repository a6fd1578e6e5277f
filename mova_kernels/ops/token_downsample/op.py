"""token_downsample: the adapter's tail, which halves the side of the token grid."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _compiled, _flops, _triton, backends
from ..._checks import check, check_device, check_floats, check_like
from ..._gradients import need_reference, of_reference
from ..._library import define
from ..._plain import autocast
from . import reference
from .reference import StageWeights

# Triton keeps the channels of a token in the registers of one program, C++ in a buffer.
LIMITS = {"channels": {"triton": range(2049), "cpu": range(8193)}}

backends.register("token_downsample", _triton.BACKEND, _compiled.BACKEND, limits=LIMITS)


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
    squeeze-excite SE; an odd R pools windows of 3x3 that overlap, as torch's adaptive average pooling does.

    Args:
        x: (B, R*R, C) row-major tokens, float.
        resolution: R, at least 2.
        stages: the parameters of the two stages.
        eps: added to the variances.
        backend: see :mod:`mova_kernels.backends`. ``triton`` takes at most 2048 channels, ``cpu`` 8192.

    Returns:
        (B, (R // 2)**2, C) in the dtype of ``x``. Source: RegNet's bottleneck (arXiv 2003.13678) as MoVA uses it.

    Raises:
        TypeError, ValueError: an argument of the wrong type or shape.
        backends.BackendError: the requested backend cannot run here, or not with so many channels.
    """
    check(resolution >= 2, "resolution", "must be at least 2", resolution)
    check_floats("x", x, ("B", resolution * resolution, "C"))
    check(len(stages) == 2, "stages", "must be two", len(stages))
    for i, stage in enumerate(stages):
        _check_stage(f"stages[{i}]", stage, x)
    products = torch.get_autocast_dtype(x.device.type) if autocast(x.device.type) else x.dtype
    tensors = [x, *(t for stage in stages for t in stage.flat())]
    backend = backends.choose("token_downsample", backend, x.device, x.dtype, _sizes(x), tensors, _unfit(products))
    if backend == "reference":
        return reference.token_downsample(x, resolution, stages, eps)
    for stage, pool in zip(stages, (True, False), strict=True):
        weights = _as_autocast_asks(stage, x.device.type).flat()
        if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *weights)):
            x = _Stage.apply(x, *weights, resolution, eps, pool, backend)[0]
        else:
            x = _fwd(x, weights, resolution, eps, pool, backend)[0]
        resolution //= 2
    return x


def _as_autocast_asks(stage: StageWeights, device: str) -> StageWeights:
    """The stage with the operands of its matrix products in autocast's dtype, to which torch itself would cast them."""
    if not autocast(device):
        return stage
    dtype = torch.get_autocast_dtype(device)
    (squeeze, squeeze_bias), (excite, excite_bias) = stage.squeeze, stage.excite
    return stage._replace(
        conv1=stage.conv1.to(dtype), conv3=stage.conv3.to(dtype),
        squeeze=(squeeze.to(dtype), squeeze_bias.to(dtype)), excite=(excite.to(dtype), excite_bias.to(dtype)),
    )  # fmt: skip


def _check_stage(name: str, stage: StageWeights, x: Tensor) -> None:
    width = x.shape[2]
    check_floats(f"{name}.squeeze[0]", stage.squeeze[0], ("S", width, 1, 1))
    squeezed = stage.squeeze[0].shape[0]
    convolutions = {
        "conv1": (stage.conv1, (width, width, 1, 1)),
        "conv2": (stage.conv2, (width, 1, 3, 3)),
        "conv3": (stage.conv3, (width, width, 1, 1)),
        "squeeze[0]": (stage.squeeze[0], (squeezed, width, 1, 1)),
        "squeeze[1]": (stage.squeeze[1], (squeezed,)),
        "excite[0]": (stage.excite[0], (width, squeezed, 1, 1)),
        "excite[1]": (stage.excite[1], (width,)),
    }
    for field, (tensor, shape) in convolutions.items():
        check_floats(f"{name}.{field}", tensor, shape)
        check_like(f"{name}.{field}", tensor, "x", x)
    for norm in ("norm1", "norm2", "norm3"):
        for i, affine in enumerate(getattr(stage, norm)):
            check_floats(f"{name}.{norm}[{i}]", affine, (width,))
            check_device(f"{name}.{norm}[{i}]", affine, "x", x)


def _sizes(x: Tensor) -> dict[str, int]:
    return {"channels": x.shape[2]}


def _unfit(products: torch.dtype) -> dict[str, str]:
    if products in (torch.float32, torch.bfloat16):
        return {}
    return {"cpu": f"its matrix products are in float32 and bfloat16, not in {products}"}


def _forward_kernel(x, weights, resolution, eps, pool, backend):
    return backends.implementation("token_downsample", backend, x, _sizes(x), _unfit(weights[0].dtype)).forward(
        x, resolution, StageWeights.of(weights), eps, pool
    )


def _backward_kernel(grad, x, weights, saved, resolution, eps, pool, of_weights, backend):
    w = StageWeights.of(weights)
    return backends.implementation("token_downsample", backend, x, _sizes(x), _unfit(weights[0].dtype)).backward(
        grad, x, w, saved, resolution, eps, pool, of_weights
    )


def _forward_fake(x, weights, resolution, eps, pool, backend):
    num_samples, length, channels = x.shape
    out = x.new_empty((num_samples, (resolution // 2) ** 2 if pool else length, channels))
    w = StageWeights.of(weights)
    a, c, d = (w.conv1.new_empty(x.shape) for _ in range(3))
    mean, squeezed, gate = (w.conv1.new_empty(num_samples, n) for n in (channels, w.squeeze[0].shape[0], channels))
    return out, a, c, d, mean, squeezed, gate


def _backward_fake(grad, x, weights, saved, resolution, eps, pool, of_weights, backend):
    return x.new_empty(x.shape), [w.new_empty(w.shape) for w in weights if of_weights]


def _forward_flop(x, weights, resolution, eps, pool, backend):
    w, (num_samples, length, _) = StageWeights.of(weights), x.shape
    per_token = (_flops.of_product(num_samples * length, product) for product in (w.conv1, w.conv2, w.conv3))
    return sum(per_token) + sum(_flops.of_product(num_samples, product) for product in (w.squeeze[0], w.excite[0]))


def _backward_flop(grad, x, weights, saved, resolution, eps, pool, of_weights, backend):
    return (1 + of_weights) * _forward_flop(x, weights, resolution, eps, pool, backend)


# One stage, with the pooling behind it if ``pool``. Returns the result, (B, R*R or (R // 2)**2, C) in x's dtype, and
# what the backward pass needs in the dtype of the convolutions: a = conv1 x, c = conv2 SiLU(LN a) and d = conv3 v with
# v = SE(SiLU(LN c)), the mean (B, C), the squeezed mean (B, S) before its SiLU, and the gate (B, C) before its sigmoid.
_fwd = define(
    "token_downsample_stage_fwd",
    "(Tensor x, Tensor[] weights, SymInt resolution, float eps, bool pool, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward_kernel,
    _forward_fake,
    _forward_flop,
)
# ``saved`` is the rest of _fwd's results. Returns the gradients of x and, if ``of_weights``, of ``weights``, in their
# dtypes; the same bits at every call.
_bwd = define(
    "token_downsample_stage_bwd",
    "(Tensor grad, Tensor x, Tensor[] weights, Tensor[] saved, SymInt resolution, float eps, bool pool,"
    " bool of_weights, str backend) -> (Tensor, Tensor[])",
    _backward_kernel,
    _backward_fake,
    _backward_flop,
)


class _Stage(torch.autograd.Function):
    """Takes x, 13 weights and the raw ops' other arguments; saves x, the weights and the forward op's other results."""

    @staticmethod
    def forward(x, *arguments):
        return _fwd(x, arguments[:13], *arguments[13:])

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*inputs[:14], *output[1:])
        ctx.arguments = inputs[14:]

    @staticmethod
    def backward(ctx, grad, *_):
        x, *tensors = ctx.saved_tensors
        *arguments, backend = ctx.arguments
        if need_reference([grad]):
            resolution, eps, pool = arguments
            weights = [w.to(x.dtype) for w in tensors[:13]]  # autocast made some of them narrow
            inputs, needed = (x, *weights), ctx.needs_input_grad[:14]

            def stage(x, *weights):
                return [reference.one_stage(x, resolution, StageWeights.of(weights), eps, pool)]

            return *of_reference(stage, inputs, needed, [grad]), None, None, None, None
        of_weights = any(ctx.needs_input_grad[1:])
        grad_x, grads = _bwd(grad, x, tensors[:13], tensors[13:], *arguments, of_weights, backend)
        return grad_x, *(grads or [None] * 13), None, None, None, None
