"""ragged_linear: the projections of the (sample, expert) pairs, every pair with the weights of its expert."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ... import _compiled, _flops, _triton, backends
from ..._checks import check, check_dense, check_device, check_floats, check_tensor
from ..._gradients import need_reference, of_reference
from ..._library import define
from ..._plain import autocast, only_reference
from ...routing import ExpertParameters, PairTables, RaggedPairs
from ..feature_norm.op import CentredFeatures
from ..feature_resample.reference import feature_resample
from . import reference
from .reference import PairInputs

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
    inputs = [x] if isinstance(x, Tensor) else list(x)
    centred = [source if isinstance(source, CentredFeatures) else None for source in inputs]
    sources = [source.tokens if isinstance(source, CentredFeatures) else source for source in inputs]
    names = ["x"] if shared else [f"x[{e}]" for e in range(len(inputs))]
    for name, source in zip(names, sources, strict=True):
        check_dense(name, source)
    check(shared or len(sources) == pairs.num_experts, "x", f"must be one tensor or {pairs.num_experts}", len(sources))
    length = next((c.rstd.shape[1] for c in centred if c), sources[0].shape[1])
    for name, source, c in zip(names, sources, centred, strict=True):
        tokens = c.in_size[0] * c.in_size[1] if c else length
        check_floats(name, source, (pairs.num_samples if shared else "R", tokens, "C"))
        check_device(name, source, "x[0]", sources[0])
        if c:
            check_device(f"{name}.rstd", c.rstd, name, source)
            check_tensor(f"{name}.rstd", c.rstd, (source.shape[0], length))
    widths = [source.shape[2] for source in sources] * (pairs.num_experts if shared else 1)
    check_device("pairs", pairs.sample, "x", sources[0])
    _check_parameters(widths, affines, weights, biases, sources[0])
    scale, shift = [a[0] for a in affines], [a[1] for a in affines]
    parameters = ExpertParameters(scale, shift, [w for p in weights for w in p], [b for p in biases for b in p])
    pending = _pending(centred) if any(centred) else ([], [])
    return project(sources, shared, pairs.tables, pairs.host_offsets, parameters, backend, *pending)


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
    shared: bool,
    tables: PairTables,
    host_offsets: Sequence[int] | None,
    parameters: ExpertParameters,
    backend: str | None = None,
    rstds: Sequence[Tensor | None] = (),
    sizes: Sequence[int] = (),
) -> tuple[Tensor, ...]:
    """The op without checks: a pair takes row ``tables.sample`` of the ``shared`` source, or else ``tables.row``."""
    first = parameters.weight[0]
    dtype = torch.get_autocast_dtype(first.device.type) if autocast(first.device.type) else first.dtype
    unfit = dict.fromkeys(("triton", "reference"), "it takes no CentredFeatures") if rstds else None
    tensors = [*tables, *sources, *(t for group in parameters for t in group)]
    backend = backends.choose("ragged_linear", backend, first.device, dtype, tensors=tensors, unfit=unfit)
    if backend == "reference":
        index = tables.sample if shared else tables.row
        if host_offsets is not None:
            return tuple(reference.ragged_linear(sources, index, host_offsets, parameters, dtype))
        # What is exported with the reference consists of PyTorch's own operators, which run everywhere.
        if only_reference(tensors) or torch.compiler.is_exporting():
            return tuple(reference.ragged_linear_on_device(sources, index, tables, parameters, dtype))
    groups = (tables, [source.to(dtype) for source in sources], *parameters)
    settings = _Settings(shared, dtype, backend, tuple(map(len, groups)), host_offsets, list(rstds), list(sizes))
    tensors = [t for group in groups for t in group]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return _RaggedLinear.apply(settings, *tensors)
    return _forward(settings, tensors)


def _pending(centred: Sequence[CentredFeatures | None]) -> tuple[list[Tensor | None], list[int]]:
    """The arguments ``rstds`` and ``sizes`` of the raw ops: per expert rstd or None; and h, w, H, W, all 0 for None."""
    sizes = [size for c in centred for size in ((*c.in_size, *c.out_size) if c else (0, 0, 0, 0))]
    return [c.rstd if c else None for c in centred], sizes


class _Settings(NamedTuple):
    """The arguments of the op that are no tensors to differentiate.

    ``lengths`` counts the tables, the sources and the parameters of each kind, which autograd takes as one sequence.
    """

    shared: bool
    dtype: torch.dtype
    backend: str
    lengths: tuple[int, ...]
    host_offsets: Sequence[int] | None
    rstds: list[Tensor | None]
    sizes: list[int]

    def arguments(self, tensors: Sequence[Tensor]) -> tuple:
        """The raw ops' arguments from x to sizes."""
        groups = []
        for length in self.lengths:
            groups.append(list(tensors[:length]))
            tensors = tensors[length:]
        tables, x, *parameters = groups
        return x, self.shared, tables, *parameters, self.rstds, self.sizes


