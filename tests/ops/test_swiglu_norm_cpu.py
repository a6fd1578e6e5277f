"""swiglu_norm in C++, on every instruction set of this processor."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_threads_do_not_matter, assert_within_budget, layer_norm, value_and_gradients
from torch import Tensor

from mova_kernels.ops import swiglu_norm
from mova_kernels.ops.swiglu_norm import cpu_impl

pytestmark = pytest.mark.usefixtures("poisoned_memory", "isa")

TIMES = 1.5  # the error of torch in the same dtype that is allowed
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
RAW = torch.ops.mova_kernels


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


@DTYPES
def test_swiglu_norm_of_a_large_mean(dtype) -> None:
    """What a variance from squares, or from lanes without a channel, would not survive."""

    def draw() -> list[Tensor]:
        gate, up, weight, bias = gated_inputs((1, 6, 150))
        return [30 + gate, 30 + up / 4, weight, bias]

    assert_within_budget(gated_truth, gated, gated_in_torch, draw, dtype, times=TIMES)


@DTYPES
def test_swiglu_norm_of_the_widest_tokens(dtype) -> None:
    """They fill the buffers."""
    inputs = [t.to(dtype) for t in gated_inputs((1, 2, 8192))]
    cotangent = torch.randn(1, 2, 8192).to(dtype)
    expected = value_and_gradients(gated_truth, [t.double() for t in inputs], cotangent)
    found = value_and_gradients(gated, inputs, cotangent)
    torch.testing.assert_close(found, [t.to(dtype) for t in expected])


def test_statistics_of_swiglu_norm() -> None:
    gate, up, weight, bias = gated_inputs((2, 3, 21))
    _, mean, rstd = RAW.swiglu_norm_fwd(gate, up, weight, bias, 1e-5, 21, "cpu")
    product = F.silu(gate.double()) * up
    torch.testing.assert_close(mean, product.mean(-1).float())
    torch.testing.assert_close(rstd, (product.var(-1, correction=0) + 1e-5).rsqrt().float())


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


def test_swiglu_norm_rounds_once() -> None:
    """What bf16 tokens give is what they give in fp32, rounded."""
    gate, up, weight, bias = gated_inputs((2, 3, 21))
    gate, up, cotangent = gate.bfloat16(), up.bfloat16(), torch.randn(2, 3, 21).bfloat16()
    found = value_and_gradients(gated, [gate, up, weight, bias], cotangent)
    wide = value_and_gradients(gated, [gate.float(), up.float(), weight, bias], cotangent)
    assert all(map(torch.equal, found, [t.to(f.dtype) for t, f in zip(wide, found, strict=True)]))


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


@DTYPES
def test_threads_do_not_change_swiglu_norm(dtype) -> None:
    """Nor does how many blocks of tokens one of them has: their sums are added in order."""
    gate, up, weight, bias = (t.to(dtype) for t in gated_inputs((3, 700, 40)))
    grad = torch.randn(3, 700, 40).to(dtype)

    def both() -> list[Tensor]:
        return value_and_gradients(gated, [gate, up, weight, bias], grad)

    assert_threads_do_not_matter(both)


def test_special_gates() -> None:
    """Infinities and NaN stay in their token and give what torch gives."""
    gate, up, weight, bias = gated_inputs((1, 6, 20))
    for token, value in enumerate((torch.inf, -torch.inf, torch.nan, -1e4, 1e4)):
        gate[0, token, 3] = value
    found = value_and_gradients(gated, [gate, up, weight, bias])[0]
    expected = gated_in_torch(gate, up, weight, bias)
    assert torch.equal(found.isnan(), expected.isnan())
    torch.testing.assert_close(found, expected, equal_nan=True)


def test_opcheck_of_swiglu_norm() -> None:
    gate, up, weight, bias = gated_inputs((2, 3, 21))
    gate = gate.transpose(0, 1).contiguous().transpose(0, 1)
    y, mean, rstd = RAW.swiglu_norm_fwd(gate, up, weight, bias, 1e-5, 20, "cpu")
    torch.library.opcheck(RAW.swiglu_norm_fwd.default, (gate, up, weight, bias, 1e-5, 20, "cpu"))
    torch.library.opcheck(RAW.swiglu_norm_bwd.default, (y.mT.clone().mT, gate, up, weight, mean, rstd, 20, "cpu"))


def test_bad_arguments_of_swiglu_norm() -> None:
    gate, up, weight, bias = gated_inputs((1, 2, 8))
    with pytest.raises(ValueError, match=r"F must be in \[0, 8\], got 9"):
        cpu_impl.forward(gate, up, weight, bias, 1e-5, 9)
    with pytest.raises(ValueError, match=r"width must be in \[0, 8192\], got 8193"):
        cpu_impl.forward(*gated_inputs((1, 1, 8193)), 1e-5, 1)
    with pytest.raises(ValueError, match=r"mk_swiglu_norm_bwd: dtype must be in \[0, 1\], got 2"):
        half = gate.half()
        cpu_impl.backward(half, half, half, weight, gate[..., 0], gate[..., 0], 8)
    with pytest.raises(ValueError, match="backend must be one of triton, cuda, cpu, got 'reference'"):
        RAW.swiglu_norm_fwd(gate, up, weight, bias, 1e-5, 8, "reference")
