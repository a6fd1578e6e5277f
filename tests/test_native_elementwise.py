"""swiglu_norm, rope2d and expert_gate in C++; what has loops, on every instruction set of this processor."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_within_budget, layer_norm, value_and_gradients
from torch import Tensor

from mova_kernels import _native
from mova_kernels.ops import expert_gate, rope2d, rope2d_table, swiglu_norm
from mova_kernels.ops.expert_gate import native_impl as gate_native
from mova_kernels.ops.rope2d import native_impl as rope_native
from mova_kernels.ops.swiglu_norm import native_impl as swiglu_native

if _native.cpu_reason() is not None:
    pytest.skip(str(_native.cpu_reason()), allow_module_level=True)

pytestmark = pytest.mark.usefixtures("poisoned_memory")
every_isa = pytest.mark.usefixtures("isa")

TIMES = 1.5  # the error of torch in the same dtype that is allowed
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
RAW = torch.ops.mova_kernels


def assert_threads_do_not_matter(function: Callable[[], Sequence[Tensor]]) -> None:
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5, 1):
            torch.set_num_threads(threads)
            results.append(function())
    finally:
        torch.set_num_threads(before)
    for found in results[1:]:
        assert all(map(torch.equal, found, results[0]))


def gated(*x: Tensor, channels: int | None = None) -> Tensor:
    return swiglu_norm(*x, channels=channels, backend="cpu")


def gated_truth(gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return layer_norm(gate / (1 + (-gate).exp()) * up, weight, bias)


def gated_in_torch(gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(F.silu(gate) * up, weight.shape, weight, bias)


def gated_inputs(shape: tuple[int, int, int], offset: float = 0) -> list[Tensor]:
    """gate, up, weight, bias; the offset gives the product a mean."""
    gate, up = torch.randn(2, *shape)
    weight, bias = torch.randn(2, shape[2])
    return [gate + offset, up + offset, 1 + weight / 4, bias]


@every_isa
@DTYPES
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((2, 9, 1), id="one-channel-is-all-mean"),
        pytest.param((2, 9, 3), id="less-than-a-vector"),
        pytest.param((2, 9, 16), id="whole-vectors"),
        pytest.param((2, 9, 21), id="vectors-and-a-rest"),
        pytest.param((2, 20, 150), id="passes,a-vector-and-a-rest,two-blocks-of-tokens"),
        pytest.param((1, 2, 2730), id="official"),
    ],
)
def test_swiglu_norm(shape, dtype) -> None:
    assert_within_budget(gated_truth, gated, gated_in_torch, lambda: gated_inputs(shape), dtype, times=TIMES)


@every_isa
@DTYPES
def test_swiglu_norm_of_a_large_mean(dtype) -> None:
    """What a variance from squares, or from lanes without a channel, would not survive."""

    def draw() -> list[Tensor]:
        gate, up, weight, bias = gated_inputs((1, 6, 150))
        return [30 + gate, 30 + up / 4, weight, bias]

    assert_within_budget(gated_truth, gated, gated_in_torch, draw, dtype, times=TIMES)


@every_isa
@DTYPES
def test_swiglu_norm_of_the_widest_tokens(dtype) -> None:
    """They fill the buffers."""
    inputs = [t.to(dtype) for t in gated_inputs((1, 2, 8192))]
    cotangent = torch.randn(1, 2, 8192).to(dtype)
    expected = value_and_gradients(gated_truth, [t.double() for t in inputs], cotangent)
    found = value_and_gradients(gated, inputs, cotangent)
    torch.testing.assert_close(found, [t.to(dtype) for t in expected])


@every_isa
def test_statistics_of_swiglu_norm() -> None:
    gate, up, weight, bias = gated_inputs((2, 3, 21))
    _, mean, rstd = RAW.swiglu_norm_fwd(gate, up, weight, bias, 1e-5, 21, "cpu")
    product = F.silu(gate.double()) * up
    torch.testing.assert_close(mean, product.mean(-1).float())
    torch.testing.assert_close(rstd, (product.var(-1, correction=0) + 1e-5).rsqrt().float())


@every_isa
@DTYPES
@pytest.mark.parametrize("channels", [0, 21, 32, 40], ids=["none", "a rest", "whole vectors", "all"])
def test_padding_of_swiglu_norm(channels, dtype) -> None:
    """It is NaN, in the gradient of the result, too; and it becomes zeros."""
    inputs = [t.to(dtype) for t in gated_inputs((2, 3, channels))]
    cotangent = torch.randn(2, 3, channels).to(dtype)
    wide = [F.pad(t, (0, 40 - channels), value=torch.nan) for t in (*inputs, cotangent)]
    *padded, padded_cotangent = wide
    found = value_and_gradients(lambda *t: gated(*t, channels=channels), padded, padded_cotangent)
    for part, expected in zip(found, value_and_gradients(gated, inputs, cotangent), strict=True):
        assert torch.equal(part[..., :channels], expected) and not part[..., channels:].any()


@every_isa
def test_swiglu_norm_rounds_once() -> None:
    """What bf16 tokens give is what they give in fp32, rounded."""
    gate, up, weight, bias = gated_inputs((2, 3, 21))
    gate, up, cotangent = gate.bfloat16(), up.bfloat16(), torch.randn(2, 3, 21).bfloat16()
    found = value_and_gradients(gated, [gate, up, weight, bias], cotangent)
    wide = value_and_gradients(gated, [gate.float(), up.float(), weight, bias], cotangent)
    assert all(map(torch.equal, found, [t.to(f.dtype) for t, f in zip(wide, found, strict=True)]))


@every_isa
@DTYPES
def test_strides_of_swiglu_norm(dtype) -> None:
    """Slices at odd offsets, expanded samples and tokens, and channels that are not adjacent."""
    weight, bias = torch.randn(2, 21)
    cases = [
        torch.randn(2, 4, 90).to(dtype)[:, 1:, 13:34],
        torch.randn(3, 2, 21).to(dtype).transpose(0, 1),
        torch.randn(1, 1, 21).to(dtype).expand(2, 3, 21),
        torch.randn(2, 21, 3).to(dtype).mT,
    ]
    for gate in cases:
        for up in cases:
            arguments = [weight, bias, 1e-5, 21, "cpu"]
            y, mean, rstd = RAW.swiglu_norm_fwd(gate, up, *arguments)
            expected = RAW.swiglu_norm_fwd(gate.contiguous(), up.contiguous(), *arguments)
            assert all(map(torch.equal, (y, mean, rstd), expected)) and y.is_contiguous()
            arguments = [weight, mean, rstd, 21, "cpu"]
            found = RAW.swiglu_norm_bwd(up, gate, up, *arguments)
            expected = RAW.swiglu_norm_bwd(up.contiguous(), gate.contiguous(), up.contiguous(), *arguments)
            assert all(map(torch.equal, found, expected)) and all(t.is_contiguous() for t in found)


@every_isa
def test_gate_and_up_of_two_dtypes() -> None:
    """They meet in fp32; every gradient has the dtype of what it belongs to."""
    gate, up, weight, bias = gated_inputs((2, 3, 21))
    gate = gate.bfloat16()
    cotangent = torch.randn(2, 3, 21).bfloat16()
    expected = value_and_gradients(gated, [gate.float(), up, weight, bias], cotangent)
    found = value_and_gradients(gated, [gate, up, weight, bias], cotangent)
    dtypes = (torch.bfloat16, torch.bfloat16, *[torch.float32] * 3)
    assert [t.dtype for t in found] == list(dtypes)
    torch.testing.assert_close(found, [t.to(d) for t, d in zip(expected, dtypes, strict=True)], rtol=0, atol=0)


@every_isa
@DTYPES
def test_threads_do_not_change_swiglu_norm(dtype) -> None:
    """Nor does how many blocks of tokens one of them has: their sums are added in order."""
    gate, up, weight, bias = (t.to(dtype) for t in gated_inputs((3, 700, 40)))
    grad = torch.randn(3, 700, 40).to(dtype)

    def both() -> list[Tensor]:
        return value_and_gradients(gated, [gate, up, weight, bias], grad)

    assert_threads_do_not_matter(both)


@every_isa
def test_special_gates() -> None:
    """Infinities and NaN stay in their token and give what torch gives."""
    gate, up, weight, bias = gated_inputs((1, 6, 20))
    for token, value in enumerate((torch.inf, -torch.inf, torch.nan, -1e4, 1e4)):
        gate[0, token, 3] = value
    found = value_and_gradients(gated, [gate, up, weight, bias])[0]
    expected = gated_in_torch(gate, up, weight, bias)
    assert torch.equal(found.isnan(), expected.isnan())
    torch.testing.assert_close(found, expected, equal_nan=True)


@every_isa
def test_opcheck_of_swiglu_norm() -> None:
    gate, up, weight, bias = gated_inputs((2, 3, 21))
    gate = gate.transpose(0, 1).contiguous().transpose(0, 1)
    y, mean, rstd = RAW.swiglu_norm_fwd(gate, up, weight, bias, 1e-5, 20, "cpu")
    torch.library.opcheck(RAW.swiglu_norm_fwd.default, (gate, up, weight, bias, 1e-5, 20, "cpu"))
    torch.library.opcheck(RAW.swiglu_norm_bwd.default, (y.mT.clone().mT, gate, up, weight, mean, rstd, 20, "cpu"))


def test_bad_arguments_of_swiglu_norm() -> None:
    with pytest.raises(ValueError, match=r"mk_swiglu_norm_fwd: the argument block must have 136 bytes, got 128"):
        _native.function("mk_swiglu_norm_fwd", "7Q8qd")(*[0] * 16)
    gate, up, weight, bias = gated_inputs((1, 2, 8))
    with pytest.raises(ValueError, match=r"F must be in \[0, 8\], got 9"):
        swiglu_native.forward(gate, up, weight, bias, 1e-5, 9)
    with pytest.raises(ValueError, match=r"width must be in \[0, 8192\], got 8193"):
        swiglu_native.forward(*gated_inputs((1, 1, 8193)), 1e-5, 1)
    with pytest.raises(ValueError, match=r"mk_swiglu_norm_bwd: dtype must be in \[0, 1\], got 2"):
        half = gate.half()
        swiglu_native.backward(half, half, half, weight, gate[..., 0], gate[..., 0], 8)
    with pytest.raises(ValueError, match="backend must be one of triton, cpu, got 'reference'"):
        RAW.swiglu_norm_fwd(gate, up, weight, bias, 1e-5, 8, "reference")


def turn(cos: Tensor, sin: Tensor) -> Callable[[Tensor], Tensor]:
    """The formula in the dtype of its input; the tables are rounded to it."""

    def function(x: Tensor) -> Tensor:
        a, b = x[..., ::2], x[..., 1::2]
        return x * cos[:, None].to(x.dtype) + torch.stack((-b, a), -1).flatten(-2) * sin[:, None].to(x.dtype)

    return function


@every_isa
@DTYPES
@pytest.mark.parametrize(
    ("heads", "width"),
    [
        pytest.param(3, 2, id="one-pair"),
        pytest.param(2, 12, id="less-than-a-vector"),
        pytest.param(2, 16, id="whole-vectors"),
        pytest.param(2, 44, id="vectors-and-a-rest"),
        pytest.param(16, 64, id="official"),
    ],
)
def test_rope2d(heads, width, dtype) -> None:
    """With tables that differ within a pair, which tells the adjoint from the rotation by the opposite angle."""
    tables = torch.randn(2, 6, width).unbind()
    assert_within_budget(
        turn(*tables),
        lambda x: rope2d(x, *tables, backend="cpu"),
        turn(*tables),
        lambda: [torch.randn(2, 6, heads, width)],
        dtype,
        times=TIMES,
    )


@every_isa
def test_rope2d_rounds_once() -> None:
    """Every bf16 stays what it is under a turn by nothing, NaN stays NaN, and sums are rounded as torch rounds them."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16).view(1, 256, 1, 256)
    pairs = torch.stack((every, torch.zeros_like(every)), -1).flatten(-2)
    y = RAW.rope2d_fwd(pairs, torch.ones(256, 512), torch.zeros(256, 512), "cpu")[..., ::2]
    numbers = ~every.isnan()
    assert torch.equal(y.isnan(), ~numbers)
    assert torch.equal(y[numbers].view(torch.int16), every[numbers].view(torch.int16))
    nan = torch.full((256, 512), 2**31 - 1, dtype=torch.int32).view(torch.float32)  # rounding would carry over
    assert RAW.rope2d_fwd(pairs, nan, nan, "cpu").isnan().all()
    x, tables = torch.randn(2, 25, 3, 20).bfloat16(), rope2d_table(5, 20)
    for op in (RAW.rope2d_fwd, RAW.rope2d_bwd):
        assert torch.equal(op(x, *tables, "cpu"), op(x.float(), *tables, "cpu").bfloat16())


