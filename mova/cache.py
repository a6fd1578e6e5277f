"""A cache of features with a byte budget."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

import torch
from torch import Tensor

from ._checks import check_int
from ._lock import Lock, locked


class FeatureCache:
    """Keeps tensors by key. When they exceed ``budget`` bytes, the least recently used are dropped.

    A tensor that alone exceeds the budget is not kept. A key must name everything that its tensor depends on: content
    of the image, prompt, expert, dtype, device. Call :meth:`clear` after weights have changed. Threads may share a
    cache.
    """

    def __init__(self, budget: int) -> None:
        check_int("budget", budget, 0)
        self.budget, self.bytes, self.hits, self.misses = budget, 0, 0, 0
        self._entries: OrderedDict[Hashable, Tensor] = OrderedDict()
        self.lock = Lock()

    @locked
    def get(self, key: Hashable) -> Tensor | None:
        """Return the tensor of this key, or None; the call counts in ``hits`` or ``misses``."""
        found = self._entries.get(key)
        if found is None:
            self.misses += 1
            return None
        self.hits += 1
        self._entries.move_to_end(key)
        return found

    @locked
    def put(self, key: Hashable, tensor: Tensor) -> None:
        """Keep a tensor.

        A view is copied if its storage is larger. A tensor of inference mode is copied, since it could not be used in
        training later.
        """
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
        """Drop a key; an unknown key is no error."""
        gone = self._entries.pop(key, None)
        self.bytes -= 0 if gone is None else gone.nbytes

    @locked
    def clear(self) -> None:
        """Drop all tensors."""
        self._entries.clear()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._entries)
