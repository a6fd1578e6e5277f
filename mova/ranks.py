"""Training by several processes, each with batches of its own: all must call the same modules in the same order.

DistributedDataParallel waits for a gradient of every parameter; FSDP and ZeRO-3 gather and scatter weights around every
call of a module that they have wrapped. A process that leaves a module out stops the others. So a batch of text alone
runs the parts for images on a blank one, and a batch that selected no expert runs the text encoder on one token; both
enter the result times zero. The adapter does the same for experts that no image selected (``idle_expert_gradients``).
The experts' encoders themselves are frozen and belong to no wrapper.
"""

from __future__ import annotations

from torch import Tensor, distributed


def has_several_processes() -> bool:
    """Whether torch.distributed runs with more than one."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def with_zero_times(x: Tensor, unused: Tensor) -> Tensor:
    """``x``, through which all that made ``unused`` gets gradients of zero."""
    return x + 0 * unused.flatten()[0].to(x)
