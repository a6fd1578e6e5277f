"""gated_combine in C++, called as cpu_impl calls it, on every instruction set of this processor."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import check_budget
from torch import Tensor

from mova_kernels import BackendError, _compiled, backends
from mova_kernels.ops.gated_combine import cpu_impl

if _compiled.cpu_reason() is not None:
    pytest.skip(str(_compiled.cpu_reason()), allow_module_level=True)

pytestmark = pytest.mark.usefixtures("poisoned_memory", "isa")


def weighed(x: Tensor, scale: Tensor, shift: Tensor, gate: float) -> Tensor:
    return gate * F.layer_norm(x, scale.shape, scale, shift, 1e-3)


WIDTHS = [1, 2, 3, 15, 16, 17, 31, 33, 63, 65, 130, 600, 8192]  # around the vectors of every instruction set


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_tokens(width, dtype) -> None:
    """A mean that is large beside the deviation, strided tokens, and more than one part of them."""
    tokens, gate = 130 if width < 8192 else 3, -0.7
    x = (torch.randn(tokens, width + 3) + 30).to(dtype)[:, 2:-1]
    scale, shift = ((torch.randn(width) + 1).to(dtype) for _ in range(2))
    dz = torch.randn(tokens, width).to(dtype)
    wide = x.new_empty(tokens, width + 5)
    cpu_impl._weigh(x, scale, shift, gate, wide[:, 4:-1], 1e-3)
    assert wide[:, :4].isnan().all() and wide[:, -1].isnan().all()  # the memory was filled with NaN
    parts = -(-tokens // cpu_impl.TOKENS_PER_PART)
    grad_x, z = torch.empty_like(dz), torch.empty_like(dz)
    sums, along = torch.empty(2, parts, width), torch.empty(tokens)
    cpu_impl._weigh_backward(x, dz, scale, shift, gate, grad_x, z, sums[0], sums[1], along, 1e-3)
    assert torch.equal(z, wide[:, 4:-1])
    found = [z, grad_x, *sums.sum(1), along.sum()[None]]

    def all_of(to: torch.dtype) -> list[Tensor]:
        leaves = [t.to(to).requires_grad_() for t in (x, scale, shift, torch.tensor([gate]))]
        y = weighed(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, dz.to(to))]

    names = ("z", "x", "scale", "shift", "gate")
    for name, actual, true, rival in zip(names, found, all_of(torch.float64), all_of(torch.float32), strict=True):
        if name == "gate":  # one number, whose error is luck: at most that of any order of summation
            terms = (dz.double() * all_of(torch.float64)[0] / gate).abs().sum()
            assert abs(actual.double() - true) <= dz.numel() * 2**-24 * terms
        elif width > 2:
            check_budget(name, actual, true, rival.to(actual.dtype), (2,), times=1.5)
        else:  # exact zeros in torch, for one
            torch.testing.assert_close(actual, true.to(actual.dtype))


def test_a_mean_that_cannot_be_represented() -> None:
    """A rounded mean is off by up to 1/32 here, which the variance must not see."""
    x = torch.randn(5, 600) + 1e6
    one, zero = torch.ones(600), torch.zeros(600)
    z = torch.empty_like(x)
    cpu_impl._weigh(x, one, zero, 1.0, z, 1e-5)
    true, rival = (F.layer_norm(x.to(t), (600,)) for t in (torch.float64, torch.float32))
    check_budget("z", z, true, rival, times=1.5)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"I must be in \[1, 8192\], got 8193"):
        cpu_impl._weigh(*[torch.zeros(1, 8193)] * 3, 0.0, torch.zeros(1, 8193), 0.0)
    with pytest.raises(ValueError, match=r"dtype must be in \[0, 1\], got 2"):
        x = torch.zeros(1, 1, dtype=torch.float16)
        cpu_impl._weigh_backward(x, x, x[0], x[0], 0.0, *[torch.empty_like(x)] * 5, 0.0)
    with pytest.raises(BackendError, match="it takes attended channels from 1 to 8192, not 8193"):
        backends.choose("gated_combine", "cpu", torch.device("cpu"), torch.float32, {"attended channels": 8193})


@pytest.mark.all_threads
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_does_not_depend_on_threads(dtype) -> None:
    x, dz, scale, shift = (torch.randn(size).to(dtype) for size in ((700, 200), (700, 200), 200, 200))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            outputs = [torch.empty_like(x), torch.empty_like(x), *torch.empty(2, 11, 200), torch.empty(700)]
            cpu_impl._weigh_backward(x, dz, scale, shift, 0.3, *outputs, 1e-5)
            found.append([*outputs, torch.empty_like(x)])
            cpu_impl._weigh(x, scale, shift, 0.3, found[-1][-1], 1e-5)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(other, found[0], strict=True))
