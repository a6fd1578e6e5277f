"""The Triton kernels of feature_norm in Triton's interpreter: TRITON_INTERPRET=1 pytest tests -k triton."""

from __future__ import annotations

import itertools
import math
import os

import pytest
import torch
from helpers import assert_within_budget, value_and_gradients
from test_feature_norm import EPS, IN_SIZES, OUT, ROWS, features, joined, op, plain, tensors, truth
from torch import Tensor

from mova_kernels import BackendError, backends
from mova_kernels.ops import feature_norm

triton, tl = pytest.importorskip("triton"), pytest.importorskip("triton.language")
triton_impl = pytest.importorskip("mova_kernels.ops.feature_norm.triton_impl")

pytestmark = pytest.mark.usefixtures("triton_kernels", "poisoned_memory")
RAW = torch.ops.mova_kernels
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def kernels(in_sizes=IN_SIZES, out_size=OUT, rows=ROWS):
    return op(in_sizes, out_size, rows, "triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_budget(dtype) -> None:
    assert_within_budget(truth(), kernels(), plain(), features, dtype, draws=3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_budget_of_wide_experts(dtype) -> None:
    """A launch with every shape of tile; 21 tokens fill none of them."""
    channels = (256, 300, 700, 1536)
    problem = [(2, 3)] * 4, (3, 7), [None] * 4
    draw = lambda: [torch.randn(1, 6, c) for c in channels]  # noqa: E731
    assert_within_budget(truth(*problem), kernels(*problem), plain(*problem), draw, dtype, draws=1)


def test_more_channels_than_any_official_expert_has() -> None:
    """They need twice the warps, and give the other experts larger tiles."""
    problem = [(2, 3)] * 2, (3, 7), [None] * 2
    x = [torch.randn(1, 6, c) for c in (2100, 20)]
    torch.testing.assert_close(*(value_and_gradients(f(*problem), x) for f in (kernels, op)))


@triton.jit
def _tables_kernel(taps, readers, weights, IN, OUT: tl.constexpr, LIMIT: tl.constexpr):
    d = tl.arange(0, LIMIT)
    low, weight_low, weight_next, has_next = triton_impl._taps(d, IN, OUT)
    tl.store(taps + d, low.to(tl.float32))
    tl.store(taps + LIMIT + d, weight_low)
    tl.store(taps + 2 * LIMIT + d, weight_next)
    tl.store(taps + 3 * LIMIT + d, has_next.to(tl.float32))
    first, last = triton_impl._readers(d, IN, OUT)
    tl.store(readers + d, first)
    tl.store(readers + LIMIT + d, last)
    tl.store(weights + d[:, None] * LIMIT + d[None, :], triton_impl._weight(d[:, None], d[None, :], IN, OUT))


@pytest.mark.parametrize(("size", "out"), [*itertools.product((1, 2, 3, 5, 8), repeat=2), (37, 48), (64, 48), (14, 48)])
def test_taps_and_readers_of_an_axis(size, out) -> None:
    """Index tables, apart from the numbers, against the definition in csrc/feature_resample/taps.h."""
    taps, readers, weights = torch.empty(4, 64), torch.empty(2, 64, dtype=torch.int32), torch.empty(64, 64)
    _tables_kernel[(1,)](taps, readers, weights, size, out, 64)
    d, i = torch.arange(out)[:, None], torch.arange(size)
    position = ((2 * d + 1) * size - out).clamp(0, 2 * out * (size - 1))
    first = position // (2 * out)
    read = (i == first) | ((i == first + 1) & (size != out))
    weight = (2 * out - (position - 2 * out * i).abs()).float() / (2 * out)

    low, weight_low, weight_next, has_next = taps[:, :out, None]
    assert torch.equal((i == low) | ((i == low + 1) & has_next.bool()), read)
    assert torch.equal(torch.where(i == low, weight_low, weight_next)[read], weight[read])
    assert torch.equal((readers[0, :size] <= d) & (d < readers[1, :size]), read)
    assert torch.equal(weights[:out, :size][read], weight[read])


def test_one_expert() -> None:
    problem = [(2, 3)], OUT, [None]
    x = [torch.randn(2, 6, 8)]
    torch.testing.assert_close(*(value_and_gradients(f(*problem), x) for f in (kernels, op)))


def test_no_row_at_all() -> None:
    for rows in ([None], [[]]):
        value, grad = value_and_gradients(kernels([(2, 3)], OUT, rows), [torch.zeros(0, 6, 4)])
        assert value.shape == (0,) and grad.shape == (0, 6, 4)


def test_shapes_of_results() -> None:
    for y, x, rows in zip(
        feature_norm(features(), IN_SIZES, OUT, tensors(ROWS), backend="triton"), features(), ROWS, strict=True
    ):
        assert y.is_contiguous() and y.shape == (2 if rows is None else len(rows), 20, x.shape[2])


def test_negative_rows_are_neither_read_nor_written() -> None:
    """Where nothing is written the poison stays."""
    x, cotangent = torch.randn(2, 6, 4), torch.randn(2, 20, 4)
    x[1], cotangent[1] = torch.nan, torch.nan

    def normed(x: Tensor) -> Tensor:
        return feature_norm([x], [(2, 3)], OUT, [torch.tensor([0, -1])], backend="triton")[0]

    y, grad = value_and_gradients(normed, [x], cotangent)
    assert y[0].isfinite().all() and grad[0].isfinite().all()
    assert y[1].isnan().all() and (grad[1] == 0).all()


@pytest.mark.parametrize("out_size", [OUT, (2, 3)], ids=["resampled", "equal sizes"])
def test_nothing_beside_the_features_is_read(out_size) -> None:
    """Taps of weight 0 lie behind the last column, row and sample."""
    around = torch.full((3, 10, 12), torch.nan)
    x = around[1:2, 2:8, 4:9]
    x.normal_()
    assert all(part.isfinite().all() for part in value_and_gradients(kernels([(2, 3)], out_size, [None]), [x]))


@pytest.mark.parametrize("row", [2, 2**40])
def test_rows_beyond_the_features_are_refused_and_not_read(row) -> None:
    x = [torch.zeros(2, 6, 4)] * 2
    with pytest.raises(RuntimeError, match="rows must be below the number of the features' rows"):
        kernels([(2, 3)] * 2, OUT, [None, [0, row]])(*x)


def test_rows_may_be_slices() -> None:
    rows = torch.tensor([9, 1, 0, 9])[1:3]
    x = torch.randn(2, 6, 4)
    found, expected = (feature_norm([x], [(2, 3)], OUT, [r], backend="triton")[0] for r in (rows, rows.clone()))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_strides_are_honoured() -> None:
    """Features may be slices of wider ones, every other sample, or have channels that are not adjacent."""
    x = features()
    expected = value_and_gradients(kernels(), x)
    wide = [torch.cat([t, t], 2)[..., t.shape[2] :] for t in x]
    samples = [t.repeat_interleave(2, 0)[::2] for t in x]
    channels_first = [t.mT.contiguous().mT for t in x]
    for views in (wide, samples, channels_first):
        torch.testing.assert_close(value_and_gradients(kernels(), views), expected, rtol=0, atol=0)


def test_strides_of_gradients_are_honoured() -> None:
    sizes = [2, 3, 2, 2]
    results, rstds = RAW.feature_norm_fwd([torch.randn(2, 6, 4)], [None], sizes, EPS, "triton")
    wide = torch.randn(2, 4, 8)
    for grad in (wide[..., 2:6], wide[..., ::2], torch.ones(()).expand(2, 4, 4)):
        found, expected = (
            RAW.feature_norm_bwd([g], results, rstds, [None], [2], sizes, "triton")[0]
            for g in (grad, grad.contiguous())
        )
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_saved_statistics() -> None:
    x = torch.randn(1, 20, 8)
    _, (rstd,) = RAW.feature_norm_fwd([x], [None], [*OUT, *OUT], EPS, "triton")
    torch.testing.assert_close(rstd, (x.var(2, correction=0) + EPS).rsqrt())


def test_the_features_are_not_kept_for_the_gradient() -> None:
    x = [t.requires_grad_() for t in features()]
    y = feature_norm(x, IN_SIZES, OUT, tensors(ROWS), backend="triton")
    kept = [t.untyped_storage().data_ptr() for t in y[0].grad_fn.saved_tensors if t is not None]
    assert kept and not set(kept) & {t.untyped_storage().data_ptr() for t in x}


def test_same_bits_every_time() -> None:
    x = features()
    first, second = (value_and_gradients(kernels(), x) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_only_some_inputs_need_gradients() -> None:
    x = features()
    (grad,) = torch.autograd.grad(kernels()(x[0].requires_grad_(), *x[1:]).sum(), x[0])
    assert grad.shape == x[0].shape


def test_only_some_results_are_used() -> None:
    x = [t.requires_grad_() for t in features()]
    cotangent = torch.randn(2, 20, 19)
    found, expected = (
        torch.autograd.grad(feature_norm(x, IN_SIZES, OUT, tensors(ROWS), backend=b)[0], x[0], cotangent)
        for b in ("triton", "reference")
    )
    torch.testing.assert_close(found, expected)


def test_opcheck() -> None:
    rows, sizes = tensors([[1, 0], None]), [2, 3, 4, 5, 4, 5]
    x = [torch.randn(6, 3, 4).transpose(0, 1), torch.randn(3, 20, 9)[..., 2:6]]
    torch.library.opcheck(RAW.feature_norm_fwd.default, (x, rows, sizes, EPS, "triton"))
    results, rstds = RAW.feature_norm_fwd(x, rows, sizes, EPS, "triton")
    grads = [torch.randn_like(y) for y in results]
    torch.library.opcheck(RAW.feature_norm_bwd.default, (grads, results, rstds, rows, [3, 3], sizes, "triton"))


def test_compile() -> None:
    def normed(x: Tensor, rows: Tensor) -> Tensor:
        return joined(feature_norm([x, x + 1], [(2, 3)] * 2, OUT, [rows, None], backend="triton"), [None, None])

    torch._dynamo.reset()
    compiled = torch.compile(normed, fullgraph=True, backend="aot_eager", dynamic=True)
    for count in (3, 5):
        x, rows = torch.randn(count, 6, 4), torch.arange(count - 1)
        found, expected = (value_and_gradients(lambda x, f=f, rows=rows: f(x, rows), [x]) for f in (compiled, normed))
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_what_changes_from_batch_to_batch_never_compiles_anew() -> None:
    """Triton specialises on integers in tuples that are 1 or divisible by 16: no disguised number is."""
    numbers = triton_impl._unspecialised(range(100))
    assert len(set(numbers)) == 100 and all(n != 1 and n % 16 for n in numbers)


@pytest.mark.parametrize(
    ("x", "in_size", "out_size", "reason"),
    [
        (torch.zeros(1, 6, 4097), (2, 3), OUT, "it takes channels up to 4096, not 4097"),
        (torch.zeros(1, 6, 4), (2, 3), (1, 32768), "it takes grid sides up to 32767, not 32768"),
        (torch.zeros(1, 6, 4).double(), (2, 3), OUT, r"it takes float32, bfloat16 and float16, not torch\.float64"),
    ],
    ids=["channels", "grid", "dtype"],
)
def test_other_sizes_are_refused_with_a_reason(x, in_size, out_size, reason) -> None:
    with pytest.raises(BackendError, match=f"cannot run feature_norm .* {reason}"):
        kernels([in_size], out_size, [None])(x)


def test_auto_does_not_take_the_interpreter() -> None:
    assert backends.choose("feature_norm", None, torch.device("cpu"), torch.float32) != "triton"


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="it is about the interpreter")
def test_bfloat16_is_refused_where_the_interpreter_is_wrong_about_it(monkeypatch) -> None:
    monkeypatch.undo()  # of the fixture triton_kernels
    with pytest.raises(BackendError, match="interpreter"):
        kernels()(*(x.bfloat16() for x in features()))


def test_grids_are_not_taken_for_each_other() -> None:
    """Height and width differ in all grids, and each token of the result knows its place."""
    sizes = [(2, 7), (6, 3)]
    x = [torch.randn(2, math.prod(s), 8) for s in sizes]
    problem = sizes, (3, 5), [None, [1, 0]]
    torch.testing.assert_close(*(value_and_gradients(f(*problem), x) for f in (kernels, op)))


def test_a_repeated_row_is_refused_where_its_gradients_would_have_to_be_added() -> None:
    x, rows = torch.randn(3, 4, 16), [torch.tensor([1, -1, 0, -1, 1])]
    (found,) = feature_norm([x], [(2, 2)], (3, 3), rows, backend="triton")
    assert torch.equal(found[0], found[4])
    with pytest.raises(RuntimeError, match=r"rows\[0\] must not repeat a row"):
        feature_norm([x.requires_grad_()], [(2, 2)], (3, 3), rows, backend="triton")
    feature_norm([x], [(2, 2)], (3, 3), [rows[0][:4]], backend="triton")[0].sum().backward()
