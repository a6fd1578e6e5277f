"""expert_attention against the explicit softmax of rotated scores."""

from __future__ import annotations

import os

import pytest
import torch
from helpers import assert_true_to, assert_within_budget, value_and_gradients
from torch import Tensor

from mova_kernels import BackendError, backends
from mova_kernels.ops import expert_attention, rope2d_table

pytestmark = pytest.mark.usefixtures("poisoned_memory")

RAW = torch.ops.mova_kernels

# pairs, grid side, heads, head width
SHAPES = {
    "usual": (2, 3, 2, 8),
    "one head": (1, 3, 1, 4),
    "one token attends to itself": (3, 1, 2, 4),
    "more tokens than one tile of a kernel": (1, 9, 1, 4),
}
shapes = pytest.mark.parametrize(("num_pairs", "side", "heads", "width"), SHAPES.values(), ids=SHAPES)


def problem(num_pairs: int, side: int, heads: int, width: int) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
    return list(torch.randn(3, num_pairs, side * side, heads * width)), rope2d_table(side, width)


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    try:
        return backends.choose("expert_attention", request.param, torch.device("cpu"), torch.float32)
    except BackendError as error:
        pytest.skip(str(error))


def op(tables: tuple[Tensor, Tensor], heads: int, backend: str | None = None):
    return lambda q, k, v: expert_attention(q, k, v, *tables, heads, backend=backend)


def truth(tables: tuple[Tensor, Tensor], heads: int):
    """Per pair, head and query token: complex rotation, exponentials over their sum, weighted values."""
    factor = torch.complex(tables[0].double(), tables[1].double())[:, ::2]

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        width = q.shape[-1] // heads
        outputs = []
        for h in range(heads):
            part = slice(h * width, (h + 1) * width)
            turned_q, turned_k = (torch.view_as_complex(t[..., part].unflatten(-1, (-1, 2))) * factor for t in (q, k))
            scores = torch.einsum("psc,ptc->pst", turned_q, turned_k.conj()).real / width**0.5
            odds = (scores - scores.amax(-1, keepdim=True).detach()).exp()
            outputs.append(torch.einsum("pst,ptd->psd", odds / odds.sum(-1, keepdim=True), v[..., part]))
        return torch.cat(outputs, -1)

    return function


