"""gated_combine on a CPU: the tokens of the pairs in C++ (csrc/gated_combine), products of _linear.py.

With z_p = gate_p * (normalised(attended_p) * g_e + b_e), y_b is x_b + the sum over the pairs p of b of z_p W_e^T and
gate_p c_e. The affine part goes into the tokens, which are written anyway, so that no weight has to be folded.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ... import _compiled
from ..._linear import product
from ...routing import ExpertParameters, PairTables
from ..ragged_linear.cpu_impl import column_sums

TOKENS_PER_PART = 64  # mk::tokens_per_part of csrc/gated_combine/gated_combine_cpu.h

_fwd = _compiled.function(
    "mk_gated_combine_fwd", "x scale shift z", "L I x_stride_token z_stride_token eps:double gate:double dtype"
)
_bwd = _compiled.function(
    "mk_gated_combine_bwd",
    "x dz scale shift grad_x z grad_scale grad_shift grad_gate",
    "L I x_stride_token eps:double gate:double dtype",
)


def forward(
    x: Tensor, attended: Tensor, gate: Tensor, tables: PairTables, parameters: ExpertParameters, eps: float
) -> Tensor:
    """(B, L, C), (P, L, I), fp32 (P,) -> (B, L, C) in the dtype of x; arguments as in op.py."""
    gates, experts = gate.tolist(), tables.expert.tolist()
    with torch.autocast("cpu", enabled=False):
        rows = [
            _combined(tokens, attended, gates, pairs, experts, parameters, eps)
            for tokens, pairs in zip(x, _of_samples(tables), strict=True)
        ]
    return torch.stack(rows) if rows else x.new_empty(x.shape)


def _combined(
    y: Tensor,
    attended: Tensor,
    gates: Sequence[float],
    pairs: Sequence[int],
    experts: Sequence[int],
    parameters: ExpertParameters,
    eps: float,
) -> Tensor:
    """The tokens of one sample, (L, C), with what its pairs add."""
    scale, shift, weight, bias = parameters
    dtype, length, width = attended.dtype, *attended.shape[1:]
    # In bf16 one product over all experts rounds once. In fp32 shorter sums are more exact, and no weights are joined.
    depth = len(pairs) if dtype == torch.bfloat16 else 1
    for first in range(0, len(pairs), max(depth, 1)):
        members = [(p, experts[p]) for p in pairs[first : first + depth]]
        z = _compiled.empty(attended, length, len(members) * width)
        for (p, e), part in zip(members, z.split(width, 1), strict=True):
            _weigh(attended[p], scale[e].to(dtype), shift[e].to(dtype), gates[p], part, eps)
        weights = [weight[e].to(dtype) for _, e in members]
        joined = weights[0] if len(weights) == 1 else torch.cat(weights, 1)
        constants = [gates[p] * bias[e].float() for p, e in members]
        constant = (constants[0] if len(constants) == 1 else torch.stack(constants).sum(0)).to(dtype)
        if y.dtype == dtype:
            y = product(z, joined, constant, y)
        else:
            y = y + product(z, joined, constant).to(y.dtype)
    return y


def backward(
    grad: Tensor, attended: Tensor, gate: Tensor, tables: PairTables, parameters: ExpertParameters, eps: float
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Gradients of attended, gate, and (scale, shift, weight and bias); that of x is ``grad`` itself.

    Zeros for padding and for experts without pairs; always the same bits.
    """
    dtype, (length, width) = attended.dtype, attended.shape[1:]
    dy = grad.to(dtype).contiguous()
    offsets = tables.expert_offsets.tolist()
    num_valid = offsets[-1]
    grad_attended, grad_gate = _compiled.empty(attended, *attended.shape), gate.new_empty(gate.shape)
    grad_attended[num_valid:], grad_gate[num_valid:] = 0, 0
    scale, shift, weight, bias = parameters
    gradients = parameters.like_zeros()
    with torch.autocast("cpu", enabled=False):
        totals = [column_sums(tokens) for tokens in dy]
        for e, (start, stop) in enumerate(pairwise(offsets)):
            if start == stop:
                continue
            samples = tables.sample[start:stop]
            narrow, g, b = (t.to(dtype) for t in (weight[e], scale[e], shift[e]))
            z = _compiled.empty(attended, stop - start, length, width)
            sums = gate.new_empty(2, stop - start, -(-length // TOKENS_PER_PART), width)
            along = gate.new_empty(length)
            total = gate.new_zeros(bias[e].shape)
            for i, sample in enumerate(samples.tolist()):
                p = start + i
                dz = product(dy[sample], narrow.t())
                written = (grad_attended[p], z[i], sums[0, i], sums[1, i], along)
                _weigh_backward(attended[p], dz, g, b, float(gate[p]), *written, eps)
                grad_gate[p] = along.sum() + totals[sample] @ bias[e].float()
                total += gate[p] * totals[sample]
            of_weight: Tensor | None = None
            if dtype == torch.bfloat16:  # as above: a long sum, rounded once
                taken = dy if len(samples) == len(dy) else dy[samples]
                of_weight = product(taken.flatten(0, 1).t(), z.flatten(0, 1).t())
            else:
                for i, sample in enumerate(samples.tolist()):
                    of_weight = product(dy[sample].t(), z[i].t(), added=of_weight)
            for group, gradient in zip(gradients, (*sums.sum((1, 2)), of_weight, total), strict=True):
                group[e].copy_(gradient)
    return grad_attended, grad_gate, [t for group in gradients for t in group]


def _of_samples(tables: PairTables) -> list[list[int]]:
    """The pairs of every sample, by ascending expert."""
    by_sample = tables.by_sample.tolist()
    return [by_sample[start:stop] for start, stop in pairwise(tables.sample_offsets.tolist())]


def _weigh(x: Tensor, scale: Tensor, shift: Tensor, gate: float, z: Tensor, eps: float) -> None:
    """z = gate * (normalised(x) * scale + shift) for (L, I), all of one dtype; z may be a slice of channels."""
    x, scale, shift = _compiled.adjacent_channels(x), scale.contiguous(), shift.contiguous()
    _fwd(x=x, scale=scale, shift=shift, z=z, L=x.shape[0], I=x.shape[1], eps=eps, gate=gate, dtype=x.dtype)


def _weigh_backward(
    x: Tensor, dz: Tensor, scale: Tensor, shift: Tensor, gate: float,
    grad_x: Tensor, z: Tensor, grad_scale: Tensor, grad_shift: Tensor, grad_gate: Tensor, eps: float,
) -> None:  # fmt: skip
    """What follows ``gate`` is written; the sums over tokens are partial, (parts, I) and (L,)."""
    x, dz, scale, shift = _compiled.adjacent_channels(x), dz.contiguous(), scale.contiguous(), shift.contiguous()
    _bwd(
        x=x, dz=dz, scale=scale, shift=shift,
        grad_x=grad_x, z=z, grad_scale=grad_scale, grad_shift=grad_shift, grad_gate=grad_gate,
        L=x.shape[0], I=x.shape[1], eps=eps, gate=gate, dtype=x.dtype,
    )  # fmt: skip
