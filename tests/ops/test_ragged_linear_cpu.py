"""ragged_linear in C++, on every instruction set of this processor.

Features that are resampled behind the projection, then the parts that cpu_impl calls.
"""

from __future__ import annotations

import pytest
import torch
from helpers import ROUTINGS, assert_threads_do_not_matter, check_budget, mask
from torch import Tensor

from mova_kernels import BackendError, RaggedPairs
from mova_kernels.ops import feature_norm, ragged_linear
from mova_kernels.ops.feature_norm.op import centred_features, resampling_may_wait
from mova_kernels.ops.ragged_linear import cpu_impl, reference
from mova_kernels.ops.ragged_linear.op import _pending

pytestmark = pytest.mark.usefixtures("poisoned_memory", "isa")

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
OUT, OUTPUTS = (6, 7), 40
SIZES = ((3, 5), (1, 1), OUT)  # the last one is resampled at once
WIDTHS = (70, 33, 20)
RAW = torch.ops.mova_kernels


def problem(selected: Tensor, dtype: torch.dtype, mean: float = 0) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Features of all samples, (g, b) per expert and two weights per expert, the gradients of both projections."""
    features = [
        (torch.randn(len(selected), h * w, c) + mean * torch.randn(len(selected), h * w, 1)).to(dtype)
        for (h, w), c in zip(SIZES, WIDTHS, strict=True)
    ]
    parameters = [t for c in WIDTHS for t in (1 + torch.randn(c) / 4, torch.randn(c))]
    parameters += [torch.randn(OUTPUTS, c) for _ in range(2) for c in WIDTHS]
    grads = [torch.randn(int(selected.sum()), OUT[0] * OUT[1], OUTPUTS).to(dtype) for _ in range(2)]
    return features, [p.to(dtype) for p in parameters], grads


def project(selected: Tensor, features, parameters, grads, later: bool) -> list[Tensor]:
    """Keys and values and the gradients of all parameters."""
    pairs = RaggedPairs.from_routing(selected)
    parameters = [p.detach().requires_grad_() for p in parameters]
    rows = [column.nonzero().squeeze(1) for column in selected.T]
    if later:
        x = [centred_features(f, s, OUT, r) for f, s, r in zip(features[:2], SIZES[:2], rows[:2], strict=True)]
        x += feature_norm(features[2:], SIZES[2:], OUT, rows[2:])
    else:
        x = feature_norm(features, SIZES, OUT, rows, backend="reference")
    affines = [(parameters[2 * e], parameters[2 * e + 1]) for e in range(3)]
    outputs = ragged_linear(
        x, pairs, affines, [parameters[6:9], parameters[9:]], backend=None if later else "reference"
    )
    found = torch.autograd.grad(outputs, parameters, grads, allow_unused=True) if len(grads[0]) else []
    return [*(y.detach() for y in outputs), *(torch.zeros(1) if g is None else g for g in found)]


@DTYPES
@pytest.mark.parametrize("mean", [0, 20])
def test_error_budget(mean, dtype) -> None:
    """Also where a token's mean is far larger than its deviation: rounded before it is taken out, it would dominate."""
    selected = mask("xx.", "x.x", ".xx", "xxx")
    features, parameters, grads = problem(selected, dtype, mean)
    wide = ([t.double() for t in tensors] for tensors in (features, parameters, grads))
    truth = project(selected, *wide, later=False)
    rival = project(selected, features, parameters, grads, later=False)
    found = project(selected, features, parameters, grads, later=True)
    for i, (a, t, p) in enumerate(zip(found, truth, rival, strict=True)):
        check_budget(f"output {i}", a, t, p, norms=(2,), times=1.5)


