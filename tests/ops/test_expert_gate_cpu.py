"""expert_gate in C++."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mova_kernels import _compiled
from mova_kernels.ops import expert_gate
from mova_kernels.ops.expert_gate import cpu_impl

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.skipif(_compiled.cpu_reason() is not None, reason="there is no compiled library"),
]

TIMES = 1.5  # the error of torch in the same dtype that is allowed
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
RAW = torch.ops.mova_kernels


def ranked(logits: Tensor, selected: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """Weights in fp64, and kept, one sample at a time: NaN counts as infinity, and the lowest index wins."""
    weights, kept = torch.zeros_like(logits, dtype=torch.float64), torch.zeros_like(selected)
    for b, row in enumerate(logits.double()):
        order = sorted(selected[b].nonzero().flatten().tolist(), key=lambda e: (-row[e].nan_to_num(torch.inf), e))
        kept[b, order[:topk]] = True
        weights[b, kept[b]] = row[kept[b]].softmax(0)
    return weights, kept


@DTYPES
@pytest.mark.parametrize("topk", [1, 3, 40, 2**40])
def test_expert_gate(topk, dtype) -> None:
    """Few values, so that many are equal, and all that are not numbers."""
    logits = torch.randint(-3, 4, (50, 37)).to(dtype)
    logits[10:20, ::5], logits[20:30, 1::4], logits[30:40, 2::3] = torch.nan, torch.inf, -torch.inf
    selected = torch.rand(50, 37) < 0.5
    selected[:2] = False
    weights, kept = RAW.expert_gate_fwd(logits, selected, topk, "cpu")
    truth, best = ranked(logits, selected, topk)
    assert torch.equal(kept, best) and weights.dtype == torch.float32
    torch.testing.assert_close(weights, truth.float(), rtol=2**-23, atol=0, equal_nan=True)

    finite = torch.where(kept, logits.nan_to_num(1, 2, -2), torch.nan)  # nothing else may be read
    grad = torch.where(kept, torch.randn(50, 37), torch.nan)
    found = RAW.expert_gate_bwd(grad, finite, kept, "cpu")
    odds = torch.where(kept, finite.double().exp(), 0)
    truth = odds / odds.sum(1, keepdim=True).clamp(min=1e-9)
    truth = truth * (grad.double().nan_to_num() - (truth * grad.double().nan_to_num()).sum(1, keepdim=True))
    assert found.dtype == dtype
    torch.testing.assert_close(found, truth.float().to(dtype), rtol=2**-23 if dtype == torch.float32 else 0, atol=1e-12)


@DTYPES
def test_strides_of_expert_gate(dtype) -> None:
    logits, selected = torch.randn(9, 5).to(dtype).T, (torch.rand(5, 27) < 0.7)[:, ::3]
    grad = torch.randn(5, 1).expand(5, 9)
    weights, kept = RAW.expert_gate_fwd(logits, selected, 3, "cpu")
    expected = RAW.expert_gate_fwd(logits.contiguous(), selected.contiguous(), 3, "cpu")
    assert torch.equal(weights, expected[0]) and torch.equal(kept, expected[1])
    found = RAW.expert_gate_bwd(grad, logits, kept.T.contiguous().T, "cpu")
    assert torch.equal(found, RAW.expert_gate_bwd(grad.contiguous(), logits.contiguous(), kept, "cpu"))


def test_most_experts() -> None:
    """They fill the buffer."""
    logits = torch.randn(2, 1024)
    weights, kept = expert_gate(logits, torch.ones_like(logits, dtype=torch.bool), 1024, backend="cpu")
    assert kept.all()
    torch.testing.assert_close(weights, logits.double().softmax(1).float(), rtol=2**-23, atol=0)


def test_opcheck_of_expert_gate() -> None:
    logits, selected = torch.randn(9, 5).T, torch.rand(5, 9) < 0.7
    torch.library.opcheck(RAW.expert_gate_fwd.default, (logits, selected, 3, "cpu"))
    weights, kept = RAW.expert_gate_fwd(logits, selected, 3, "cpu")
    torch.library.opcheck(RAW.expert_gate_bwd.default, (weights, logits, kept, "cpu"))


def test_bad_arguments_of_expert_gate() -> None:
    logits, all_of_them = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"topk must be in \[1, .*\], got 0"):
        cpu_impl.forward(logits, all_of_them, 0)
    with pytest.raises(ValueError, match=r"N must be in \[0, 1024\], got 1025"):
        cpu_impl.forward(torch.zeros(1, 1025), torch.zeros(1, 1025, dtype=torch.bool), 1)
    with pytest.raises(ValueError, match=r"mk_expert_gate_bwd: dtype must be in \[0, 1\], got 2"):
        cpu_impl.backward(logits, logits.half(), all_of_them)
    with pytest.raises(ValueError, match="backend must be one of triton, cuda, cpu, got 'reference'"):
        RAW.expert_gate_fwd(logits, all_of_them, 1, "reference")
