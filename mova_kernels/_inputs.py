"""The inputs of MoVAdapter.forward: their checks, and the experts' tokens on the base grid."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import ops
from ._checks import check, check_floats, check_like, check_tensor
from .config import MoVAdapterConfig
from .ops.feature_norm.op import CentredFeatures, aligned_features
from .routing import RaggedPairs, Routing

Grid = tuple[int, int]


class Inputs(NamedTuple):
    """The checked inputs.

    Attributes:
        routing: which experts each sample selected.
        features: per expert (B, T_e, C_e) for all samples, or (B_e, T_e, C_e) for those that selected it.
        grids: per expert (h, w) of its tokens.
        text: (B, text_channels), or None.
    """

    routing: Routing
    features: list[Tensor]
    grids: list[Grid]
    text: Tensor | None


def checked(
    config: MoVAdapterConfig,
    parameter: Tensor,
    base: Tensor,
    experts: Sequence[Tensor | None],
    routing: Tensor | None,
    text: Tensor | None,
    grids: Sequence[Grid | None] | None,
) -> Inputs:
    """The inputs of an adapter of which ``parameter`` is one; arguments and errors as MoVAdapter.forward has them."""
    check_floats("base", base, ("B", config.num_tokens, config.in_channels))
    check_like("base", base, "the adapter", parameter)
    check(isinstance(experts, Sequence), "experts", "must be a sequence", type(experts).__name__, TypeError)
    for name, entries in (("experts", experts), ("grids", experts if grids is None else grids)):
        check(len(entries) == config.num_experts, name, f"must have {config.num_experts} entries", len(entries))
    selected = _routing(config, base, routing)
    features, sizes = [], []
    given = next((x for x in experts if isinstance(x, Tensor)), base)  # its dtype changes that of no other expert
    for e, feature in enumerate(experts):
        tokens, size = _feature(config, e, feature, base, given, selected, None if grids is None else grids[e])
        features.append(tokens)
        sizes.append(size)
    return Inputs(selected, features, sizes, _text(config, base, text, selected))


def _routing(config: MoVAdapterConfig, base: Tensor, routing: Tensor | None) -> Routing:
    if routing is None:
        return Routing.of_all(base.shape[0], config.num_experts, base.device)
    check_tensor("routing", routing, (base.shape[0], config.num_experts))
    if routing.device.type != "cpu":
        check(routing.device == base.device, "routing", f"must be on the host or {base.device}", routing.device)
        check(not routing.is_meta, "routing", "must hold data", "a tensor on the meta device")
    return Routing.validated(routing, base.device)


def _feature(
    config: MoVAdapterConfig,
    e: int,
    feature: Tensor | None,
    base: Tensor,
    given: Tensor,
    routing: Routing,
    grid: Grid | None,
) -> tuple[Tensor, Grid]:
    """The tokens of one expert and their grid; if it is None, no rows like those of a ``given`` one."""
    name, count, channels = f"experts[{e}]", routing.counts[e], config.expert_channels[e]
    if feature is None:
        routing.require(count == 0, name, "must be given where a sample selected it", None)
        return given.new_empty(0, config.num_tokens, channels), (config.resolution, config.resolution)
    check_tensor(name, feature, ("B or B_e", "T_e", channels))
    check_like(name, feature, "base", base)
    num_samples, (rows, tokens) = base.shape[0], feature.shape[:2]
    if rows != num_samples:
        sizes = {"rows": rows, "B": num_samples, "selected": count}
        routing.require(count == rows, name, "must have B rows, or one for each sample that selected it", sizes)
    if grid is None:
        side = round(tokens**0.5)
        check(side * side == tokens, name, "must have a square number of tokens, or a grid in grids", tokens)
        grid = (side, side)
    check(grid[0] * grid[1] == tokens, f"grids[{e}]", f"must hold {name}'s {tokens} tokens", grid)
    return feature, (grid[0], grid[1])


def _text(config: MoVAdapterConfig, base: Tensor, text: Tensor | None, routing: Routing) -> Tensor | None:
    """(B, text_channels), or None."""
    num_samples = base.shape[0]
    if text is None:
        routing.require(sum(routing.counts) == 0, "text", "must be given when a sample selected an expert", None)
        return None
    check_tensor("text", text, ("B", config.text_channels))
    if text.shape[0] != 1 and text.shape[0] != num_samples:
        raise ValueError(f"text must have 1 or {num_samples} rows, got {text.shape[0]}")
    check_like("text", text, "base", base)
    return text.expand(num_samples, -1)


def aligned(
    inputs: Inputs, grid: Grid, device: torch.device, normalise: bool
) -> tuple[list[Tensor | CentredFeatures], RaggedPairs]:
    """The experts' tokens on the base grid, and the pairs, whose rows they hold.

    With ``normalise``, all tokens are normalised, once for all blocks, whose LayerNorms differ in their affine part
    alone. Where the host does not know the routing, the rows that no sample selected are undefined.
    """
    routing, features = inputs.routing, inputs.features
    num_samples = routing.selected.shape[0]
    rows: list[Tensor | None] = []
    packed = []
    for e, feature in enumerate(features):
        selected, is_dense = routing.selected[:, e], feature.shape[0] == num_samples
        if not is_dense:
            rows.append(None)
        elif routing.on_host:
            rows.append(selected.nonzero().squeeze(1).to(feature.device, non_blocking=True))
        else:
            rows.append(torch.where(selected, torch.arange(num_samples, device=feature.device), -1))
        packed.append(routing.on_host or not is_dense)
    pairs = routing.pairs(packed, device)
    if not normalise:
        each = zip(features, inputs.grids, rows, strict=True)
        return [ops.feature_resample(x, size, grid, r) for x, size, r in each], pairs
    dtype = functools.reduce(torch.promote_types, [x.dtype for x in features])  # autocast lets them differ
    return aligned_features([x.to(dtype) for x in features], inputs.grids, grid, rows, may_wait=routing.on_host), pairs


def split_concatenated(x: Tensor, config: MoVAdapterConfig) -> tuple[Tensor, list[Tensor]]:
    """Take the official concatenation of base and expert tokens apart, without copying.

    Args:
        x: (B, R*R, in_channels + sum of expert_channels).
        config: the dimensions.

    Returns:
        base (B, R*R, in_channels) and per expert (B, R*R, C_e): views of ``x``.

    Raises:
        TypeError, ValueError: ``x`` is no tensor of that shape.
    """
    check_tensor("x", x, ("B", config.num_tokens, config.in_channels + sum(config.expert_channels)))
    base, *experts = x.split([config.in_channels, *config.expert_channels], dim=-1)
    return base, experts
