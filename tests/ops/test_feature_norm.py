"""feature_norm against explicit sums over four taps and the formula of LayerNorm, all experts of a batch at once."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_true_to, assert_within_budget, layer_norm, value_and_gradients
from test_feature_resample import four_taps, interpolate
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mova_kernels import BackendError, _compiled, backends, use_backend
from mova_kernels.ops import feature_norm
from mova_kernels.ops.feature_norm import op as op_module

pytestmark = pytest.mark.usefixtures("poisoned_memory")

EPS = 1e-3  # large enough to show
OUT = (4, 5)
# Per expert: grid, channels, rows of two samples.
EXPERTS = {
    "enlarged, all rows": ((2, 3), 19, None),
    "shrunk, a chosen row": ((7, 6), 8, [1]),
    "equal sizes, a negative row": (OUT, 16, [-1, 0]),
    "from one token, only negative rows": ((1, 1), 4, [-3, -1]),
    "nobody chose it": ((3, 3), 12, []),
}
IN_SIZES = [size for size, _, _ in EXPERTS.values()]
ROWS = [rows for _, _, rows in EXPERTS.values()]


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    try:
        return backends.choose("feature_norm", request.param, torch.device("cpu"), torch.float32)
    except BackendError as error:
        pytest.skip(str(error))


def features() -> list[Tensor]:
    return [torch.randn(2, math.prod(size), channels) for size, channels, _ in EXPERTS.values()]


def tensors(rows: Sequence[list[int] | None]) -> list[Tensor | None]:
    return [None if r is None else torch.tensor(r, dtype=torch.int64) for r in rows]


def meaningful(x: Tensor, rows: list[int] | None) -> list[int]:
    return list(range(len(x))) if rows is None else [r for r in rows if r >= 0]


def joined(results: Sequence[Tensor], rows: Sequence[list[int] | None]) -> Tensor:
    """What the results mean, without the rows that mean nothing."""
    valid = (slice(None) if r is None else [m for m, row in enumerate(r) if row >= 0] for r in rows)
    return torch.cat([y[v].flatten() for y, v in zip(results, valid, strict=True)])


def op(in_sizes=IN_SIZES, out_size=OUT, rows=ROWS, backend: str | None = None):
    return lambda *x: joined(feature_norm(x, in_sizes, out_size, tensors(rows), EPS, backend=backend), rows)


def truth(in_sizes=IN_SIZES, out_size=OUT, rows=ROWS):
    one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)

    def function(*x: Tensor) -> Tensor:
        chosen = (meaningful(t, r) for t, r in zip(x, rows, strict=True))
        resampled = (four_taps(t, s, out_size, c) for t, s, c in zip(x, in_sizes, chosen, strict=True))
        return torch.cat([layer_norm(y, one, zero, EPS).flatten() for y in resampled])

    return function


def plain(in_sizes=IN_SIZES, out_size=OUT, rows=ROWS):
    """Torch in the working dtype, which rounds after resampling."""

    def function(*x: Tensor) -> Tensor:
        chosen = (t[meaningful(t, r)] for t, r in zip(x, rows, strict=True))
        resampled = (interpolate(t, s, out_size) for t, s in zip(chosen, in_sizes, strict=True))
        return torch.cat([F.layer_norm(y, y.shape[-1:], eps=EPS).flatten() for y in resampled])

    return function


def test_reference_is_the_norm_of_the_sum_over_four_taps() -> None:
    assert_true_to(truth(), op(), [x.double() for x in features()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_budget(dtype, backend) -> None:
    assert_within_budget(truth(), op(backend=backend), plain(), features, dtype)


def test_gradcheck() -> None:
    x = [torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    torch.autograd.gradcheck(op([(2, 3), (3, 2)], (2, 3), [[1, -1, 0], None]), x)


def test_results_are_contiguous_in_the_dtype_of_the_features(backend) -> None:
    x = [t.bfloat16().transpose(1, 2).contiguous().transpose(1, 2) for t in features()]
    results = feature_norm(x, IN_SIZES, OUT, tensors(ROWS), backend=backend)
    for y, (_, channels, rows) in zip(results, EXPERTS.values(), strict=True):
        assert y.is_contiguous() and y.dtype == torch.bfloat16
        assert y.shape == (2 if rows is None else len(rows), 20, channels)


def test_negative_rows_are_read_neither_here_nor_in_the_gradient(backend) -> None:
    x = torch.randn(2, 6, 4)
    x[1] = torch.nan
    cotangent = torch.randn(2, 20, 4)
    cotangent[1] = torch.nan

    def normed(x: Tensor) -> Tensor:
        return feature_norm([x], [(2, 3)], OUT, [torch.tensor([0, -1])], backend=backend)[0]

    y, grad = value_and_gradients(normed, [x], cotangent)
    assert y[0].isfinite().all() and grad[0].isfinite().all() and not grad[1].any()


def test_rows_beyond_the_features_are_refused(backend) -> None:
    with pytest.raises(RuntimeError, match="rows must be below"):
        feature_norm([torch.zeros(2, 6, 4)], [(2, 3)], OUT, [torch.tensor([2])], backend=backend)


def test_tokens_without_variance_become_zeros(backend) -> None:
    (y,) = feature_norm([torch.full((1, 6, 4), 7.0)], [(2, 3)], OUT, [None], backend=backend)
    torch.testing.assert_close(y, torch.zeros_like(y), rtol=0, atol=1e-3)


def test_no_row_at_all(backend) -> None:
    value, grad = value_and_gradients(op([(2, 3)], OUT, [None], backend), [torch.zeros(0, 6, 4)])
    assert value.shape == (0,) and grad.shape == (0, 6, 4)


@pytest.mark.parametrize(("asked", "expected"), [(None, None), ("reference", "reference")])
def test_the_resampling_follows_the_request(asked, expected, monkeypatch) -> None:
    seen = []
    resample = op_module.feature_resample

    def spy(*arguments, backend):
        seen.append(backend)
        return resample(*arguments, backend=backend)

    monkeypatch.setattr(op_module, "feature_resample", spy)
    with use_backend("feature_norm=reference"):
        op(backend=asked)(*features())
    assert seen == [expected] * len(EXPERTS)


def test_compile(backend) -> None:
    torch._dynamo.reset()
    x = features()
    function = op(backend=backend)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(value_and_gradients(compiled, x), value_and_gradients(function, x))


def test_auto_takes_what_was_compiled_for_this_processor(monkeypatch) -> None:
    wide = torch.zeros(1, 1, 8193)
    for x, expected in ((X, "cpu"), (X.bfloat16(), "cpu"), (X.half(), "reference"), (wide, "reference")):
        place = ("feature_norm", None, x.device, x.dtype, {"channels": x.shape[2], "grid sides": 1})
        monkeypatch.setattr(_compiled, "cpu_reason", lambda: None)
        assert backends.choose(*place) == expected
        monkeypatch.setattr(_compiled, "cpu_reason", lambda: "it was never built")
        assert backends.choose(*place) == "reference"


@pytest.mark.parametrize(
    ("x", "size", "reason"),
    [
        (torch.zeros(1, 1, 8193), (1, 1), "it takes channels up to 8192, not 8193"),
        (torch.zeros(1, 32768, 1), (1, 32768), "it takes grid sides up to 32767, not 32768"),
        (torch.zeros(1, 1, 8).half(), (1, 1), "it takes float32 and bfloat16, not torch.float16"),
    ],
)
def test_cpu_is_refused_with_a_reason(x, size, reason, monkeypatch) -> None:
    monkeypatch.setattr(_compiled, "cpu_reason", lambda: None)
    with pytest.raises(BackendError, match=f"'cpu' cannot run feature_norm .*{reason}"):
        feature_norm([x], [size], OUT, [None], backend="cpu")


def test_activation_checkpointing(backend) -> None:
    x, function = features(), op(backend=backend)
    found = value_and_gradients(lambda *x: checkpoint(function, *x, use_reentrant=False), x)
    torch.testing.assert_close(found, value_and_gradients(function, x))


def test_exported_program_serves_other_batches() -> None:
    class Module(torch.nn.Module):
        def forward(self, x: Tensor, rows: Tensor) -> Tensor:
            return feature_norm([x, x], [(2, 3), (3, 2)], (4, 5), [rows, None])[0]

    examples = torch.randn(3, 6, 4), torch.tensor([2, -1])
    dynamic = ({0: torch.export.Dim.DYNAMIC}, {0: torch.export.Dim.DYNAMIC})
    program = torch.export.export(Module(), examples, dynamic_shapes=dynamic)
    for inputs in (examples, (torch.randn(5, 6, 4), torch.tensor([4, 1, 0]))):
        valid = inputs[1] >= 0
        torch.testing.assert_close(program.module()(*inputs)[valid], Module()(*inputs)[valid])
    assert "feature_norm_fwd" not in program.graph_module.code  # which would bind the program to one backend


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter takes it")
def test_triton_is_refused_with_a_reason() -> None:
    with pytest.raises(BackendError, match=r"cannot run feature_norm .*(triton is not installed|it runs on cuda)"):
        op(backend="triton")(*features())
    with use_backend("feature_norm=triton"), pytest.raises(BackendError, match="cannot run feature_norm"):
        op()(*features())


X, SIZE, R = torch.zeros(2, 6, 4), (2, 3), torch.tensor([0])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([], [], OUT, []), ValueError, "features must have at least one entry, got 0"),
        (([X, X], [SIZE], OUT, [None] * 2), ValueError, "in_sizes must have 2 entries, got 1"),
        (([X, X], [SIZE] * 2, OUT, [None]), ValueError, "rows must have 2 entries, got 1"),
        (([X], [(0, 6)], OUT, [None]), ValueError, r"in_sizes\[0\] must be two positive integers, got \(0, 6\)"),
        (([X], [SIZE], (4,), [None]), ValueError, r"out_size must be two positive integers, got \(4,\)"),
        (([X], [(3, 3)], OUT, [None]), ValueError, r"features\[0\] must have shape \(R, 9, C\), got \(2, 6, 4\)"),
        (([None], [SIZE], OUT, [None]), TypeError, r"features\[0\] must be a tensor, got 'NoneType'"),
        (([X.long()], [SIZE], OUT, [None]), TypeError, r"features\[0\] must be floating point, got torch\.int64"),
        (
            ([X, X.half()], [SIZE] * 2, OUT, [None] * 2),
            ValueError,
            r"features\[1\] must have features\[0\]'s torch\.float32, got torch\.float16",
        ),
        (
            ([X, X.to("meta")], [SIZE] * 2, OUT, [None] * 2),
            ValueError,
            r"features\[1\] must be on features\[0\]'s cpu, got .*meta",
        ),
        (([X, X], [SIZE] * 2, OUT, [None, R[0]]), ValueError, r"rows\[1\] must have shape \(M\), got \(\)"),
        (([X], [SIZE], OUT, [R.int()]), TypeError, r"rows\[0\] must be int64, got torch\.int32"),
        (([X], [SIZE], OUT, [R.to("meta")]), ValueError, r"rows\[0\] must be on the features' cpu, got .*meta"),
    ],
)
def test_bad_input(arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        feature_norm(*arguments)


def test_gradients_of_a_repeated_row_add_up(backend) -> None:
    x = torch.randn(3, 4, 8, dtype=torch.float64)
    weight = torch.randn(3, 9, 8, dtype=torch.float64)

    def gradient(x: Tensor, chosen: str) -> Tensor:
        x = x.clone().requires_grad_()
        (y,) = feature_norm([x], [(2, 2)], (3, 3), [torch.tensor([1, 0, 1])], backend=chosen)
        return torch.autograd.grad((y * weight.to(y.dtype)).sum(), x)[0]

    torch.testing.assert_close(gradient(x.float(), backend), gradient(x, "reference").float(), rtol=1e-4, atol=1e-4)