@pytest.mark.parametrize("name", ROUTINGS)
def test_ragged_cases(name) -> None:
    features, parameters, grads = problem(ROUTINGS[name], torch.float32)
    for f, column in zip(features, ROUTINGS[name].T, strict=True):
        f[~column] = torch.nan
    found, expected = (project(ROUTINGS[name], features, parameters, grads, later) for later in (True, False))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_pair_takes_its_row() -> None:
    """Blocks may keep fewer pairs than the features have rows."""
    selected, kept = mask("xxx", "x..", "xx."), mask("x..", "x..", ".x.")
    features, parameters, _ = problem(selected, torch.float32)
    everything = project(selected, features, parameters, [torch.empty(0)], later=True)
    x = [centred_features(f, s, OUT, None) for f, s in zip(features[:2], SIZES[:2], strict=True)]
    x += feature_norm(features[2:], SIZES[2:], OUT, [None])
    pairs = RaggedPairs.from_routing(selected, [False] * 3).topk(kept, 1)
    affines = [(parameters[2 * e], parameters[2 * e + 1]) for e in range(3)]
    found = ragged_linear(x, pairs, affines, [parameters[6:9], parameters[9:]])
    for a, e in zip(found, everything, strict=True):
        torch.testing.assert_close(
            a, e[[0, 1, 4]]
        )  # pairs (0, 0), (1, 0), (2, 1) of (0, 0), (1, 0), (2, 0), (0, 1), ...


@DTYPES
def test_threads_do_not_change_results(dtype, isa) -> None:
    if isa == "base" and dtype == torch.float32:
        pytest.skip("the product is torch's")
    selected = mask("xx.", "x.x")
    arguments = problem(selected, dtype)
    assert_threads_do_not_matter(lambda: project(selected, *arguments, later=True))


def test_opcheck() -> None:
    selected = mask("xx.", "x.x")
    features, parameters, grads = problem(selected, torch.float32)
    pairs = RaggedPairs.from_routing(selected)
    rows = [column.nonzero().squeeze(1) for column in selected.T]
    x = [centred_features(f, s, OUT, r) for f, s, r in zip(features[:2], SIZES[:2], rows[:2], strict=True)]
    pending = _pending([*x, None])
    sources = [*(c.tokens for c in x), *feature_norm(features[2:], SIZES[2:], OUT, rows[2:])]
    inputs = (sources, False, list(pairs.tables), parameters[0:6:2], parameters[1:6:2], parameters[6:], [], *pending)
    torch.library.opcheck(RAW.ragged_linear_fwd.default, (*inputs, torch.float32, "cpu"))
    torch.library.opcheck(RAW.ragged_linear_bwd.default, (grads, *inputs, False, "cpu"))


def test_when_it_pays() -> None:
    coarse, fine = torch.zeros(1, 4, 200), torch.zeros(1, 36, 200)
    assert resampling_may_wait(coarse, (2, 2), (6, 6))
    assert not resampling_may_wait(coarse[..., :70], (2, 2), (6, 6))  # too narrow
    assert not resampling_may_wait(fine, (6, 6), (6, 6)) and not resampling_may_wait(fine, (6, 6), (4, 4))
    assert not resampling_may_wait(coarse.double(), (2, 2), (6, 6))
    trained = coarse.clone().requires_grad_()
    assert not resampling_may_wait(trained, (2, 2), (6, 6))
    with torch.no_grad():
        assert resampling_may_wait(trained, (2, 2), (6, 6))


