"""What an adapter has to do so that DistributedDataParallel, FSDP and DeepSpeed work with it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable
from typing import Any

from torch import distributed, nn

from ._checks import check


def joins_idle(adapter: nn.Module, parameter: nn.Parameter, wanted: bool | None) -> bool:
    """Whether experts that no sample selected take part, for the sake of other processes.

    Args:
        adapter: the module with the experts.
        parameter: any of its parameters.
        wanted: its ``idle_expert_gradients``.

    Raises:
        ValueError: ``wanted`` is False where the parameters are sharded.
    """
    check(wanted in (None, True, False), "idle_expert_gradients", "must be None, True or False", wanted)
    several = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
    # DeepSpeed needs all gradients with one process, too: ZeRO-2 fails without, ZeRO-3 steps with an older one.
    deepspeed = hasattr(parameter, "ds_id") or has_gradient_buckets(adapter)
    if wanted is False and (several or deepspeed):  # FSDP marks every module whose parameters it shards
        sharded = any(getattr(module, "_is_fsdp_managed_module", False) for module in adapter.modules())
        rule = "must be None or True where FSDP or DeepSpeed's ZeRO shards the adapter"
        check(not (sharded or deepspeed), "idle_expert_gradients", rule, wanted)
    return several or deepspeed if wanted is None else bool(wanted)


def has_gradient_buckets(adapter: nn.Module) -> bool:
    """Whether DeepSpeed's ZeRO-1 or ZeRO-2 has the parameters.

    ZeRO-2 adds up the processes' gradients in the order in which they arrive. The ops compute the gradients of all
    experts in an order that depends on the routing; the modules, called one by one, do not.
    """
    return "deepspeed" in sys.modules and any(hasattr(p, "param_idx_in_group") for p in adapter.parameters())


def gathered(parameters: Iterable[nn.Parameter]) -> Any:
    """A context in which DeepSpeed's ZeRO-3 lends the parameters that it has partitioned; rank 0's values count."""
    partitioned = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not partitioned:
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0)
