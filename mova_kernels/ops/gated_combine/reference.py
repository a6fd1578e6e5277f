"""The definition of gated_combine, in pure torch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor


def gated_combine(
    x: Tensor, projected: Tensor, gate: Tensor, sample: Tensor, host_offsets: Sequence[int] | None
) -> Tensor:
    """(B, L, C), (P, L, C), (P,), (P,) -> (B, L, C): x[b] + the sum of gate[p] * projected[p] over the pairs p of b."""
    contribution = (gate.to(projected.dtype)[:, None, None] * projected).to(x.dtype)
    if host_offsets is None:
        return x.index_add(0, sample, contribution)
    for start, stop in pairwise(host_offsets):
        if stop > start:  # a sample occurs once per expert: the order of additions is fixed on every device
            x = x.index_add(0, sample[start:stop], contribution[start:stop])
    return x
