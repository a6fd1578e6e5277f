"""swiglu_norm: the elementwise middle of the SwiGLU feed-forward with its sub-LayerNorm."""

from __future__ import annotations

from torch import Tensor

from ... import backends
from ..._checks import check_floats, check_tensor
from . import reference

backends.register("swiglu_norm")


def swiglu_norm(
    gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, *, backend: str | None = None
) -> Tensor:
    """LayerNorm(SiLU(gate) * up).

    Args:
        gate, up: (B, L, F), float: the two projections of the tokens.
        weight, bias: (F,) of the LayerNorm.
        eps: added to the variance.
        backend: see :mod:`mova_kernels.backends`.

    Returns:
        (B, L, F) in the dtype of ``gate``. Source: SwiGLU (arXiv 2002.05202) with the sub-LN of EVA-02.

    Raises:
        TypeError, ValueError: an argument of the wrong type or shape.
    """
    check_floats("gate", gate, ("B", "L", "F"))
    check_tensor("up", up, tuple(gate.shape))
    check_tensor("weight", weight, (gate.shape[2],))
    check_tensor("bias", bias, (gate.shape[2],))
    backends.choose("swiglu_norm", backend, gate.device, gate.dtype)
    return reference.swiglu_norm(gate, up, weight, bias, eps)
