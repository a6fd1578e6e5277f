"""rope2d: rotary position embedding over a two-dimensional grid of tokens."""

from __future__ import annotations

from torch import Tensor

from ... import backends
from ..._checks import check, check_floats, check_tensor
from . import reference

backends.register("rope2d")


def rope2d(x: Tensor, cos: Tensor, sin: Tensor, *, backend: str | None = None) -> Tensor:
    """Rotate each adjacent channel pair (2k, 2k + 1) of every head by its token's angle.

    Args:
        x: (B, L, H, D) queries or keys, float.
        cos, sin: (L, D) tables of :func:`rope2d_table`, fp32 whatever the dtype of ``x``.
        backend: see :mod:`mova_kernels.backends`.

    Returns:
        (B, L, H, D) in the dtype of ``x``; computed in fp32 (fp64 for fp64) and rounded once. Source: RoFormer (arXiv
        2104.09864), in the axial form of EVA-02.

    Raises:
        TypeError, ValueError: an argument of the wrong type or shape.
    """
    check_floats("x", x, ("B", "L", "H", "D"))
    check(x.shape[3] % 2 == 0, "x", "must have an even head width D", x.shape[3])
    for name, table in (("cos", cos), ("sin", sin)):
        check_tensor(name, table, (x.shape[1], x.shape[3]))
    backends.choose("rope2d", backend, x.device, x.dtype)
    return reference.rope2d(x, cos, sin)