@every_isa
@DTYPES
def test_strides_of_rope2d(dtype) -> None:
    """Slices at odd offsets, heads before tokens, expanded samples, and channels that are not adjacent."""
    cos, sin = rope2d_table(3, 20)
    for x in (
        torch.randn(2, 9, 3, 70).to(dtype)[..., 13:33],
        torch.randn(2, 3, 9, 20).to(dtype).transpose(1, 2),
        torch.randn(1, 9, 1, 20).to(dtype).expand(2, 9, 3, 20),
        torch.randn(2, 9, 20, 3).to(dtype).mT,
        torch.randn(2, 9, 9, 20).to(dtype)[:, :, 1::4],
    ):
        for op in (RAW.rope2d_fwd, RAW.rope2d_bwd):
            y = op(x, cos, sin, "cpu")
            assert y.is_contiguous() and torch.equal(y, op(x.contiguous(), cos, sin, "cpu"))


@every_isa
def test_tables_of_rope2d() -> None:
    """They are of another dtype, and not contiguous."""
    x, tables = torch.randn(2, 9, 3, 20), rope2d_table(3, 20)
    expected = RAW.rope2d_fwd(x, *tables, "cpu")
    assert torch.equal(RAW.rope2d_fwd(x, *(t.double().T.contiguous().T for t in tables), "cpu"), expected)


