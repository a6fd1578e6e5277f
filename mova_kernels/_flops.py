"""What ``torch.utils.flop_counter`` counts for the raw ops: the matrix products of an op's definition.

The count is the same for every backend, even where an implementation needs fewer products. Attention's
backward pass counts as five products, as it does in PyTorch's own fused attention. Padding does not count.

The formulas reach PyTorch's registry when somebody imports ``torch.utils.flop_counter``. This package does not: that
takes 0.1 s, since it imports Triton, and prints a warning where there is no Triton.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .routing import PairTables

_COUNTER = "torch.utils.flop_counter"
_FORMULAS: dict[Any, Callable[..., int]] = {}


def register(op: Any, formula: Callable[..., int]) -> None:
    """Count ``formula(*arguments)`` FLOPs, a multiplication and an addition being two, for each call of a raw op."""
    _FORMULAS[op.overloadpacket] = lambda *arguments, out_val=None: formula(*arguments)
    if _COUNTER in sys.modules:
        _hand_over([op.overloadpacket])


def of_product(rows: int, weight: Tensor) -> int:
    """The FLOPs of ``rows`` rows times a weight (O, C, ...)."""
    return 2 * rows * weight.numel()


def valid_pairs(num_valid: Tensor | None, most: int) -> int:
    """The number of pairs without padding; ``most``, an upper bound, where ``num_valid`` has no value (meta, fake)."""
    return most if num_valid is None or _has_no_values(num_valid) else int(num_valid)


def of_projections(tables: Sequence[Tensor], length: int, weights: Sequence[Tensor]) -> int:
    """The FLOPs of ``length`` tokens of each pair times the weight of its expert, (O, C) each.

    ``tables`` are those of PairTables; ``weights`` lists the experts' weights, for one projection or for several one
    after the other. Where the offsets have no values, all pairs are taken to belong to the expert with the largest
    weights: an upper bound.
    """
    pairs, expert_offsets = len(tables[0]), PairTables(*tables).expert_offsets
    num_experts = len(expert_offsets) - 1
    projections = [weights[e::num_experts] for e in range(num_experts)]
    costs = [sum(of_product(length, w) for w in projection) for projection in projections]
    if _has_no_values(expert_offsets):
        return pairs * max(costs)
    return sum(n * cost for n, cost in zip(expert_offsets.diff().tolist(), costs, strict=True))


def _has_no_values(x: Tensor) -> bool:
    return x.is_meta or isinstance(x, FakeTensor)


def _hand_over(packets: Sequence[Any]) -> None:
    for packet in packets:
        sys.modules[_COUNTER].register_flop_formula(packet, get_raw=True)(_FORMULAS[packet])


class _WhenImported(MetaPathFinder):
    """Hands all formulas over when somebody has imported PyTorch's counter."""

    def find_spec(self, name, path=None, target=None):
        if name != _COUNTER:
            return None
        spec: Any = PathFinder.find_spec(name, path, target)
        execute = spec.loader.exec_module

        def execute_and_hand_over(module):
            execute(module)
            _hand_over(list(_FORMULAS))

        spec.loader.exec_module = execute_and_hand_over
        return spec


if _COUNTER not in sys.modules:
    sys.meta_path.insert(0, _WhenImported())
