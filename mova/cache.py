"""A cache of features with a byte budget."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

import torch
from torch import Tensor

from ._checks import check_int
from ._lock import Lock, locked


class FeatureCache:
    """Tensors by key; the least recently used go when they exceed ``budget`` bytes. A tensor above it is not kept.

    A key says everything that the tensor depends on (content of the image, prompt, expert, dtype, device); who changes
    weights calls :meth:`clear`. Threads may share it.
    """

    def __init__(self, budget: int) -> None:
        check_int("budget", budget, 0)
        self.budget, self.bytes, self.hits, self.misses = budget, 0, 0, 0
        self._entries: OrderedDict[Hashable, Tensor] = OrderedDict()
        self.lock = Lock()

    @locked
    def get(self, key: Hashable) -> Tensor | None:
        """The tensor of this key, or None; counted in ``hits`` or ``misses``."""
        found = self._entries.get(key)
        if found is None:
            self.misses += 1
            return None
        self.hits += 1
        self._entries.move_to_end(key)
        return found

    @locked
    def put(self, key: Hashable, tensor: Tensor) -> None:
        """Keep a tensor; it is copied if it is a view that holds on to a larger one, or from inference mode, whose
        tensors cannot be trained with later."""
        self.discard(key)
        if tensor.nbytes > self.budget:
            return
        if tensor.untyped_storage().nbytes() > tensor.nbytes or tensor.is_inference():
            with torch.inference_mode(False):
                tensor = tensor.clone()
        self._entries[key] = tensor
        self.bytes += tensor.nbytes
        while self.bytes > self.budget:
            self.discard(next(iter(self._entries)))

    @locked
    def discard(self, key: Hashable) -> None:
        """Forget a key, known or not."""
        gone = self._entries.pop(key, None)
        self.bytes -= 0 if gone is None else gone.nbytes

    @locked
    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._entries)
