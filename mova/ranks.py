"""Training in several processes, each with its own batches: all must call the same modules in the same order.

DistributedDataParallel waits for a gradient of every parameter; FSDP and ZeRO-3 gather and scatter weights around every
call of a wrapped module. A process that skips a module blocks the others. So a batch of text alone encodes a blank
image, whose features are multiplied by zero and added to the result. A batch that selected no expert runs the text
encoder on one token, whose features the adapter does not use. The adapter itself does the same for experts that no
image selected (``idle_expert_gradients``). The experts' encoders are frozen and not wrapped.
"""

from __future__ import annotations

from torch import Tensor, distributed, nn


def runs_every_part(model: nn.Module) -> bool:
    """Whether all parts must run: there are several processes, or DeepSpeed has partitioned the model.

    ZeRO-3 needs this with one process, too: it updates a parameter without a gradient by its previous gradient.
    """
    several = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
    return several or hasattr(next(model.parameters()), "ds_id")


def with_zero_times(x: Tensor, unused: Tensor) -> Tensor:
    """Return ``x`` unchanged, and give zero gradients to everything from which ``unused`` was computed."""
    return x + 0 * unused.flatten()[0].to(x)
