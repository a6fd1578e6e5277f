"""ragged_linear in Triton: folds the weights of the selected experts, then launches the products of all pairs.

Folding happens at every call: it reads and writes the weights of the selected experts once, which is little beside the
products, and nothing can become stale. gated_combine uses fold, collect and grad_weights, too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..._triton.device import (
    REGISTERS,
    adjacent_channels,
    arithmetic,
    dot_precision,
    num_multiprocessors,
    stages_with_fences,
)
from ..._triton.tuning import Config, bucket, tuned
from ...routing import ExpertParameters, PairTables
from .reference import PairInputs
from .triton_kernels import collect_kernel, fold_kernel, grad_weight_kernel, project_kernel, sum_kernel

# (arithmetic, whether tiles of 128 are cut somewhere) -> tile of the result (two sides), step of the loop, warps,
# stages, programs per multiprocessor. Masks need registers, so cut tiles are smaller. Chosen so that nothing spills on
# sm_80, sm_90 and sm_100 (tools/compile_gate.py); not measured.
CONFIGS = {
    ("16-bit", False): (128, 128, 64, 8, 3, 1),
    ("16-bit", True): (64, 128, 64, 8, 3, 1),
    ("tf32", False): (64, 64, 32, 4, 2, 2),
    ("tf32", True): (64, 64, 32, 4, 2, 2),
    ("ieee", False): (64, 64, 32, 8, 2, 2),
    ("ieee", True): (64, 64, 32, 8, 2, 2),
}
TILES = ((128, 256), (128, 128), (128, 64), (64, 128), (64, 64))
CANDIDATES = {  # the configurations that a search tries (_triton/tuning.py)
    kind: [
        (*tile, step, warps, stages, programs)
        for tile in TILES
        for step in ((32, 64) if kind == "16-bit" else (16, 32))
        for warps in (4, 8)
        for stages in (2, 3, 4)
        for programs in (1, 2)
    ]
    for kind in ("16-bit", "tf32", "ieee")
}
FOLD_ROWS, FOLD_COLUMNS = 16, 256  # the part of a weight that one program of the fold holds in its registers
# Programs per pair, so that one pair fills a GPU, and the part of dy that each has in its registers.
SUM_SPLITS, SUM_ROWS, SUM_COLUMNS = 8, 32, 128


class Folded(NamedTuple):
    """The weights of all experts as the products take them."""

    weight: Tensor  # V: per expert (O, C_e), one after the other
    constant: Tensor  # (N, O) fp32
    widths: tuple[int, ...]  # C_e
    outputs: tuple[int, ...]  # the outputs of each projection; O in all


def forward(inputs: PairInputs, dtype: torch.dtype) -> list[Tensor]:
    """One (P, L, O) per projection; ``inputs.x`` is in ``dtype``."""
    x, tables, num_pairs, length = inputs.x, inputs.tables, len(inputs.rows), inputs.length
    with torch.cuda.device_of(x[0]):
        folded = fold(tables, inputs.parameters, dtype)
        outs = [x[0].new_empty((num_pairs, length, o)) for o in folded.outputs]
        if num_pairs * length:
            _project(x, inputs.rows, tables, folded, outs)
    return outs


def backward(grads: Sequence[Tensor], inputs: PairInputs, needs_x: bool) -> list[Tensor]:
    """Gradients of x (nothing if not ``needs_x``), scale, shift, weight and bias; zeros where nothing was selected."""
    x, shared, tables, parameters = inputs[:4]
    grad_x: list[Tensor] = []
    with torch.cuda.device_of(x[0]):
        if needs_x:
            folded = fold(tables, parameters, x[0].dtype)
            grad_x = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in x]
            if not shared:  # the kernel writes the rows of the pairs alone
                torch._foreach_zero_(grad_x)
            collect(grads, None, folded, tables, grad_x, None if shared else tables.row, by_sample=shared)
        return [*grad_x, *grad_weights(grads, None, x, inputs.rows, None, tables, parameters)]


def fold(tables: PairTables, parameters: ExpertParameters, dtype: torch.dtype) -> Folded:
    """The weights of the experts which have pairs; those of the others are left unwritten."""
    scale, shift, weight, bias = parameters
    num_experts = len(scale)
    widths, outputs = tuple(len(g) for g in scale), tuple(parameters.outputs)
    folded = scale[0].new_empty(sum(widths) * sum(outputs), dtype=dtype)
    constant = scale[0].new_empty((num_experts, sum(outputs)), dtype=torch.float32)
    blocks = tuple(triton.cdiv(o, FOLD_ROWS) for o in outputs)
    fold_kernel[(sum(blocks), num_experts)](
        _alike(weight), _alike(scale), _alike(shift), _alike(bias), tables.expert_offsets, folded, constant,
        WIDTHS=widths, OUTPUTS=outputs, BLOCKS=blocks, TOTAL=sum(outputs), ROWS=FOLD_ROWS, COLUMNS=FOLD_COLUMNS,
        maxnreg=REGISTERS,
    )  # fmt: skip
    return Folded(folded, constant, widths, outputs)


def collect(
    a: Sequence[Tensor],
    a_index: Tensor | None,
    folded: Folded,
    tables: PairTables,
    outs: Sequence[Tensor],
    out_index: Tensor | None = None,
    *,
    by_sample: bool = False,
    transposed: bool = False,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
) -> None:
    """Launch collect_kernel: its docstring says what it computes. ``outs`` are contiguous."""
    a = [adjacent_channels(t) for t in a]
    residual = None if residual is None else adjacent_channels(residual)
    num_outs = len(outs[0]) if by_sample else len(tables.sample)
    length, total = a[0].shape[1], sum(folded.outputs)
    if num_outs * length == 0:
        return
    widths_out = (total,) if transposed else folded.widths
    residual_strides = (0, 0) if residual is None else residual.stride()[:2]

    def launch(config: dict[str, Any], programs: int) -> None:
        n_tiles = triton.cdiv(max(widths_out), config["TILE_N"])
        num_tiles = triton.cdiv(length, config["TILE_M"]) * n_tiles * num_outs
        collect_kernel[(min(programs, num_tiles),)](
            tuple(a), *_strides(a), a_index, tuple(outs), out_index, residual, gate,
            tables.expert, tables.num_valid, tables.by_sample if by_sample else None, tables.sample_offsets,
            folded.weight, folded.constant, num_outs, *residual_strides,
            WIDTHS=folded.widths, OUTPUTS=folded.outputs, TOTAL=total, L=length, TRANSPOSED=transposed,
            N_TILES=n_tiles, CUT=length % config["TILE_M"] != 0 or any(w % config["TILE_N"] for w in widths_out),
            CUT_K=any(k % config["TILE_K"] for k in (folded.widths if transposed else folded.outputs)),
            **config,
        )  # fmt: skip

    _configured("collect", a[0], num_outs, length, folded.widths, folded.outputs, launch)


def grad_weights(
    grads: Sequence[Tensor],
    grad_index: Tensor | None,
    x: Sequence[Tensor],
    index: Tensor | None,
    gate: Tensor | None,
    tables: PairTables,
    parameters: ExpertParameters,
) -> list[Tensor]:
    """Gradients of scale, shift, weight and bias, in this order; see grad_weight_kernel."""
    scale, shift, weight, bias = parameters
    grads, x = [adjacent_channels(t) for t in grads], [adjacent_channels(t) for t in x]
    length = x[0].shape[1]
    widths, outputs = tuple(len(g) for g in scale), tuple(parameters.outputs)
    grad_weight, grad_bias = (  # of one dtype, so that a kernel can choose among them
        [torch.empty(t.shape, dtype=tensors[0].dtype, device=t.device) for t in tensors] for tensors in (weight, bias)
    )
    sums = scale[0].new_empty((len(tables.sample), SUM_SPLITS, sum(outputs)), dtype=torch.float32)
    tiles = tuple(triton.cdiv(o, SUM_COLUMNS) for o in outputs)
    if sums.numel():
        sum_kernel[(len(sums) * SUM_SPLITS, sum(tiles))](
            tuple(grads), *_strides(grads), grad_index, tables.num_valid, sums,
            OUTPUTS=outputs, TILES=tiles, TOTAL=sum(outputs), L=length,
            SPLITS=SUM_SPLITS, ROWS=SUM_ROWS, COLUMNS=SUM_COLUMNS, maxnreg=REGISTERS,
        )  # fmt: skip

    def launch(config: dict[str, Any], _: int) -> Tensor:
        row_tiles = tuple(triton.cdiv(o, config["TILE_M"]) for o in outputs)
        column_tiles = tuple(triton.cdiv(w, config["TILE_N"]) for w in widths)
        partial = scale[0].new_empty((2, sum(row_tiles), sum(widths)), dtype=torch.float32)
        grad_weight_kernel[(sum(row_tiles), sum(column_tiles))](
            tuple(grads), *_strides(grads), grad_index, tuple(x), *_strides(x), index, gate, tables.expert_offsets,
            sums, _alike(weight), _alike(scale), _alike(shift), tuple(grad_weight), tuple(grad_bias),
            partial[0], partial[1],
            WIDTHS=widths, OUTPUTS=outputs, ROW_TILES=row_tiles, COLUMN_TILES=column_tiles,
            SUM_WIDTHS=sum(widths), TOTAL=sum(outputs), SPLITS=SUM_SPLITS, L=length,
            CUT_K=length % config["TILE_K"] != 0,
            CUT=any(o % config["TILE_M"] for o in outputs) or any(w % config["TILE_N"] for w in widths),
            **config,
        )  # fmt: skip
        return partial

    partial = _configured("grad_weight", grads[0], len(tables.sample), length, widths, outputs, launch)
    sums = partial.sum(1)
    affine = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (*scale, *shift)]
    torch._foreach_copy_(affine, [*sums[0].split(widths), *sums[1].split(widths)])
    of_layers = zip((*grad_weight, *grad_bias), (*weight, *bias), strict=True)
    return [*affine, *(g.to(t.dtype) for g, t in of_layers)]


def compile_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """What tools/compile_gate.py compiles: keys and values, and queries, of the official model; odd sizes."""
    official = (1536, 512, 256, 1536, 768, 768, 256)
    yield "K, V bfloat16", functools.partial(_compile_case, torch.bfloat16, official, (1024, 1024), 2304)
    yield "Q bfloat16", functools.partial(_compile_case, torch.bfloat16, (1024,) * 7, (1024,), 2304, shared=True)
    yield "K, V float32", functools.partial(_compile_case, torch.float32, official, (1024, 1024), 2304)
    yield "K, V tf32", functools.partial(_compile_case, torch.float32, official, (1024, 1024), 2304, tf32=True)
    yield "odd sizes bfloat16", functools.partial(_compile_case, torch.bfloat16, (1000, 90), (1000,), 2300)


def _compile_case(
    dtype: torch.dtype,
    widths: Sequence[int],
    outputs: Sequence[int],
    length: int,
    shared: bool = False,
    tf32: bool = False,
) -> None:
    torch.backends.cuda.matmul.allow_tf32 = tf32
    empty = functools.partial(torch.empty, dtype=dtype, device="meta")
    table = torch.empty(24, dtype=torch.int64, device="meta")
    tables = PairTables(*[table] * 6)
    sources = [empty(8, length, c) for c in (widths[:1] if shared else widths)]
    affine, weights = [empty(c) for c in widths], [empty(o, c) for o in outputs for c in widths]
    biases = [empty(o) for o in outputs for _ in widths]
    parameters = ExpertParameters(affine, affine, weights, biases)
    inputs = PairInputs(sources, shared, tables, parameters)
    backward(forward(inputs, dtype), inputs, True)


def _project(x: Sequence[Tensor], index: Tensor, tables: PairTables, folded: Folded, outs: Sequence[Tensor]) -> None:
    x = [adjacent_channels(t) for t in x]
    num_pairs, length = outs[0].shape[:2]

    def launch(config: dict[str, Any], programs: int) -> None:
        tiles = tuple(triton.cdiv(o, config["TILE_N"]) for o in folded.outputs)
        tiles_per_pair = triton.cdiv(length, config["TILE_M"]) * sum(tiles)
        project_kernel[(min(programs, num_pairs * tiles_per_pair),)](
            tuple(x), *_strides(x), tuple(outs), index, tables.expert, tables.num_valid,
            folded.weight, folded.constant, num_pairs,
            WIDTHS=folded.widths, OUTPUTS=folded.outputs, TILES=tiles, TOTAL=sum(folded.outputs), L=length,
            TILES_PER_PAIR=tiles_per_pair,
            CUT=length % config["TILE_M"] != 0 or any(o % config["TILE_N"] for o in folded.outputs),
            CUT_K=any(w % config["TILE_K"] for w in folded.widths),
            **config,
        )  # fmt: skip

    _configured("project", x[0], num_pairs, length, folded.widths, folded.outputs, launch)


def _configured(
    kernel: str,
    x: Tensor,
    count: int,
    length: int,
    widths: Sequence[int],
    outputs: Sequence[int],
    launch: Callable[[dict[str, Any], int], Any],
) -> Any:
    """launch(constants, programs for all multiprocessors) for ``count`` times ``length`` tokens like ``x``."""
    kind, cut = arithmetic(x), any(size % 128 for size in (length, *widths, *outputs))

    def run(config: Config) -> Any:
        tile_m, tile_n, tile_k, num_warps, num_stages, programs = config
        constants = {"TILE_M": tile_m, "TILE_N": tile_n, "TILE_K": tile_k, "PRECISION": dot_precision()}
        stages = stages_with_fences(num_stages, kind)
        options = {"num_warps": num_warps, "num_stages": stages, "maxnreg": REGISTERS}
        return launch({**constants, **options}, num_multiprocessors(x) * programs)

    sizes = map(bucket, (count * length, max(widths), sum(outputs)))
    key = (kind, "cut" if cut else "full", *sizes)
    return run(tuned("ragged_linear", kernel, key, CONFIGS[kind, cut], CANDIDATES[kind], run, x.device))


def _strides(tensors: Sequence[Tensor]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of the rows, and of the tokens."""
    return tuple(t.stride(0) for t in tensors), tuple(t.stride(1) for t in tensors)


def _alike(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Contiguous and of one dtype, so that a kernel can choose among them."""
    return tuple(t.to(tensors[0].dtype).contiguous() for t in tensors)