def _implementation(backend, inputs):
    rule = f"must be empty for the backend {backend}"
    check(not inputs.rstds or backend == "cpu", "rstds", rule, len(inputs.rstds))
    if backend == "reference":
        return reference
    return backends.implementation("ragged_linear", backend, inputs.x[0])


def _forward_kernel(*arguments):
    *raw, dtype, backend = arguments
    inputs = PairInputs.of_raw(*raw)
    return _implementation(backend, inputs).forward(inputs, dtype)


def _backward_kernel(grads, *arguments):
    *raw, needs_x, backend = arguments
    inputs = PairInputs.of_raw(*raw)
    return _implementation(backend, inputs).backward(grads, inputs, needs_x)


def _forward_fake(*arguments):
    *raw, dtype, _ = arguments
    inputs = PairInputs.of_raw(*raw)
    num_pairs, weight = inputs.rows.shape[0], inputs.parameters.weight
    firsts = weight[:: len(inputs.parameters.scale)]
    return [w.new_empty((num_pairs, inputs.length, w.shape[0]), dtype=dtype) for w in firsts]


def _backward_fake(grads, x, shared, tables, scale, shift, weight, bias, rstds, sizes, needs_x, backend):
    inputs = (*(x if needs_x else ()), *scale, *shift, *weight, *bias)
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in inputs]


def _forward_flop(*arguments):
    inputs = PairInputs.of_raw(*arguments[:9])
    return _flops.of_projections(inputs.tables, inputs.length, inputs.parameters.weight)


def _backward_flop(grads, x, shared, tables, scale, shift, weight, bias, rstds, sizes, needs_x, backend):
    return (1 + needs_x) * _flops.of_projections(tables, grads[0].shape[1], weight)


_INPUTS = (
    "Tensor[] x, bool shared, Tensor[] tables, Tensor[] scale, Tensor[] shift, Tensor[] weight, Tensor[] bias, "
    "Tensor?[] rstds, SymInt[] sizes"
)
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
_NUM_TABLES = len(PairTables._fields)


class _RaggedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, settings, *tensors):
        ctx.settings = settings
        ctx.save_for_backward(*tensors)
        return _forward(settings, tensors)

    @staticmethod
    def backward(ctx, *grads):
        settings = ctx.settings
        if need_reference(grads):
            needed = ctx.needs_input_grad[1:]
            return None, *of_reference(lambda *t: _reference(settings, t), ctx.saved_tensors, needed, grads)
        num_sources = settings.lengths[1]
        needs_x = any(ctx.needs_input_grad[1 + _NUM_TABLES :][:num_sources])
        results = _bwd(list(grads), *settings.arguments(ctx.saved_tensors), needs_x, settings.backend)
        of_x = results[:num_sources] if needs_x else [None] * num_sources
        of_parameters = without_idle(results[num_sources * needs_x :], settings.host_offsets)
        return None, *(None,) * _NUM_TABLES, *of_x, *of_parameters


def _forward(settings: _Settings, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(_fwd(*settings.arguments(tensors), settings.dtype, settings.backend))


def _reference(settings: _Settings, tensors: Sequence[Tensor]) -> list[Tensor]:
    inputs = PairInputs.of_raw(*settings.arguments(tensors))
    x = list(inputs.x)
    for e, rstd in enumerate(inputs.rstds):
        if rstd is not None:
            size = inputs.sizes[4 * e : 4 * e + 4]
            x[e] = (feature_resample(x[e], None, size[:2], size[2:]) * rstd[:, :, None]).to(settings.dtype)
    return reference.forward(inputs._replace(x=x, rstds=(), sizes=()), settings.dtype)


def without_idle(gradients: Sequence[Tensor], host_offsets: Sequence[int] | None) -> list[Tensor | None]:
    """The gradients, with None for those of experts without pairs, as from the reference; all of them without offsets.

    ``gradients`` list one tensor per expert, several times over.
    """
    if host_offsets is None:
        return list(gradients)
    busy = [start < stop for start, stop in pairwise(host_offsets)]
    return [g if b else None for g, b in zip(gradients, cycle(busy), strict=False)]
