"""Look into a MoV-Adapter: the weights of the experts in each block, and the attention of one token."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from mova_kernels import AdapterBlock, MoVAdapter, RaggedPairs, ops

from ._checks import check, check_whole
from ._wrapped import unwrapped, without_graphs


class Record:
    """The record that :func:`recorded` fills."""

    def __init__(self) -> None:
        self._gates: Tensor | None = None

    @property
    def gates(self) -> Tensor:
        """(B, num_layers, N) fp32 on the adapter's device: the weight of each expert in each block.

        In each block the weights of a sample sum to 1. Experts that the sample did not select, or that are beyond the
        block's ``topk``, have 0. A sample that selected no expert has only zeros.

        Raises:
            RuntimeError: no forward of the adapter has finished in this thread yet.
        """
        if self._gates is None:
            raise RuntimeError("nothing is recorded: no forward of the adapter has ended inside recorded()")
        return self._gates


@contextmanager
def recorded(adapter: MoVAdapter) -> Iterator[Record]:
    """Record the gates of the adapter's forwards inside the ``with``; the results stay the same, bit by bit.

    Only forwards of the thread that entered the ``with`` count; the last one that finished is recorded. The record can
    be read after the ``with``, whose hooks are then removed. An adapter that is wrapped by torch.compile, peft's
    ``modules_to_save`` or FSDP is recorded, too. Its compiled parts run eagerly meanwhile, since a graph that was
    compiled before does not call the hooks.

    Raises:
        TypeError: ``adapter`` is not a MoVAdapter.
    """
    inner = unwrapped(adapter, MoVAdapter)
    blocks = cast(list[AdapterBlock], list(inner.blocks))
    record = Record()
    selected: list[Tensor] = [torch.empty(0)] * len(blocks)
    weights: list[Tensor] = [torch.empty(0)] * len(blocks)

    def enter(i: int, block: nn.Module, args: tuple[Any, ...]) -> None:
        x, pairs = args[0], _pairs(args)
        selected[i] = pairs.selected
        weights[i] = torch.zeros(pairs.selected.shape, device=x.device)  # stays if the block does not call its gate

    def weigh(i: int, gate: nn.Module, args: tuple[Any, ...], logits: Tensor) -> None:
        weights[i] = ops.expert_gate(logits.detach(), selected[i], blocks[i].topk)[0].float()

    def leave(*_: Any) -> None:
        record._gates = torch.stack(weights, 1)

    with without_graphs(adapter), ExitStack() as hooks:
        for i, block in enumerate(blocks):
            hooks.callback(block.register_forward_pre_hook(_of_this_thread(partial(enter, i))).remove)
            hooks.callback(block.gate.register_forward_hook(_of_this_thread(partial(weigh, i))).remove)
        hooks.callback(inner.register_forward_hook(_of_this_thread(leave)).remove)
        yield record


@torch.no_grad()
def attention_maps(
    adapter: MoVAdapter,
    base: Tensor,
    experts: Sequence[Tensor | None],
    routing: Tensor | None,
    text: Tensor | None,
    point: tuple[int, int],
    *,
    block: int = -1,
    grids: Sequence[tuple[int, int] | None] | None = None,
) -> list[dict[int, Tensor]]:
    """Compute the attention of the token at ``point`` to the features of each expert that its sample selected.

    The adapter runs once, and the attention of this one query is computed from the tokens that enter ``block``. Source:
    the cross-attention of MoVA (arXiv 2404.13046), whose scores the adapter itself does not store. A selected expert
    beyond the block's ``topk`` gets a map, too: the attention that the block would have computed for it.

    Args:
        adapter: the adapter; R is its resolution.
        base, experts, routing, text, grids: what its forward takes.
        point: (row, column) of the query in cells of the R x R grid.
        block: which block, negative from the end.

    Returns:
        per sample, by the index of each selected expert in ascending order, (R, R) fp32 on the adapter's device: the
        mean over the heads, which sums to 1.

    Raises:
        TypeError, ValueError: an argument that this function or the adapter's forward does not take.
    """
    inner = unwrapped(adapter, MoVAdapter)
    side, depth = inner.config.resolution, inner.config.num_layers
    check_whole("block", block)
    check(-depth <= block < depth, "block", f"must be from {-depth} to {depth - 1}", block)
    check(isinstance(point, tuple | list) and len(point) == 2, "point", "must be (row, column)", point, TypeError)
    for i, cell in enumerate(point):
        check_whole(f"point[{i}]", cell)
        check(0 <= cell < side, f"point[{i}]", f"must be from 0 to {side - 1}", cell)
    chosen = cast(AdapterBlock, inner.blocks[block])
    entered: list[tuple[Any, ...]] = []
    hook = chosen.register_forward_pre_hook(_of_this_thread(lambda _, args: entered.append(args)))
    try:
        with without_graphs(adapter):
            adapter(base, experts, routing, text, grids=grids)
    finally:
        hook.remove()
    x, selected = entered[0][0], _pairs(entered[0]).selected
    token = point[0] * side + point[1]
    maps: list[dict[int, Tensor]] = [{} for _ in range(len(base))]
    for e, feature in enumerate(experts):
        samples = selected[:, e].nonzero()[:, 0].to(x.device)
        if feature is None or not len(samples):
            continue
        rows = samples if len(feature) == len(base) else torch.arange(len(samples), device=x.device)
        size = grids[e] if grids is not None else None
        size = size or (math.isqrt(feature.shape[1]),) * 2
        aligned = ops.feature_resample(feature, size, (side, side), rows)
        found = _attention(inner, chosen, e, x[samples, None, token], aligned, token)
        for sample, weights in zip(samples.tolist(), found, strict=True):
            maps[sample][e] = weights
    return maps


def _attention(adapter: MoVAdapter, block: AdapterBlock, e: int, query: Tensor, context: Tensor, token: int) -> Tensor:
    """Return the attention (P, R, R) in fp32 of queries (P, 1, C) at ``token`` to an expert's tokens (P, R*R, C_e)."""
    cross: Any = block.cross_attn[e]
    heads, side = adapter.config.num_heads, adapter.config.resolution
    cos, sin = adapter.rope.tables(context)
    q = cross.q_proj(block.norm1[e](query)).unflatten(-1, (heads, -1))
    k = cross.k_proj(block.norm2[e](context)).unflatten(-1, (heads, -1))
    q = ops.rope2d(q, cos[token : token + 1], sin[token : token + 1]).float()
    k = ops.rope2d(k, cos, sin).float()
    scores = torch.einsum("pqhd,plhd->phl", q, k) * adapter.config.head_channels**-0.5
    return scores.softmax(-1).mean(1).unflatten(-1, (side, side))


def _of_this_thread(hook: Callable[..., None]) -> Callable[..., None]:
    """Restrict a hook to the forwards of the calling thread; a module's hooks see those of all threads."""
    mine = threading.get_ident()

    def call(*args: Any) -> None:
        if threading.get_ident() == mine:
            hook(*args)

    return call


def _pairs(arguments: tuple[Any, ...]) -> RaggedPairs:
    """Find the pairs among the positional arguments of an AdapterBlock."""
    return next(a for a in arguments if isinstance(a, RaggedPairs))
