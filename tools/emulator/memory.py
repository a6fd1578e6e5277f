"""What a kernel may access of the tensors that it gets."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.lib.stride_tricks import as_strided

from .machine import Memory


def memory_of(tensors: Iterable[torch.Tensor]) -> list[Memory]:
    """The elements of these tensors, and nothing between the rows of a view. Tensors may share memory."""
    spans = sorted(((*_span(t), t) for t in tensors if t.numel()), key=lambda span: span[:2])
    groups: list[tuple[int, int, list[torch.Tensor]]] = []  # which do not overlap
    for low, high, tensor in spans:
        found = [tensor]
        if groups and low < groups[-1][1]:
            low, before, others = groups.pop()
            high, found = max(high, before), [*others, tensor]
        groups.append((low, high, found))
    return [Memory(low, high, _valid(low, high, found)) for low, high, found in groups]


def _span(t: torch.Tensor) -> tuple[int, int]:
    """The first byte, and the one behind the last."""
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()


def _valid(low: int, high: int, tensors: list[torch.Tensor]) -> np.ndarray | None:
    if any(high - low == t.numel() * t.element_size() for t in tensors):  # one without gaps is all of it
        return None
    valid = np.zeros(high - low, dtype=np.uint8)
    for t in tensors:
        size = t.element_size()
        strides = [stride * size for stride in t.stride()]
        as_strided(valid[t.data_ptr() - low :], (*t.shape, size), (*strides, 1))[...] = 1
    return valid