@every_isa
@DTYPES
def test_threads_do_not_change_rope2d(dtype) -> None:
    x, tables = torch.randn(3, 400, 5, 64).to(dtype), rope2d_table(20, 64)
    assert_threads_do_not_matter(lambda: [op(x, *tables, "cpu") for op in (RAW.rope2d_fwd, RAW.rope2d_bwd)])


@every_isa
def test_opcheck_of_rope2d() -> None:
    x, tables = torch.randn(2, 3, 9, 20).transpose(1, 2), rope2d_table(3, 20)
    for op in (RAW.rope2d_fwd, RAW.rope2d_bwd):
        torch.library.opcheck(op.default, (x, *tables, "cpu"))


def test_bad_arguments_of_rope2d() -> None:
    with pytest.raises(ValueError, match="mk_rope2d: the argument block must have 104 bytes, got 96"):
        _native.function("mk_rope2d", "4Q8q")(*[0] * 12)
    x, tables = torch.zeros(1, 9, 2, 8), rope2d_table(3, 8)
    with pytest.raises(ValueError, match=r"mk_rope2d: dtype must be in \[0, 1\], got 2"):
        rope_native.rotated(x.half(), *tables, False)
    with pytest.raises(ValueError, match="mk_rope2d: D must be even, got 7"):
        rope_native.rotated(x[..., :7], *(t[:, :7] for t in tables), False)
    with pytest.raises(ValueError, match="backend must be one of triton, cpu, got 'reference'"):
        RAW.rope2d_fwd(x, *tables, "reference")


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
    with pytest.raises(ValueError, match="mk_expert_gate_fwd: the argument block must have 96 bytes, got 88"):
        _native.function("mk_expert_gate_fwd", "4Q7q")(*[0] * 11)
    logits, all_of_them = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"topk must be in \[1, .*\], got 0"):
        gate_native.forward(logits, all_of_them, 0)
    with pytest.raises(ValueError, match=r"N must be in \[0, 1024\], got 1025"):
        gate_native.forward(torch.zeros(1, 1025), torch.zeros(1, 1025, dtype=torch.bool), 1)
    with pytest.raises(ValueError, match=r"mk_expert_gate_bwd: dtype must be in \[0, 1\], got 2"):
        gate_native.backward(logits, logits.half(), all_of_them)
    with pytest.raises(ValueError, match="backend must be one of triton, cpu, got 'reference'"):
        RAW.expert_gate_fwd(logits, all_of_them, 1, "reference")
