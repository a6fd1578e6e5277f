"""ragged_linear: the projections of the (sample, expert) pairs, every pair with the weights of its expert."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, pairwise

import torch
from torch import Tensor

from ... import _compiled, _flops, _triton, backends
from ..._checks import check, check_dense, check_device, check_floats, check_tensor
from ..._gradients import need_reference, of_reference
from ..._library import define
from ..._plain import autocast, only_reference
from ...ragged import PairTables, RaggedPairs
from ..feature_norm import CentredFeatures
from ..feature_resample.reference import feature_resample
from . import cpu_impl, reference

backends.register("ragged_linear", _triton.BACKEND, _compiled.BACKEND)


def ragged_linear(
    x: Tensor | Sequence[Tensor | CentredFeatures],
    pairs: RaggedPairs,
    affines: Sequence[tuple[Tensor, Tensor]],
    weights: Sequence[Sequence[Tensor]],
    biases: Sequence[Sequence[Tensor]] = (),
    *,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """y_i[p] = (x_p g_e + b_e) W_ie^T + c_ie for each pair p = (sample, expert e) and projection i.

    With ``x`` normalised and (g, b) the affine part of a LayerNorm this is LayerNorm and Linear. The affine part is
    folded into the weights: W diag(g) and W b + c. Source: the MoV-Adapter of MoVA (arXiv 2404.13046).

    Args:
        x: (B, L, C): the tokens of each sample, which its pairs share; or per expert (R_e, L, C_e), of which a pair
            takes the row ``pairs.row``. Only these rows are read. ``cpu`` also takes feature_norm's CentredFeatures,
            which it resamples behind the projection; they get no gradient.
        pairs: the pairs.
        affines: per expert g and b, (C_e,) each.
        weights: per projection, per expert W, (O, C_e). Queries are one projection, keys and values are two.
        biases: the same with c, (O,); empty: none.
        backend: see :mod:`mova_kernels.backends`.

    Returns:
        Per projection (P, L, O) in the dtype of the weights (under autocast: the autocast dtype). Rows behind the last
        pair are zeros.

    Raises:
        TypeError, ValueError: an argument of the wrong type or shape.
        backends.BackendError: the requested backend cannot run here.
    """
    shared = isinstance(x, Tensor)
    given = [x] if isinstance(x, Tensor) else list(x)
    resamplings = [
        cpu_impl.Resampling(*source[1:]) if isinstance(source, CentredFeatures) else None for source in given
    ]
    sources = [source.tokens if isinstance(source, CentredFeatures) else source for source in given]
    for e, source in enumerate(sources):
        check_dense("x" if shared else f"x[{e}]", source)
    length = next((r.rstd.shape[1] for r in resamplings if r), sources[0].shape[1] if sources else 0)
    check(shared or len(sources) == pairs.num_experts, "x", f"must be one tensor or {pairs.num_experts}", len(sources))
    for e, source in enumerate(sources):
        name = "x" if shared else f"x[{e}]"
        resampling = resamplings[e]
        tokens = length if resampling is None else resampling.in_size[0] * resampling.in_size[1]
        check_floats(name, source, (pairs.num_samples if shared else "R", tokens, "C"))
        check_device(name, source, "x[0]", sources[0])
        if resampling is not None:
            check_device(f"{name}.rstd", resampling.rstd, name, source)
            check_tensor(f"{name}.rstd", resampling.rstd, (source.shape[0], length))
    widths = [source.shape[2] for source in sources] * (pairs.num_experts if shared else 1)
    check_device("pairs", pairs.sample, "x", sources[0])
    _check_parameters(widths, affines, weights, biases, sources[0])
    later = resamplings if any(resamplings) else None
    rows = "sample" if shared else "row"
    return project(sources, rows, pairs.tables, pairs.bounds, affines, weights, biases, backend, later)


def _check_parameters(
    widths: Sequence[int],
    affines: Sequence[tuple[Tensor, Tensor]],
    weights: Sequence[Sequence[Tensor]],
    biases: Sequence[Sequence[Tensor]],
    x: Tensor,
) -> None:
    n = len(widths)
    lengths = {"affines": len(affines), "weights": [len(w) for w in weights], "biases": [len(b) for b in biases]}
    right = {"affines": n, "weights": [n] * len(weights), "biases": [n] * len(biases)}
    check(lengths == right, "affines, weights and biases", f"must have one entry for each of {n} experts", lengths)
    rule = f"must be as many as weights, {len(weights)}, or none"
    check(len(biases) in (0, len(weights)), "biases", rule, len(biases))
    for e, width in enumerate(widths):
        for i, affine in enumerate(affines[e]):
            _check_parameter(f"affines[{e}][{i}]", affine, (width,), x)
        for i, projection in enumerate(weights):
            outputs = projection[0].shape[0] if e else "O"
            _check_parameter(f"weights[{i}][{e}]", projection[e], (outputs, width), x)
        for i, projection in enumerate(biases):
            _check_parameter(f"biases[{i}][{e}]", projection[e], (weights[i][0].shape[0],), x)


def _check_parameter(name: str, parameter: Tensor, shape: tuple[int | str, ...], x: Tensor) -> None:
    check_floats(name, parameter, shape)
    check_device(name, parameter, "x", x)


def project(
    sources: Sequence[Tensor],
    rows: str,
    tables: PairTables,
    bounds: Sequence[int] | None,
    affines: Sequence[tuple[Tensor, Tensor]],
    weights: Sequence[Sequence[Tensor]],
    biases: Sequence[Sequence[Tensor]] = (),
    backend: str | None = None,
    resamplings: Sequence[cpu_impl.Resampling | None] | None = None,
) -> tuple[Tensor, ...]:
    """The op without checks. ``rows`` names what a pair takes of its source.

    It is "sample" (one source), "row" (one per expert) or, for the reference alone, "pair": row p of one source.
    """
    scale, shift = [a[0] for a in affines], [a[1] for a in affines]
    weight, bias = [w for p in weights for w in p], [b for p in biases for b in p]
    device = weight[0].device
    dtype = torch.get_autocast_dtype(device.type) if autocast(device.type) else weight[0].dtype
    only_cpu = "it takes no CentredFeatures" if resamplings else None
    unfit = dict.fromkeys(("triton", "reference"), only_cpu) if only_cpu else None
    tensors = (*tables, *sources, *scale, *shift, *weight, *bias)
    backend = backends.choose("ragged_linear", backend, device, dtype, tensors=tensors, unfit=unfit)
    arguments = (scale, shift, weight, bias, dtype)
    if backend == "reference" and bounds is not None:
        return tuple(reference.ragged_linear(sources, rows, tables, bounds, *arguments))
    # What is exported with the reference consists of PyTorch's own operators, which run everywhere.
    if backend == "reference" and (only_reference(tensors) or torch.compiler.is_exporting()):
        return tuple(reference.ragged_linear_on_device(sources, rows, tables, *arguments))
    sizes = (len(sources), len(scale), len(weight), len(bias))
    settings = (rows, dtype, backend, sizes, bounds, resamplings)
    tensors = (*tables, *(source.to(dtype) for source in sources), *scale, *shift, *weight, *bias)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return _RaggedLinear.apply(settings, *tensors)
    return _forward(settings, tensors)


def _forward_kernel(x, rows, tables, scale, shift, weight, bias, dtype, backend):
    if backend != "reference":
        implementation = backends.implementation("ragged_linear", backend, x[0])
        return implementation.forward(x, rows, PairTables(*tables), scale, shift, weight, bias, dtype)
    bounds = tables[3].tolist()  # opaque to the compiler, the op looks at the offsets when it runs
    return reference.ragged_linear(x, rows, PairTables(*tables), bounds, scale, shift, weight, bias, dtype)


def _backward_kernel(grads, x, rows, tables, scale, shift, weight, bias, needs_x, backend):
    parameters = (scale, shift, weight, bias, needs_x)
    if backend != "reference":
        implementation = backends.implementation("ragged_linear", backend, x[0])
        return implementation.backward(grads, x, rows, PairTables(*tables), *parameters)
    return reference.ragged_linear_backward(grads, x, rows, PairTables(*tables), tables[3].tolist(), *parameters)


def _forward_fake(x, rows, tables, scale, shift, weight, bias, dtype, backend):
    firsts = weight[:: len(scale)]
    return [w.new_empty((tables[0].shape[0], x[0].shape[1], w.shape[0]), dtype=dtype) for w in firsts]


def _backward_fake(grads, x, rows, tables, scale, shift, weight, bias, needs_x, backend):
    inputs = (*(x if needs_x else ()), *scale, *shift, *weight, *bias)
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in inputs]


def _forward_flop(x, rows, tables, scale, shift, weight, bias, dtype, backend):
    return _flops.of_projections(len(tables[0]), x[0].shape[1], tables[3], weight)


def _backward_flop(grads, x, rows, tables, scale, shift, weight, bias, needs_x, backend):
    return (1 + needs_x) * _flops.of_projections(len(tables[0]), grads[0].shape[1], tables[3], weight)


_INPUTS = "Tensor[] x, str rows, Tensor[] tables, Tensor[] scale, Tensor[] shift, Tensor[] weight, Tensor[] bias"
_fwd = define(
    "ragged_linear_fwd",
    f"({_INPUTS}, ScalarType dtype, str backend) -> Tensor[]",
    _forward_kernel,
    _forward_fake,
    _forward_flop,
)
_bwd = define(
    "ragged_linear_bwd",
    f"(Tensor[] grads, {_INPUTS}, bool needs_x, str backend) -> Tensor[]",
    _backward_kernel,
    _backward_fake,
    _backward_flop,
)


def _resamplings(rstds, sizes):
    grids = [sizes[i : i + 4] for i in range(0, len(sizes), 4)]
    return [
        None if rstd is None else cpu_impl.Resampling(rstd, size[:2], size[2:])
        for rstd, size in zip(rstds, grids, strict=True)
    ]


def _resampling_forward_kernel(x, rows, tables, scale, shift, weight, bias, dtype, rstds, sizes):
    backends.choose("ragged_linear", "cpu", x[0].device, dtype)
    resamplings = _resamplings(rstds, sizes)
    return cpu_impl.forward(x, rows, PairTables(*tables), scale, shift, weight, bias, dtype, resamplings)


def _resampling_backward_kernel(grads, x, rows, tables, scale, shift, weight, bias, needs_x, rstds, sizes):
    backends.choose("ragged_linear", "cpu", x[0].device, x[0].dtype)
    parameters = (scale, shift, weight, bias, needs_x, _resamplings(rstds, sizes))
    return cpu_impl.backward(grads, x, rows, PairTables(*tables), *parameters)


def _resampling_forward_fake(x, rows, tables, scale, shift, weight, bias, dtype, rstds, sizes):
    length = next(rstd.shape[1] for rstd in rstds if rstd is not None)
    firsts = weight[:: len(scale)]
    return [w.new_empty((tables[0].shape[0], length, w.shape[0]), dtype=dtype) for w in firsts]


def _resampling_forward_flop(x, rows, tables, scale, shift, weight, bias, dtype, rstds, sizes):
    length = next(rstd.shape[1] for rstd in rstds if rstd is not None)
    return _flops.of_projections(len(tables[0]), length, tables[3], weight)


def _resampling_backward_flop(grads, x, rows, tables, scale, shift, weight, bias, needs_x, rstds, sizes):
    return _backward_flop(grads, x, rows, tables, scale, shift, weight, bias, needs_x, "cpu")


_LATER = "Tensor?[] rstds, SymInt[] sizes"
_resampling_fwd = define(
    "ragged_linear_resampling_fwd",
    f"({_INPUTS}, ScalarType dtype, {_LATER}) -> Tensor[]",
    _resampling_forward_kernel,
    _resampling_forward_fake,
    _resampling_forward_flop,
)
_resampling_bwd = define(
    "ragged_linear_resampling_bwd",
    f"(Tensor[] grads, {_INPUTS}, bool needs_x, {_LATER}) -> Tensor[]",
    _resampling_backward_kernel,
    lambda grads, x, rows, tables, scale, shift, weight, bias, needs_x, rstds, sizes: _backward_fake(
        grads, x, rows, tables, scale, shift, weight, bias, needs_x, "cpu"
    ),
    _resampling_backward_flop,
)
_NUM_TABLES = len(PairTables._fields)


class _RaggedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, settings, *tensors):
        ctx.settings = settings
        ctx.save_for_backward(*tensors)
        return _forward(settings, tensors)

    @staticmethod
    def backward(ctx, *grads):
        rows, _, backend, sizes, bounds, resamplings = ctx.settings
        if need_reference(grads):
            needed = ctx.needs_input_grad[1:]
            found = of_reference(lambda *t: _reference(ctx.settings, t), ctx.saved_tensors, needed, grads)
            return None, *found
        num_sources = sizes[0]
        needs_x = any(ctx.needs_input_grad[1 + _NUM_TABLES :][:num_sources])
        arguments = (list(grads), *_arguments(rows, sizes, ctx.saved_tensors), needs_x)
        found = _resampling_bwd(*arguments, *_flat(resamplings)) if resamplings else _bwd(*arguments, backend)
        of_x, of_parameters = (found[:num_sources], found[num_sources:]) if needs_x else ([None] * num_sources, found)
        of_parameters = without_idle(of_parameters, bounds)
        return None, *(None,) * _NUM_TABLES, *of_x, *of_parameters


def _forward(settings: tuple, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    rows, dtype, backend, sizes, _, resamplings = settings
    arguments = (*_arguments(rows, sizes, tensors), dtype)
    return tuple(_resampling_fwd(*arguments, *_flat(resamplings)) if resamplings else _fwd(*arguments, backend))


def _reference(settings: tuple, tensors: Sequence[Tensor]) -> list[Tensor]:
    rows, dtype, _, sizes, bounds, resamplings = settings
    x, _, tables, *parameters = _arguments(rows, sizes, tensors)
    for e, r in enumerate(resamplings or ()):
        if r is not None:
            wide = feature_resample(x[e], None, list(r.in_size), list(r.out_size))
            x[e] = (wide * r.rstd[:, :, None]).to(dtype)
    offsets = bounds or tables[3].tolist()
    return reference.ragged_linear(x, rows, PairTables(*tables), offsets, *parameters, dtype)  # type: ignore[call-arg]


def _flat(resamplings: Sequence[cpu_impl.Resampling | None]) -> tuple[list[Tensor | None], list[int]]:
    """As a schema has it: per expert rstd or None; and h, w, H, W, of which the former are 0 for None."""
    sizes = [size for r in resamplings for size in ((*r.in_size, *r.out_size) if r else (0, 0, 0, 0))]
    return [r.rstd if r else None for r in resamplings], sizes


def _arguments(rows: str, sizes: tuple[int, int, int, int], tensors: Sequence[Tensor]) -> tuple:
    """What the raw ops take first; ``tensors`` are tables, x, scale, shift, weight and bias in one sequence."""
    num_sources, num_experts, num_weights, num_biases = sizes
    parts = []
    for size in (_NUM_TABLES, num_sources, num_experts, num_experts, num_weights, num_biases):
        parts.append(list(tensors[:size]))
        tensors = tensors[size:]
    tables, x, *parameters = parts
    return x, rows, tables, *parameters


def without_idle(gradients: Sequence[Tensor], bounds: Sequence[int] | None) -> list[Tensor | None]:
    """None for what belongs to experts without pairs, as the reference has it; nothing changes if nobody knows them.

    ``gradients`` list one tensor per expert, several times over.
    """
    if bounds is None:
        return list(gradients)
    busy = [start < stop for start, stop in pairwise(bounds)]
    return [g if b else None for g, b in zip(gradients, cycle(busy), strict=False)]
