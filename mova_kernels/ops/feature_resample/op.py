"""feature_resample: bilinear resampling of expert tokens from their own grid to the base grid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import _compiled, backends
from ..._checks import check, check_device, check_floats, check_tensor
from ..._gradients import need_reference, of_reference
from ..._library import define
from ..._plain import only_reference
from . import cpu_impl, cuda_impl, reference

_FORWARD = {
    "reference": reference.feature_resample,
    "cpu": cpu_impl.forward,
    "cuda": cuda_impl.forward,
}
_BACKWARD = {
    "reference": reference.feature_resample_backward,
    "cpu": cpu_impl.backward,
    "cuda": cuda_impl.backward,
}


def _cuda_declines(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return f"it runs on cuda tensors, not on {device.type}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it takes float32, bfloat16 and float16, not {dtype}"
    return _compiled.cuda_reason()


backends.register(
    "feature_resample",
    backends.Backend("cuda", _cuda_declines, _compiled.never_run),
    backends.Backend("cpu", _compiled.cpu_declines),
)


def feature_resample(
    x: Tensor,
    in_size: Sequence[int],
    out_size: Sequence[int],
    rows: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Resample tokens bilinearly, as ``F.interpolate(mode="bilinear", align_corners=False, antialias=False)`` does.

    Output token (i, j) is the sum of four input tokens with weights (1 - u, u) x (1 - v, v), where
    u = max((i + 1/2) h/H - 1/2, 0) mod 1, and v likewise from j; indices are clamped at the border. The weights and the
    sum are fp32 (fp64 for fp64 tokens), rounded once to the dtype of ``x``. A tap of weight 0 is still read: 0 * NaN is
    NaN, as in torch. Source: the alignment of expert features in MoVA (arXiv 2404.13046).

    Args:
        x: (R, h*w, C) row-major tokens, float; any strides.
        in_size: (h, w).
        out_size: (H, W).
        rows: (M,) int64 on x's device: the row of ``x`` for each row of the result; a negative one gives zeros and
            reads nothing. None: all rows, M = R.
        backend: see :mod:`mova_kernels.backends`.

    Returns:
        (M, H*W, C) in the dtype of ``x``, contiguous. ``x`` itself if the sizes are equal and ``rows`` is None.

    Raises:
        TypeError, ValueError: an argument of the wrong type or shape.
        RuntimeError: a value in ``rows`` is not below R (on a GPU: a device-side assertion).
        backends.BackendError: the requested backend cannot run here.
    """
    for name, size in (("in_size", in_size), ("out_size", out_size)):
        check(len(size) == 2 and min(size) >= 1, name, "must be two positive integers", tuple(size))
    check_floats("x", x, ("R", in_size[0] * in_size[1], "C"))
    if rows is not None:
        check_tensor("rows", rows, ("M",))
        check(rows.dtype == torch.int64, "rows", "must be int64", rows.dtype, TypeError)
        check_device("rows", rows, "x", x)
    elif tuple(in_size) == tuple(out_size):
        return x
    in_operators = torch.compiler.is_exporting() and backends.requested("feature_resample", backend) == "reference"
    if in_operators or only_reference((x,)):
        backends.choose("feature_resample", backend, x.device, x.dtype, tensors=(x,))
        return reference.feature_resample(x, rows, list(in_size), list(out_size))
    # Compiled graphs choose when they run, which keeps exported ones portable.
    if not torch.compiler.is_compiling():
        backend = backends.choose("feature_resample", backend, x.device, x.dtype, tensors=(x,))
    if torch.is_grad_enabled() and x.requires_grad:
        return _FeatureResample.apply(x, rows, tuple(in_size), tuple(out_size), backend)
    return _fwd(x, rows, in_size, out_size, backend)


def _forward_kernel(x: Tensor, rows: Tensor | None, in_size: list[int], out_size: list[int], backend: str | None):
    implementation = _FORWARD[backends.choose("feature_resample", backend, x.device, x.dtype)]
    if rows is not None and rows.numel() > 0:  # on a GPU the assertion runs on the stream
        torch._assert_async((rows < x.shape[0]).all(), f"rows must be below x's {x.shape[0]} rows")
    return implementation(x, rows, in_size, out_size)


def _backward_kernel(grad: Tensor, in_size: list[int], out_size: list[int], backend: str | None):
    return _BACKWARD[backends.choose("feature_resample", backend, grad.device, grad.dtype)](grad, in_size, out_size)


def _forward_fake(x: Tensor, rows: Tensor | None, in_size: list[int], out_size: list[int], backend: str | None):
    return x.new_empty((x.shape[0] if rows is None else rows.shape[0], out_size[0] * out_size[1], x.shape[2]))


def _backward_fake(grad: Tensor, in_size: list[int], out_size: list[int], backend: str | None):
    return grad.new_empty((grad.shape[0], in_size[0] * in_size[1], grad.shape[2]))


_fwd = define(
    "feature_resample_fwd",
    "(Tensor x, Tensor? rows, SymInt[2] in_size, SymInt[2] out_size, str? backend) -> Tensor",
    _forward_kernel,
    _forward_fake,
)
_bwd = define(
    "feature_resample_bwd",
    "(Tensor grad, SymInt[2] in_size, SymInt[2] out_size, str? backend) -> Tensor",
    _backward_kernel,
    _backward_fake,
)


def _gradient(grad: Tensor, rows: Tensor | None, num_rows: int, in_size, out_size, backend) -> Tensor:
    grad = _bwd(grad, in_size, out_size, backend)
    if rows is None:
        return grad
    grad = torch.where((rows >= 0)[:, None, None], grad, 0)
    return grad.new_zeros((num_rows, *grad.shape[1:])).index_add(0, rows.clamp(min=0), grad)


class _FeatureResample(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, rows, in_size, out_size, backend):  # a setup_context would cost 15 us more per call
        ctx.save_for_backward(rows)
        ctx.arguments = (x.shape[0], in_size, out_size, backend)
        ctx.shape = x.shape
        return _fwd(x, rows, in_size, out_size, backend)

    @staticmethod
    def backward(ctx, grad):
        (rows,) = ctx.saved_tensors
        if need_reference([grad]):
            sizes = [list(size) for size in ctx.arguments[1:3]]
            # x was not kept, since the gradient does not depend on it.
            x = torch.zeros(ctx.shape, dtype=grad.dtype, device=grad.device)
            function = lambda x: [reference.feature_resample(x, rows, *sizes)]  # noqa: E731
            return *of_reference(function, [x], [True], [grad]), None, None, None, None
        return _gradient(grad, rows, *ctx.arguments), None, None, None, None
