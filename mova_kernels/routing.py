"""Which sample selected which expert: the routing of a batch, and its (sample, expert) pairs sorted for the kernels.

This is the one place with tables of pairs. A forward builds them once; a block whose gate drops experts makes new ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import check, check_tensor


class Routing:
    """Which experts each sample of a batch selected, and whether the host may know it.

    Attributes:
        selected: (B, N) bool; on the host where the host may see values, else on the device of the batch.
        on_host: whether the host may see values.
        counts: per expert, how many samples selected it; integers on the host, else tensors without dimensions.
    """

    def __init__(self, selected: Tensor, on_host: bool) -> None:
        self.selected, self.on_host = selected, on_host
        per_expert = selected.sum(0)
        self.counts: Sequence[int | Tensor] = per_expert.tolist() if on_host else per_expert.unbind()

    @classmethod
    def validated(cls, routing: Tensor, device: torch.device) -> Routing:
        """The routing of a batch on ``device``, from (B, N), bool or 0/1 of any dtype.

        Raises:
            TypeError: no tensor, or complex.
            ValueError: not (B, N), a value other than 0 and 1, on the host where a device is needed, or one through
                which somebody expects a derivative.
            RuntimeError: inside torch.jit.trace.
        """
        if torch.jit.is_tracing():
            raise RuntimeError(
                "torch.jit.trace would keep this routing for every input to come, so it cannot trace the adapter: use "
                "torch.export.export, or torch.onnx.export with dynamo=True"
            )
        check_tensor("routing", routing, ("B", "N"))
        if routing.requires_grad or torch.autograd.forward_ad.unpack_dual(routing).tangent is not None:
            raise ValueError(
                "routing must not require grad, since selecting experts is not differentiable: pass routing.detach() "
                "and train the router with a loss of its own, got a routing with a derivative"
            )
        check(not routing.is_complex(), "routing", "must be bool, integer or floating point", routing.dtype, TypeError)
        on_host = _host_sees_values(device)
        # Without the host a copy would synchronise, which a capture does not survive.
        if not on_host and not torch.compiler.is_compiling():
            rule = f"must be on {device} in a captured CUDA graph and in device_routing"
            check(routing.device.type == device.type, "routing", rule, routing.device)
        routing = routing.cpu() if on_host else routing.to(device)
        if routing.dtype == torch.bool:
            return cls(routing, on_host)
        valid = (routing == 0) | (routing == 1)
        result = cls(routing != 0, on_host)
        # The values are read only for the message, which is only written on the host.
        wrong = routing[~valid][:1].tolist() if on_host else None
        result.require(valid.all(), "routing", "must hold only 0 and 1", wrong)
        return result

    @classmethod
    def of_all(cls, num_samples: int, num_experts: int, device: torch.device) -> Routing:
        """Every sample of a batch on ``device`` selects every expert."""
        on_host = _host_sees_values(device)
        selected = torch.ones(num_samples, num_experts, dtype=torch.bool, device="cpu" if on_host else device)
        return cls(selected, on_host)

    @property
    def num_experts(self) -> int:
        """N."""
        return self.selected.shape[1]

    def require(self, ok: bool | Tensor, argument: str, rule: str, value: object) -> None:
        """Check a condition of the selection: at once on the host, else by an assertion on the device.

        Raises:
            ValueError: on the host, ``"argument rule, got value"``.
        """
        if self.on_host:
            check(ok, argument, rule, value)
        else:
            torch._assert_async(cast(Tensor, ok), f"{argument} {rule}")

    def pairs(self, packed: Sequence[bool], device: torch.device) -> RaggedPairs:
        """The pairs, with tables on ``device``; ``packed``: see :meth:`RaggedPairs.from_routing`."""
        selected = self.selected
        samples = torch.arange(selected.shape[0], device=selected.device)
        rank = selected.long().cumsum(0) - 1
        rows = [rank[:, e] if is_packed else samples for e, is_packed in enumerate(packed)]
        return _build(selected, torch.stack(rows, 1).clamp(min=0), self.num_experts, device, self.on_host)


class PairTables(NamedTuple):
    """The tables of :class:`RaggedPairs` that kernels read on the device."""

    sample: Tensor
    expert: Tensor
    row: Tensor
    expert_offsets: Tensor
    by_sample: Tensor
    sample_offsets: Tensor

    @property
    def num_valid(self) -> Tensor:
        """The number of pairs without padding, (1,)."""
        return self.expert_offsets[-1:]


class ExpertParameters(NamedTuple):
    """The parameters of the linear layers that ragged_linear and gated_combine compute for the pairs.

    ``scale`` and ``shift``, (C_e,), are per expert the affine part of a LayerNorm. ``weight``, (O, C_e), and ``bias``,
    (O,), list the experts of one projection after those of another. ``bias`` may be empty.
    """

    scale: Sequence[Tensor]
    shift: Sequence[Tensor]
    weight: Sequence[Tensor]
    bias: Sequence[Tensor]

    @property
    def outputs(self) -> list[int]:
        """The outputs O of each projection."""
        return [len(w) for w in self.weight[:: len(self.scale)]]

    def like_zeros(self) -> ExpertParameters:
        """Contiguous zeros of the same shapes and dtypes."""
        zeros = torch.zeros_like
        return ExpertParameters(*([zeros(t, memory_format=torch.contiguous_format) for t in group] for group in self))


@dataclass(frozen=True)
class RaggedPairs:
    """The P selected pairs of B samples and N experts, sorted by expert and, within an expert, by sample.

    All tensors are int64 on the device of the batch. ``host_offsets`` is None where the host cannot know the routing
    (inside torch.compile, torch.export, a captured CUDA graph or :func:`device_routing`). Then the tables have
    a fixed size, an upper bound of P, and the pairs behind ``expert_offsets[N]`` are padding.

    Attributes:
        selected: (B, N) bool, the routing.
        sample: (P,) the sample of each pair.
        expert: (P,) its expert.
        row: (P,) the row of the expert's features which belongs to the pair: the rank of the sample among those that
            selected this expert where the features are packed, the sample itself where they are dense.
        expert_offsets: (N + 1,) the pairs of expert e are expert_offsets[e] to expert_offsets[e + 1].
        by_sample: (P,) the pairs sorted by sample and, within a sample, by expert.
        sample_offsets: (B + 1,) the pairs of sample b are by_sample[sample_offsets[b]:sample_offsets[b + 1]].
        host_offsets: expert_offsets as host integers, or None.
        most_per_sample: the largest number of experts that one sample selected; an upper bound if host_offsets is None.
    """

    selected: Tensor
    sample: Tensor
    expert: Tensor
    row: Tensor
    expert_offsets: Tensor
    by_sample: Tensor
    sample_offsets: Tensor
    host_offsets: tuple[int, ...] | None
    most_per_sample: int
    _row_table: Tensor  # (B, N): the row of every (sample, expert), for topk(); on the host if host_offsets is not None

    def __post_init__(self) -> None:
        if self.host_offsets is None:  # sizes may be symbols
            return
        pairs, shapes = self.host_offsets[-1], [tuple(table.shape) for table in self.tables]
        samples, experts = self.selected.shape
        wanted = [(pairs,), (pairs,), (pairs,), (experts + 1,), (pairs,), (samples + 1,)]
        check(shapes == wanted, "the tables of pairs", f"must have the shapes {wanted}", shapes)

    @classmethod
    def from_routing(
        cls, routing: Tensor, packed: Sequence[bool] | None = None, device: torch.device | str | None = None
    ) -> RaggedPairs:
        """The pairs of a routing mask.

        Args:
            routing: (B, N), bool or 0/1 of any dtype, on the host (no synchronisation) or on a device (one).
            packed: per expert, whether its features hold only the rows of the samples that selected it. Default: all.
            device: where the tables live; default: the device of ``routing``.

        Raises:
            TypeError, ValueError: see :meth:`Routing.validated`; or ``packed`` has not one entry per expert.
        """
        check_tensor("routing", routing, ("B", "N"))
        check(routing.shape[1] >= 1, "routing", "must have a column for at least one expert", tuple(routing.shape))
        device = routing.device if device is None else torch.device(device)
        checked = Routing.validated(routing, device)
        packed = [True] * checked.num_experts if packed is None else packed
        check(len(packed) == checked.num_experts, "packed", f"must have {checked.num_experts} entries", len(packed))
        return checked.pairs(packed, device)

    @property
    def num_samples(self) -> int:
        """B."""
        return self.selected.shape[0]

    @property
    def num_experts(self) -> int:
        """N."""
        return self.selected.shape[1]

    @property
    def num_pairs(self) -> int:
        """P, with padding where the host does not know the routing."""
        return self.sample.shape[0]

    @property
    def tables(self) -> PairTables:
        """What a raw op takes."""
        return PairTables(*(getattr(self, name) for name in PairTables._fields))

    def topk(self, kept: Tensor, k: int) -> RaggedPairs:
        """The pairs in ``kept``, (B, N) bool: of each sample k of its experts, or all of them where it has no more.

        Costs one device synchronisation unless no sample has selected more than k, or the host has no part in it.
        """
        if self.host_offsets is not None and self.most_per_sample <= k:
            return self
        kept = kept.cpu() if self.host_offsets is not None else kept
        device = self.sample.device
        return _build(kept, self._row_table, min(k, kept.shape[1]), device, _host_sees_values(device))


@contextmanager
def device_routing() -> Iterator[None]:
    """Inside, the routing stays on the device, as it does for torch.compile and in a captured CUDA graph.

    No value is read on the host: nothing synchronises, and the pairs are padded to B * topk. Meant for the warm-up
    before a capture, which then runs, and loads, the kernels that the graph will consist of::

        with device_routing():
            adapter(base, experts, routing, text)
        with torch.cuda.graph(graph):
            output = adapter(base, experts, routing, text)
    """
    global _device_routing
    before, _device_routing = _device_routing, True
    try:
        yield
    finally:
        _device_routing = before


_device_routing = False  # process-wide: checkpointing calls forward again in a thread of autograd's


def _host_sees_values(device: torch.device) -> bool:
    """False while torch.compile or torch.export traces, a CUDA graph is captured, or in :func:`device_routing`."""
    if torch.compiler.is_compiling() or _device_routing:
        return False
    return not (device.type == "cuda" and torch.cuda.is_current_stream_capturing())


def _build(kept: Tensor, row_table: Tensor, most_per_sample: int, device: torch.device, on_host: bool) -> RaggedPairs:
    """Tables for the pairs in ``kept``: exact if the host may see values, else padded to B * most_per_sample."""
    num_samples = kept.shape[0]
    by_expert = kept.t().reshape(-1)
    per_expert, per_sample = kept.sum(0), kept.sum(1)
    expert_offsets, sample_offsets = _offsets(per_expert), _offsets(per_sample)
    if on_host:
        order = by_expert.nonzero().squeeze(1)
        most_per_sample = int(per_sample.max()) if num_samples else 0
    else:
        order = _stable_argsort((~by_expert).to(torch.uint8))[: num_samples * most_per_sample]
    divisor = max(num_samples, 1)
    if torch.compiler.is_exporting():  # ONNX has no remainder of a division by a size that may differ
        divisor = torch.full((), divisor, device=order.device)  # type: ignore[assignment]
    sample, expert = order % divisor, order // divisor
    row = row_table[sample, expert]
    in_use = by_expert[order]
    by_sample = _stable_argsort(torch.where(in_use, sample, num_samples))

    tables = (sample, expert, row, by_sample, expert_offsets, sample_offsets)
    host_offsets = tuple(expert_offsets.tolist()) if on_host else None
    if on_host and device.type != "cpu":  # one transfer instead of six
        # Each begins at a multiple of 16 bytes, or Triton would compile again for every odd number of pairs.
        even = [F.pad(t, (0, len(t) % 2)) for t in tables]
        parts = torch.cat(even).to(device, non_blocking=True).split([len(t) for t in even])
        tables = tuple(part[: len(t)] for part, t in zip(parts, tables, strict=True))
        kept = kept.to(device, non_blocking=True)
    sample, expert, row, by_sample, expert_offsets, sample_offsets = tables
    return RaggedPairs(
        kept, sample, expert, row, expert_offsets, by_sample, sample_offsets, host_offsets, most_per_sample, row_table
    )


def _stable_argsort(keys: Tensor) -> Tensor:
    if not torch.compiler.is_exporting():
        return torch.argsort(keys, stable=True)
    length = keys.shape[0]  # ONNX has no stable sort. Keys that all differ need none.
    return torch.argsort(keys.long() * length + torch.arange(length, device=keys.device))


def _offsets(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])
