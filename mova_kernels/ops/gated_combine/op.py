"""gated_combine: what the experts of a sample found out, weighted by its gate and added to its tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from ... import backends
from ..._checks import check, check_floats, check_tensor
from ...ragged import RaggedPairs
from ..ragged_linear.op import project
from . import reference

backends.register("gated_combine")


def gated_combine(
    x: Tensor,
    attended: Tensor,
    gate: Tensor,
    pairs: RaggedPairs,
    norms: Sequence[tuple[Tensor, Tensor]],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> Tensor:
    """y[b] = x[b] + sum over the pairs p = (b, e) of gate[p] * (LayerNorm_e(attended[p]) W_e^T + b_e).

    Args:
        x: (B, L, C) tokens, float.
        attended: (P, L, I) result of expert_attention.
        gate: (P,) weights, 0 for padding.
        pairs: the pairs.
        norms: per expert the inner LayerNorm's weight and bias, (I,) each.
        weights, biases: per expert (C, I) and (C,): the output projection.
        eps: added to the variance.
        backend: see :mod:`mova_kernels.backends`.

    Returns:
        (B, L, C) in the dtype of ``x``; exactly ``x`` for a sample without pairs. Deterministic, except for the sum
        over a sample's pairs on a GPU where the host does not know the pairs.

    Raises:
        TypeError, ValueError: an argument of the wrong type or shape.
    """
    check_floats("x", x, (pairs.num_samples, "L", "C"))
    check_floats("attended", attended, (pairs.num_pairs, x.shape[1], "I"))
    check_floats("gate", gate, (pairs.num_pairs,))
    lengths = [len(norms), len(weights), len(biases)]
    rule = f"must have one entry for each of {pairs.num_experts} experts"
    check(lengths == [pairs.num_experts] * 3, "norms, weights and biases", rule, lengths)
    for e, (norm, weight, bias) in enumerate(zip(norms, weights, biases, strict=True)):
        check_tensor(f"norms[{e}][0]", norm[0], (attended.shape[2],))
        check_tensor(f"norms[{e}][1]", norm[1], (attended.shape[2],))
        check_tensor(f"weights[{e}]", weight, (x.shape[2], attended.shape[2]))
        check_tensor(f"biases[{e}]", bias, (x.shape[2],))
    backends.choose("gated_combine", backend, x.device, x.dtype)
    normed = F.layer_norm(attended, attended.shape[-1:], eps=eps)
    (projected,) = project([normed], None, pairs, norms, [weights], [biases])
    return reference.gated_combine(x, projected, gate, pairs.sample, pairs.bounds)
