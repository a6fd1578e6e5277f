"""feature_norm: the features of all experts on the base grid and normalised, once for all blocks of an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ... import _compiled, _triton, backends
from ..._checks import check, check_device, check_floats, check_tensor
from ..._gradients import need_reference, of_reference
from ..._library import define
from ..._plain import is_plain, only_reference, other_derivatives
from ..feature_resample import feature_resample
from ..feature_resample.reference import feature_resample as reference_resample
from . import cpu_impl, reference

LIMITS = {
    "channels": {"triton": range(4097), "cpu": range(8193)},
    "grid sides": {"triton": range(32768), "cpu": range(32768)},
}

backends.register("feature_norm", _triton.BACKEND, _compiled.BACKEND, limits=LIMITS)


def feature_norm(
    features: Sequence[Tensor],
    in_sizes: Sequence[tuple[int, int]],
    out_size: tuple[int, int],
    rows: Sequence[Tensor | None],
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """(y - mean(y)) / sqrt(var(y) + eps) per token of y = feature_resample(features[e], ...), for every expert e.

    This is the part of a LayerNorm that has no parameters, so that blocks with different ones can share it. ``triton``
    does all experts in one launch. It and ``cpu`` keep y in fp32; ``reference`` rounds y to the dtype of the features,
    as the official code does.

    Args:
        features: per expert (R_e, h_e*w_e, C_e) row-major tokens, float, of one dtype and device; any strides.
        in_sizes: per expert (h_e, w_e).
        out_size: (H, W).
        rows: per expert (M_e,) int64 on the features' device: the row of ``features[e]`` for each row of the result,
            for a negative one nothing is read, neither here nor of its gradient, and the result means nothing. Where
            ``triton`` computes gradients of the features, no row may repeat. Or None: all rows, M_e = R_e.
        eps: added to the variance, which is the biased one.
        backend: see :mod:`mova_kernels.backends`. ``triton`` takes up to 4096 channels, ``cpu`` up to 8192, and both
            grids of up to 32767 per side.

    Returns:
        Per expert (M_e, H*W, C_e) in the dtype of the features, contiguous. Source: the alignment of expert features
        and the LayerNorm before keys and values in MoVA (arXiv 2404.13046).

    Raises:
        TypeError, ValueError: an argument of the wrong type or shape.
        RuntimeError: a value in ``rows[e]`` is not below R_e, or repeats where it must not (on a GPU: a device-side
            assertion).
        backends.BackendError: the requested backend cannot run here, or not with these sizes.
    """
    check(len(features) >= 1, "features", "must have at least one entry", len(features))
    for name, values in (("in_sizes", in_sizes), ("rows", rows)):
        check(len(values) == len(features), name, f"must have {len(features)} entries", len(values))
    for name, size in (*((f"in_sizes[{e}]", size) for e, size in enumerate(in_sizes)), ("out_size", out_size)):
        check(len(size) == 2 and min(size) >= 1, name, "must be two positive integers", tuple(size))
    for e, (x, size, r) in enumerate(zip(features, in_sizes, rows, strict=True)):
        name, first = f"features[{e}]", features[0]
        check_floats(name, x, ("R", size[0] * size[1], "C"))
        check(x.dtype == first.dtype, name, f"must have features[0]'s {first.dtype}", x.dtype)
        check_device(name, x, "features[0]", first)
        if r is not None:
            check_tensor(f"rows[{e}]", r, ("M",))
            check(r.dtype == torch.int64, f"rows[{e}]", "must be int64", r.dtype, TypeError)
            check_device(f"rows[{e}]", r, "the features", x)
    sizes = [side for size in (*in_sizes, out_size) for side in size]
    selected = backends.choose(
        "feature_norm", backend, features[0].device, features[0].dtype, _sizes(features, sizes), features
    )
    if selected == "reference":
        sources = zip(features, in_sizes, rows, strict=True)
        # The request holds for both ops: backend="reference" means both.
        resampled = [feature_resample(x, size, out_size, r, backend=backend) for x, size, r in sources]
        return reference.feature_norm(resampled, eps)
    if torch.is_grad_enabled() and any(x.requires_grad for x in features):
        if selected == "triton":  # its backward pass would keep only one of the repeated row's gradients
            for e, r in enumerate(rows):
                if r is not None:
                    ordered = r.sort().values
                    differ = (ordered[1:] != ordered[:-1]) | (ordered[1:] < 0)
                    torch._assert_async(differ.all(), f"rows[{e}] must not repeat a row")
        return _FeatureNorm.apply(sizes, eps, selected, *rows, *features)[: len(features)]
    return tuple(_fwd(features, rows, sizes, eps, selected)[0])


class CentredFeatures(NamedTuple):
    """Features of one expert which ragged_linear resamples and scales behind its projection, on CPUs.

    By linearity the result is the same: ``rstd * resampled tokens`` is what feature_norm gives. Not differentiable.
    """

    tokens: Tensor  # (M, h*w, C): x - mean(x) per token
    rstd: Tensor  # (M, H*W) fp32
    in_size: Sequence[int]
    out_size: Sequence[int]


def aligned_features(
    features: Sequence[Tensor],
    in_sizes: Sequence[tuple[int, int]],
    out_size: tuple[int, int],
    rows: Sequence[Tensor | None],
    eps: float = 1e-5,
    *,
    may_wait: bool,
) -> list[Tensor | CentredFeatures]:
    """:func:`feature_norm` for ragged_linear: arguments as there, checked.

    With ``may_wait``, for which no row may be negative, features are CentredFeatures where that is faster.
    """
    results: list[Tensor | CentredFeatures | None] = []
    for x, size, r in zip(features, in_sizes, rows, strict=True):
        waits = may_wait and resampling_may_wait(x, size, out_size)
        results.append(centred_features(x, size, out_size, r, eps) if waits else None)
    now = [e for e, result in enumerate(results) if result is None]
    if now:
        arguments = [features[e] for e in now], [in_sizes[e] for e in now], out_size, [rows[e] for e in now]
        for e, result in zip(now, feature_norm(*arguments, eps), strict=True):
            results[e] = result
    return results  # type: ignore[return-value]


def centred_features(
    x: Tensor, in_size: tuple[int, int], out_size: tuple[int, int], rows: Tensor | None, eps: float = 1e-5
) -> CentredFeatures:
    """The first part of :func:`feature_norm` for one expert: arguments as there, but no row is negative."""
    check_floats("x", x, ("R", in_size[0] * in_size[1], "C"))
    if rows is not None:
        check_tensor("rows", rows, ("M",))
        check_device("rows", rows, "x", x)
        check(bool(((rows >= 0) & (rows < x.shape[0])).all()), "rows", f"must be from 0 to {x.shape[0] - 1}", rows)
    sizes = [*in_size, *out_size]
    backends.choose("feature_norm", "cpu", x.device, x.dtype, _sizes([x], sizes), [x])
    return CentredFeatures(*_centre(x.detach(), rows, sizes, eps), in_size, out_size)  # type: ignore[call-arg]


def resampling_may_wait(x: Tensor, in_size: tuple[int, int], out_size: tuple[int, int]) -> bool:
    """Whether it is faster to project the features of a coarse grid first: on a CPU, if they need no gradient.

    A product of C channels is saved for each token that the grid lacks. Resampling its result costs as much as a
    product of 64 (benchmarks/ops/bench_ragged_linear.py), whatever the number of outputs.
    """
    tokens, length = in_size[0] * in_size[1], out_size[0] * out_size[1]
    if torch.compiler.is_compiling() or not is_plain(x) or (length - tokens) * x.shape[2] <= 64 * length:
        return False
    if (torch.is_grad_enabled() and x.requires_grad) or only_reference((x,)) or other_derivatives():
        return False  # in forward-mode AD, the weights may have a tangent
    sizes = _sizes([x], [*in_size, *out_size])
    return (
        backends.choose("feature_norm", None, x.device, x.dtype, sizes) == "cpu"
        and backends.choose("ragged_linear", None, x.device, x.dtype) == "cpu"
    )


def _sizes(features: Sequence[Tensor], sizes: Sequence[int]) -> dict[str, int]:
    return {"channels": max(x.shape[2] for x in features), "grid sides": max(sizes)}


def _forward_kernel(features, rows, sizes, eps, backend):
    results, rstds, rows_fit = backends.implementation(
        "feature_norm", backend, features[0], _sizes(features, sizes)
    ).forward(features, rows, sizes, eps)
    if rows_fit is not None:  # on a GPU the assertion runs on the stream
        torch._assert_async(rows_fit, "rows must be below the number of the features' rows")
    return results, rstds


def _backward_kernel(grads, results, rstds, rows, num_rows, sizes, backend):
    return backends.implementation("feature_norm", backend, grads[0], _sizes(grads, sizes)).backward(
        grads, results, rstds, rows, num_rows, sizes
    )


def _forward_fake(features, rows, sizes, eps, backend):
    length = sizes[-2] * sizes[-1]
    counts = [x.shape[0] if r is None else r.shape[0] for x, r in zip(features, rows, strict=True)]
    results = [x.new_empty((m, length, x.shape[2])) for x, m in zip(features, counts, strict=True)]
    return results, [y.new_empty(y.shape[:2], dtype=torch.float32) for y in results]


def _backward_fake(grads, results, rstds, rows, num_rows, sizes, backend):
    tokens = [h * w for h, w in zip(sizes[:-2:2], sizes[1:-2:2], strict=True)]
    return [y.new_empty((r, t, y.shape[2])) for y, r, t in zip(results, num_rows, tokens, strict=True)]


def _centring_kernel(x, rows, sizes, eps):
    return cpu_impl.centred(x, rows, sizes[:2], sizes[2:], eps)


def _centring_fake(x, rows, sizes, eps):
    m = x.shape[0] if rows is None else rows.shape[0]
    return x.new_empty((m, *x.shape[1:])), x.new_empty((m, sizes[2] * sizes[3]), dtype=torch.float32)


# ``sizes`` is h_0, w_0, h_1, w_1, ..., H, W.
_fwd = define(
    "feature_norm_fwd",
    "(Tensor[] features, Tensor?[] rows, SymInt[] sizes, float eps, str backend) -> (Tensor[], Tensor[])",
    _forward_kernel,
    _forward_fake,
)
_centre = define(
    "feature_norm_centre",
    "(Tensor x, Tensor? rows, SymInt[] sizes, float eps) -> (Tensor, Tensor)",
    _centring_kernel,
    _centring_fake,
)
_bwd = define(
    "feature_norm_bwd",
    "(Tensor[] grads, Tensor[] results, Tensor[] rstds, Tensor?[] rows, SymInt[] num_rows, SymInt[] sizes, str backend)"
    " -> Tensor[]",
    _backward_kernel,
    _backward_fake,
)


class _FeatureNorm(torch.autograd.Function):
    @staticmethod
    def forward(sizes, eps, backend, *tensors):
        rows, features = _halves(tensors)
        results, rstds = _fwd(features, rows, sizes, eps, backend)
        return *results, *rstds

    @staticmethod
    def setup_context(ctx, inputs, output):
        sizes, _, backend, *tensors = inputs
        rows, features = _halves(tensors)
        ctx.save_for_backward(*rows, *output)  # the gradient depends on the features through these alone
        ctx.arguments = ([x.shape[0] for x in features], sizes, backend)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *grads):
        num_rows, sizes, backend = ctx.arguments
        experts = len(num_rows)
        tensors = ctx.saved_tensors  # read once: activation checkpointing refuses a second time
        rows, (results, rstds) = tensors[:experts], _halves(tensors[experts:])
        of_results, of_rstds = _halves(grads)
        again = need_reference([g for g in grads if g is not None])
        # The gradient of a gradient comes through rstds, too. A compiler knows one backward pass alone.
        if again or not (torch.compiler.is_compiling() or all(g is None for g in of_rstds)):
            tokens = map(_gradient_of_tokens, of_results, of_rstds, results, rstds)
            grids = [list(size) for size in zip(sizes[::2], sizes[1::2], strict=True)]
            gradients = [
                None if t is None else _gradient_of_resampling(t, r, n, grid, grids[-1])
                for t, r, n, grid in zip(tokens, rows, num_rows, grids[:-1], strict=True)
            ]
        else:
            filled = [torch.zeros_like(y) if g is None else g for g, y in zip(of_results, results, strict=True)]
            gradients = _bwd(filled, results, rstds, rows, num_rows, sizes, backend)
        return None, None, None, *(None for _ in rows), *gradients


def _gradient_of_tokens(of_result, of_rstd, result, rstd):
    """The gradient of resampled tokens x from those of result and rstd, in differentiable steps.

    As result = (x - mean) * rstd, d result = rstd * (dx - mean(dx) - result * mean(result * dx)) and
    d rstd = -rstd^2 * mean(result * dx), means over the channels.
    """
    y, r = result.float(), rstd.unsqueeze(-1)
    total = None
    if of_result is not None:
        g = of_result.float()
        total = r * (g - g.mean(-1, keepdim=True) - y * (g * y).mean(-1, keepdim=True))
    if of_rstd is not None:
        term = r.square() * y * (of_rstd.unsqueeze(-1) / -y.shape[-1])
        total = term if total is None else total + term
    return None if total is None else total.to(result.dtype)


def _gradient_of_resampling(grad, rows, num_rows, in_size, out_size):
    # The map is linear, so its gradient is the same for all features. grad.new_zeros would be batched where grad is.
    zeros = torch.zeros(num_rows, in_size[0] * in_size[1], grad.shape[-1], dtype=grad.dtype, device=grad.device)
    (gradient,) = of_reference(lambda x: [reference_resample(x, rows, in_size, out_size)], [zeros], [True], [grad])
    return gradient


def _halves(values):
    middle = len(values) // 2
    return list(values[:middle]), list(values[middle:])