def plain(tables: tuple[Tensor, Tensor], heads: int):
    """The official formula in the working dtype: scores are stored and rounded, tables are rounded."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cos, sin = (t.to(q.dtype) for t in tables)
        q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        q, k = (t * cos + torch.stack((-t[..., 1::2], t[..., ::2]), -1).flatten(-2) * sin for t in (q, k))
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

    return function


@shapes
def test_reference_is_the_explicit_softmax(num_pairs, side, heads, width) -> None:
    inputs, tables = problem(num_pairs, side, heads, width)
    assert_true_to(truth(tables, heads), op(tables, heads), [t.double() for t in inputs])


# With one token the gradients of q and k are differences of equals. Stored scores give an exact 0, fused kernels only
# its rounding, so that there is nothing to measure a budget by.
@pytest.mark.parametrize("name", [name for name in SHAPES if name != "one token attends to itself"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_budget(name, dtype, backend) -> None:
    num_pairs, side, heads, width = SHAPES[name]
    tables = rope2d_table(side, width)
    assert_within_budget(
        truth(tables, heads),
        op(tables, heads, backend),
        plain(tables, heads),
        lambda: problem(num_pairs, side, heads, width)[0],
        dtype,
        times=1.5,
    )


def test_gradcheck() -> None:
    inputs, tables = problem(2, 2, 2, 4)
    torch.autograd.gradcheck(op(tables, 2), [t.double().requires_grad_() for t in inputs])


def test_pairs_do_not_see_each_other(backend) -> None:
    inputs, tables = problem(3, 3, 2, 8)
    together = op(tables, 2, backend)(*inputs)
    inputs = [t.clone() for t in inputs]
    for t in inputs:
        t[1] = torch.nan
    others = op(tables, 2, backend)(*inputs)
    assert others[1].isnan().all()
    torch.testing.assert_close(others[::2], together[::2])


def test_large_scores_do_not_overflow(backend) -> None:
    (q, k, v), tables = problem(1, 3, 1, 4)
    for part in value_and_gradients(op(tables, 1, backend), (1e4 * q, 1e4 * k, v)):
        assert part.isfinite().all()


def test_strides_are_honoured(backend) -> None:
    """Queries, keys and values may be slices of one projection, and channels need not be adjacent."""
    inputs, tables = problem(2, 3, 2, 8)
    slices = torch.cat(inputs, -1).split(16, -1)
    turned = [t.mT.contiguous().mT for t in inputs]
    expected, *found = (value_and_gradients(op(tables, 2, backend), x) for x in (inputs, slices, turned))
    for parts in found:
        torch.testing.assert_close(parts, expected)


def test_no_pair(backend) -> None:
    inputs, tables = problem(0, 3, 2, 8)
    value, *gradients = value_and_gradients(op(tables, 2, backend), inputs)
    assert value.shape == (0, 9, 16) and all(g.shape == (0, 9, 16) for g in gradients)


def test_count_leaves_the_valid_pairs_as_they_are(backend) -> None:
    inputs, tables = problem(3, 3, 2, 8)
    found = expert_attention(*inputs, *tables, 2, num_valid=torch.tensor([2]), backend=backend)
    torch.testing.assert_close(found[:2], op(tables, 2, backend)(*inputs)[:2], rtol=0, atol=0)


@pytest.mark.parametrize("num_valid", [None, 2])
def test_opcheck(num_valid) -> None:
    inputs, tables = problem(3, 3, 2, 8)
    rest = (*tables, 2, None if num_valid is None else torch.tensor([num_valid]), "cpu")
    try:
        backends.choose("expert_attention", "cpu", inputs[0].device, inputs[0].dtype)
    except BackendError as error:
        pytest.skip(str(error))
    torch.library.opcheck(RAW.expert_attention_fwd.default, (*inputs, *rest))
    out, lse = RAW.expert_attention_fwd(*inputs, *rest)
    torch.library.opcheck(RAW.expert_attention_bwd.default, (out, *inputs, out, lse, *rest))


def test_wide_heads_are_left_to_the_reference() -> None:
    inputs, tables = problem(1, 2, 1, 260)
    op(tables, 1)(*inputs)
    with pytest.raises(BackendError, match="it takes head widths from 2 to 256 in steps of 2, not 260"):
        op(tables, 1, "cpu")(*inputs)


@pytest.mark.parametrize(
    ("dtype", "reason"),
    [(torch.float32, "triton is not installed|it runs on cuda tensors"), (torch.float64, "it takes float32, bfloat16")],
)
def test_triton_is_refused_with_a_reason(dtype, reason) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1" and dtype == torch.float32:
        pytest.skip("the interpreter takes it")
    inputs, tables = problem(1, 3, 1, 32)
    with pytest.raises(BackendError, match=f"backend 'triton' cannot run expert_attention on cpu {dtype}: ({reason})"):
        expert_attention(*(t.to(dtype) for t in inputs), *tables, 1, backend="triton")


Q, TABLE = torch.zeros(2, 9, 16), torch.zeros(9, 8)
NUM_VALID = torch.tensor([1])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((None, Q, Q, TABLE, TABLE, 2), TypeError, "q must be a tensor, got 'NoneType'"),
        ((Q[0], Q, Q, TABLE, TABLE, 2), ValueError, r"q must have shape \(P, L, H\*D\), got \(9, 16\)"),
        ((Q, Q[:1], Q, TABLE, TABLE, 2), ValueError, r"k must have shape \(2, 9, 16\), got \(1, 9, 16\)"),
        ((Q, Q, Q[:, :4], TABLE, TABLE, 2), ValueError, r"v must have shape \(2, 9, 16\), got \(2, 4, 16\)"),
        ((Q, Q, Q, TABLE[:1], TABLE, 2), ValueError, r"cos must have shape \(9, 8\), got \(1, 8\)"),
        ((Q, Q, Q, TABLE, TABLE[:, :2], 2), ValueError, r"sin must have shape \(9, 8\), got \(9, 2\)"),
        ((Q, Q, Q, TABLE, TABLE, 3), ValueError, "num_heads must divide 16, got 3"),
        ((Q, Q, Q, TABLE, TABLE, 0), ValueError, "num_heads must divide 16, got 0"),
        ((Q.long(), Q, Q, TABLE, TABLE, 2), TypeError, r"q must be floating point, got torch\.int64"),
    ],
)
def test_bad_input(arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        expert_attention(*arguments)


@pytest.mark.parametrize(
    ("num_valid", "error", "message"),
    [
        (1, TypeError, "num_valid must be a tensor, got 'int'"),
        (NUM_VALID[0], ValueError, r"num_valid must have shape \(1\), got \(\)"),
        (NUM_VALID.int(), TypeError, r"num_valid must be int64, got torch\.int32"),
        (NUM_VALID.to("meta"), ValueError, "num_valid must be on q's cpu, got device"),
    ],
)
def test_bad_num_valid(num_valid, error, message) -> None:
    with pytest.raises(error, match=message):
        expert_attention(Q, Q, Q, TABLE, TABLE, 2, num_valid=num_valid)


@pytest.mark.parametrize(
    ("k", "error", "message"),
    [
        (Q.double(), ValueError, r"k must have q's torch\.float32, got torch\.float64"),
        (Q.to("meta"), ValueError, "k must be on q's cpu, got device"),
    ],
)
def test_keys_unlike_queries(k, error, message) -> None:
    with pytest.raises(error, match=message):
        expert_attention(Q, k, Q, TABLE, TABLE, 2)
