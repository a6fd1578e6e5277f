"""rope2d: rotary position embedding over a two-dimensional grid of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _compiled, _triton, backends
from ..._checks import check, check_device, check_floats, check_tensor
from ..._gradients import need_reference, of_reference
from ..._library import define
from . import reference

backends.register("rope2d", _triton.BACKEND, _compiled.BACKEND)


def rope2d(x: Tensor, cos: Tensor, sin: Tensor, *, backend: str | None = None) -> Tensor:
    """Rotate each adjacent channel pair (2k, 2k + 1) of every head by its token's angle.

    Args:
        x: (B, L, H, D) queries or keys, float; any strides.
        cos, sin: (L, D) tables of :func:`rope2d_table`, fp32 whatever the dtype of ``x``, on x's device; constants,
            they get no gradient from ``triton`` and ``cpu``.
        backend: see :mod:`mova_kernels.backends`.

    Returns:
        (B, L, H, D) in the dtype of ``x``; computed in fp32 (fp64 for fp64) and rounded once. Source: RoFormer (arXiv
        2104.09864), in the axial form of EVA-02.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or device.
        backends.BackendError: the requested backend cannot run here.
    """
    check_floats("x", x, ("B", "L", "H", "D"))
    check(x.shape[3] % 2 == 0, "x", "must have an even head width D", x.shape[3])
    for name, table in (("cos", cos), ("sin", sin)):
        check_tensor(name, table, (x.shape[1], x.shape[3]))
        check_device(name, table, "x", x)
    backend = backends.choose("rope2d", backend, x.device, x.dtype, tensors=(x, cos, sin))
    if backend == "reference":
        return reference.rope2d(x, cos, sin)
    cos, sin = cos.float(), sin.float()
    if torch.is_grad_enabled() and x.requires_grad:
        return _Rope2d.apply(x, cos, sin, backend)
    return _fwd(x, cos, sin, backend)


def _forward_kernel(x, cos, sin, backend):
    return backends.implementation("rope2d", backend, x).rotated(x, cos, sin, adjoint=False)


def _backward_kernel(grad, cos, sin, backend):
    return backends.implementation("rope2d", backend, grad).rotated(grad, cos, sin, adjoint=True)


def _fake(x, cos, sin, backend):
    return x.new_empty(x.shape)


_fwd = define("rope2d_fwd", "(Tensor x, Tensor cos, Tensor sin, str backend) -> Tensor", _forward_kernel, _fake)
_bwd = define("rope2d_bwd", "(Tensor grad, Tensor cos, Tensor sin, str backend) -> Tensor", _backward_kernel, _fake)


class _Rope2d(torch.autograd.Function):
    @staticmethod
    def forward(x, cos, sin, backend):
        return _fwd(x, cos, sin, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, cos, sin, ctx.backend = inputs
        ctx.shape = x.shape
        ctx.save_for_backward(cos, sin)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        if need_reference([grad]):
            # x was not kept, since the gradient does not depend on it.
            x = torch.zeros(ctx.shape, dtype=grad.dtype, device=grad.device)
            gradients = of_reference(lambda x: [reference.rope2d(x, cos, sin)], [x], [True], [grad])
            return gradients[0], None, None, None
        return _bwd(grad, cos, sin, ctx.backend), None, None, None