def test_bad_input() -> None:
    x = torch.zeros(2, 4, 8)
    with pytest.raises(ValueError, match="rows must be from 0 to 1, got"):
        centred_features(x, (2, 2), OUT, torch.tensor([-1]))
    with pytest.raises(ValueError, match=r"x must have shape \(R, 4, C\), got \(2, 3, 8\)"):
        centred_features(x[:, :3], (2, 2), OUT, None)
    centred = centred_features(x, (2, 2), OUT, None)
    pairs, affine = RaggedPairs.from_routing(mask("x", "x")), [(torch.ones(8), torch.zeros(8))]
    with pytest.raises(BackendError, match="it takes no CentredFeatures"):
        ragged_linear([centred], pairs, affine, [[torch.zeros(3, 8)]], backend="reference")
    raw = [[centred.tokens], False, list(pairs.tables), [affine[0][0]], [affine[0][1]], [torch.zeros(3, 8)], []]
    sizes = [*centred.in_size, *centred.out_size]
    with pytest.raises(ValueError, match="rstds must be empty for the backend reference, got 1"):
        torch.ops.mova_kernels.ragged_linear_fwd(*raw, [centred.rstd], sizes, torch.float32, "reference")
    with pytest.raises(ValueError, match=r"x\[0\]\.rstd must have shape"):
        ragged_linear([centred._replace(rstd=centred.rstd[:1])], pairs, affine, [[torch.zeros(3, 8)]])


LENGTHS = [1, 2, 15, 17, 31, 33, 64, 65, 100, 200]  # around the vectors of every instruction set


def check_joined(found: list, truth: list, plain: list) -> None:
    """Of results of every width together: of few entries it is luck how large the error is."""
    for results in zip(*(zip(*rows, strict=True) for rows in (found, truth, plain)), strict=True):
        actual, expected, rival = (torch.cat([t.flatten() for t in kind]) for kind in results)
        check_budget("", actual, expected, rival.to(actual.dtype), (2,), times=1.5)


@pytest.mark.parametrize("rows", [1, 3, 16, 17, 300])  # around the 16 and 256 rows that are summed on their own
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weight_gradients(dtype, rows) -> None:
    """With strided operands, and weights whose channels are not adjacent."""
    found, truth, plain = [], [], []
    for width in LENGTHS:
        dy = torch.randn(70, rows + 3)[:, 1:-2].to(dtype)
        x, scale, shift = (torch.randn(size).to(dtype) for size in ((70, width), width, width))
        for weight in (torch.randn(rows, width + 2).to(dtype)[:, 2:], torch.randn(width, rows).to(dtype).t()):
            arguments = (dy, x, scale, shift, weight)
            dy, *others = arguments
            found.append(cpu_impl.weight_gradients(dy, cpu_impl.column_sums(dy), *others))
            truth.append(reference.layer_gradients(0, *(t.double() for t in arguments)))
            plain.append(reference.layer_gradients(0, *arguments))
    check_joined(found, truth, plain)


@pytest.mark.parametrize("rows", [0, 1, 3, 16, 17, 300, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_column_sums(dtype, rows) -> None:
    wide = [(torch.randn(rows, 2 * width) + 1).to(dtype) for width in LENGTHS]
    views = [view for x in wide for view in (*x.chunk(2, 1), x[:, ::2])]
    found, truth = ([[f(x)] for x in views] for f in (cpu_impl.column_sums, lambda x: x.double().sum(0)))
    check_joined(found, truth, [[x.sum(0, dtype=torch.float32)] for x in views])


@pytest.mark.all_threads
def test_does_not_depend_on_threads(monkeypatch) -> None:
    """What torch makes of a matrix product is its own affair."""
    dy, x, scale, shift, weight = (torch.randn(size) for size in ((3000, 300), (3000, 500), 500, 500, (300, 500)))
    before, found, folded = torch.get_num_threads(), [], torch.randn(300, 500)
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            monkeypatch.setattr(cpu_impl, "product", lambda *_: folded)
            found.append(cpu_impl.weight_gradients(dy, cpu_impl.column_sums(dy), x, scale, shift, weight))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(other, found[0], strict=True))


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"C must be in \[0, .*\], got -1"):
        cpu_impl._sum(x=None, sum=None, R=1, C=-1, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"dtype must be in \[0, 1\], got 2"):
        x = torch.zeros(1, 1, dtype=torch.float16)
        cpu_impl.weight_gradients(x, x[0], x, x[0], x[0], x)
