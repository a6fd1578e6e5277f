"""Training by several processes, each with batches of its own: all must call the same modules in the same order.

DistributedDataParallel waits for a gradient of every parameter; FSDP and ZeRO-3 gather and scatter weights around every
call of a module that they have wrapped. A process that leaves a module out stops the others. So a batch of text alone
runs the parts for images on a blank one, whose features enter the result times zero, and a batch that selected no
expert runs the text encoder on one token, of which the adapter uses nothing. The adapter does the same for experts that
no image selected (``idle_expert_gradients``). The experts' encoders themselves are frozen and belong to no wrapper.
"""

from __future__ import annotations

from torch import Tensor, distributed, nn


def runs_every_part(model: nn.Module) -> bool:
    """Whether all parts must run: there are several processes, or DeepSpeed has partitioned the model.

    ZeRO-3 needs it with one process, too: where a parameter gets no gradient, it takes a step with an older one.
    """
    several = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
    return several or hasattr(next(model.parameters()), "ds_id")


def with_zero_times(x: Tensor, unused: Tensor) -> Tensor:
    """``x``, through which all that made ``unused`` gets gradients of zero."""
    return x + 0 * unused.flatten()[0].to(x)
