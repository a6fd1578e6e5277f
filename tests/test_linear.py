"""The dense product of the CPU backends and of plain modules, against F.linear and an fp64 truth."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_within_budget, check_budget
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from mova_kernels import _compiled, _linear, modules
from mova_kernels._linear import linear, product

pytestmark = pytest.mark.usefixtures("poisoned_memory")
HAS_OURS = _compiled.cpu_reason() is None and _compiled.cpu_isa() != "base"
ours = pytest.mark.skipif(not HAS_OURS, reason="there is no product in C++ for this processor")

SHAPES = {
    "many sums": ((3, 40, 256), 129),
    "a matrix": ((70, 33), 17),
    "one row": ((1, 64), 8),
    "one output": ((5, 7), 1),
    "no row": ((0, 5, 7), 3),
    "no channel": ((4, 0), 3),
    "no output": ((4, 5), 0),
    "a vector": ((6,), 4),
}


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """The number of channels of every product in C++."""
    seen = []
    matmul = _linear._matmul

    def spy(**fields: Any) -> None:
        seen.append(fields["K"])
        matmul(**fields)

    monkeypatch.setattr(_linear, "_matmul", spy)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(("shape", "outputs"), SHAPES.values(), ids=SHAPES)
def test_error_budget(shape, outputs, bias, dtype) -> None:
    def draw() -> list[Tensor]:
        sizes = [shape, (outputs, shape[-1]), *([(outputs,)] if bias else [])]
        return [torch.randn(size) for size in sizes]

    assert_within_budget(F.linear, linear, F.linear, draw, dtype, draws=5, times=1.5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_other_dtypes_are_torchs(dtype, calls) -> None:
    x, w, b = (torch.randn(size).to(dtype) for size in ((2, 5, 8), (3, 8), (3,)))
    torch.testing.assert_close(linear(x, w, b), F.linear(x, w, b))
    torch.testing.assert_close(product(x, w, b), F.linear(x, w, b))
    assert not calls


@ours
@pytest.mark.parametrize("amx", [False, True])
def test_bf16_is_torchs_where_it_has_amx(amx, calls, monkeypatch) -> None:
    monkeypatch.setattr(_linear, "_has_amx", lambda: amx)
    x, w = torch.randn(5, 8).bfloat16(), torch.randn(3, 8).bfloat16()
    torch.testing.assert_close(linear(x, w), F.linear(x, w))
    assert calls == ([] if amx else [8])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
def test_what_is_added(dtype, with_bias) -> None:
    x, w, b, added = (torch.randn(size).to(dtype) for size in ((40, 64), (33, 64), (33,), (40, 33)))
    bias = b if with_bias else None
    truth = F.linear(x.double(), w.double(), None if bias is None else b.double()) + added.double()
    before = added.clone()
    check_budget("sum", product(x, w, bias, added), truth, F.linear(x, w, bias) + added, times=1.5)
    assert torch.equal(added, before)
    assert torch.equal(product(x, w, bias, added, out=added), product(x, w, bias, before))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides(dtype) -> None:
    """Operands may be slices, transposed, expanded; the result may be a slice of rows, and nothing else is written."""
    wide, w = torch.randn(12, 40).to(dtype), torch.randn(9, 40).to(dtype)
    out = torch.full((20, 9), torch.nan, dtype=dtype)
    for x in (wide[:, :20], wide[:, 1::2], wide[:1, :20].expand(12, -1), wide[:, :20].t().contiguous().t()):
        for weight in (w[:, 20:], w[:, ::2], w[:, :20].t().contiguous().t(), w[:1, :20].expand(9, -1)):
            y = product(x, weight, w[:, 3], wide[:, 2:20:2], out=out[4:16])
            torch.testing.assert_close(
                y, product(x.contiguous(), weight.contiguous(), w[:, 3].contiguous(), wide[:, 2:20:2])
            )
            truth = F.linear(x.double(), weight.double(), w[:, 3].double()) + wide[:, 2:20:2].double()
            check_budget("sum", y, truth, F.linear(x, weight, w[:, 3]) + wide[:, 2:20:2], norms=(2,), times=1.5)
    assert out[:4].isnan().all() and out[16:].isnan().all()


@ours
def test_only_the_gradients_that_are_needed_are_computed(calls) -> None:
    for needed in range(8):
        flags = [bool(needed & 1 << i) for i in range(3)]
        leaves = [torch.randn(s, requires_grad=n) for s, n in zip(((4, 6), (5, 6), (5,)), flags, strict=True)]
        calls.clear()
        y = linear(*leaves)
        assert y.requires_grad == any(flags)
        if any(flags):
            y.square().sum().backward()
        assert [t.grad is not None for t in leaves] == flags
        assert calls == [6] + [5] * flags[0] + [4] * flags[1]  # forward, of x, of the weight


def test_gradients_of_an_expanded_cotangent_and_of_gradients() -> None:
    x, w, b = (torch.randn(size, requires_grad=True) for size in ((2, 5, 8), (3, 8), (3,)))

    def second(function) -> list[Tensor]:
        (grad,) = torch.autograd.grad(function(x, w, b).tanh().sum(), x, create_graph=True)
        return list(torch.autograd.grad(grad.square().sum() + function(x, w, b).sum(), (x, w, b)))

    torch.testing.assert_close(second(linear), second(F.linear))


def test_the_result_may_be_changed_in_place() -> None:
    x, w = torch.randn(2, 5, 8), torch.randn(3, 8, requires_grad=True)
    linear(x, w).add_(1).sum().backward()
    torch.testing.assert_close(w.grad, x.sum((0, 1)).expand(3, 8))


@ours
def test_whatever_watches_sees_torchs_own_linear(calls) -> None:
    x, w = torch.randn(4, 6), torch.randn(5, 6)
    expected = F.linear(x, w)
    with FlopCounterMode(display=False) as counter:
        linear(x, w)
    assert counter.get_total_flops() == 2 * 4 * 6 * 5
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, w).dtype == torch.bfloat16
    torch.testing.assert_close(torch.func.grad(lambda w: linear(x, w).sum())(w), x.sum(0).expand(5, 6))
    torch.testing.assert_close(torch.func.vmap(lambda x: linear(x, w))(x), expected)
    _, tangent = torch.func.jvp(lambda x: linear(x, w), (x,), (x,))
    torch.testing.assert_close(tangent, expected)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(linear(dual, w)).tangent, expected)
    assert "mm" in make_fx(lambda x, w: linear(x, w))(x, w).code
    assert not calls


@ours
def test_modules_are_bypassed_only_where_they_are_plain(calls) -> None:
    x, module = torch.randn(4, 6), nn.Linear(6, 5)
    torch.testing.assert_close(modules._linear(module, x), module(x))
    assert len(calls) > 0
    calls.clear()
    module.register_forward_hook(lambda module, inputs, output: output + 1)
    assert torch.equal(modules._linear(module, x), module(x))

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    doubled = Doubled(6, 5)
    assert torch.equal(modules._linear(doubled, x), doubled(x))
    assert not calls


@ours
def test_the_dense_layers_of_the_adapter_take_it(calls) -> None:
    attention, swiglu = modules.Attention(8, 8, 2), modules.SwiGLU(8)
    mlp = modules.OutputMLP(nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 6))
    x, tables = torch.randn(1, 4, 8), torch.ones(4, 4)
    with torch.no_grad():
        for layer, arguments, expected in (
            (attention, (x, x, tables, tables), [8] * 4),
            (swiglu, (x,), [8, 8, 21]),
            (mlp, (x,), [8, 6]),
        ):
            calls.clear()
            layer(*arguments)
            assert calls == expected


def test_a_repetition_gives_the_same_bits() -> None:
    x, w = torch.randn(300, 200), torch.randn(100, 200)
    assert all(torch.equal(product(x, w), product(x, w)) for _ in range(3))


def test_gradients_of_no_rows() -> None:
    x, weight, bias = torch.randn(0, 4, 8), torch.randn(5, 8), torch.randn(5)
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    for found, like in zip(torch.autograd.grad(linear(*inputs).sum(), inputs), inputs, strict=True):
        assert found.shape == like.shape and not found.any()
