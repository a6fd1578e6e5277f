"""Makes Triton's interpreter as strict as a GPU.

The interpreter runs the programs of a kernel one after the other, on the host's memory. So it does not notice accesses
beyond a tensor, undefined values and races between threads. Here they are errors, and bfloat16 is rounded and
multiplied as on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from numpy.lib.stride_tricks import as_strided
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

GAP = 4096  # bytes between two allocations
OUTSIDE, UNTOUCHED, LOADED, STORED = range(4)


class Memory:
    """The memory of one launch: copies of its tensors, far from each other, and the accesses to each element.

    A kernel may only access elements of its tensors, nothing between or beyond them. Threads are not ordered, neither
    those of two programs nor, without a barrier, those of one. So a launch may not store an element that it loads, and
    may not store an element twice.
    """

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self.storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
        self.starts, end = {}, GAP
        for address, storage in self.storages.items():
            self.starts[address] = end
            end += (storage.nbytes() // GAP + 2) * GAP
        self.arena = torch.empty(end, dtype=torch.uint8)
        self.state = np.full(end, OUTSIDE, dtype=np.uint8)  # the first byte of an element represents it
        self.lane = np.empty(end, dtype=np.int32)
        for tensor in tensors:
            size = tensor.element_size()
            strides = [stride * size for stride in tensor.stride()]
            as_strided(self.state[self._first(tensor) * size :], tensor.shape, strides)[...] = UNTOUCHED
        for copy, storage in self._copies():
            copy.copy_(storage)

    def twin(self, argument: Any) -> Any:
        """The argument with its tensors, also those in tuples, replaced by their copies."""
        if isinstance(argument, torch.Tensor):
            arena = self.arena.untyped_storage()
            return argument.new_empty(0).set_(arena, self._first(argument), argument.shape, argument.stride())
        return tuple(map(self.twin, argument)) if isinstance(argument, tuple) else argument

    def copy_back(self) -> None:
        for copy, storage in self._copies():
            storage.copy_(copy)

    def load(self, addresses: np.ndarray) -> None:
        at = self._accessible(addresses, {STORED: "has been stored before"})
        self.state[at] = LOADED

    def store(self, addresses: np.ndarray) -> None:
        at = self._accessible(addresses, {LOADED: "has been loaded before", STORED: "has been stored before"})
        self.state[at] = STORED
        lanes = np.arange(len(at))
        self.lane[at] = lanes
        if (self.lane[at] != lanes).any():
            raise AssertionError("two lanes store the same element")

    def _first(self, tensor: torch.Tensor) -> int:
        return self.starts[tensor.untyped_storage().data_ptr()] // tensor.element_size() + tensor.storage_offset()

    def _copies(self) -> Iterator[tuple[torch.UntypedStorage, torch.UntypedStorage]]:
        arena = self.arena.untyped_storage()
        for address, storage in self.storages.items():
            yield arena[self.starts[address] : self.starts[address] + storage.nbytes()], storage

    def _accessible(self, addresses: np.ndarray, wrong: dict[int, str]) -> np.ndarray:
        at = addresses.astype(np.int64) - self.arena.data_ptr()
        states = np.where((at >= 0) & (at < len(self.state)), self.state[at.clip(0, len(self.state) - 1)], OUTSIDE)
        for state, why in {OUTSIDE: "is outside of all tensors", **wrong}.items():
            if (states == state).any():
                raise AssertionError(f"what is accessed here {why} ({(states == state).sum()} of {len(at)} elements)")
        return at


def tensors_of(argument: Any) -> list[torch.Tensor]:
    if isinstance(argument, tuple):
        return [tensor for a in argument for tensor in tensors_of(a)]
    return [argument] if isinstance(argument, torch.Tensor) else []


@contextmanager
def strict() -> Iterator[None]:
    builder = InterpreterBuilder
    launch, load, store = GridExecutor.__call__, builder.create_masked_load, builder.create_masked_store
    cast, dot = builder.cast_impl, builder.create_dot
    memory: Memory

    def checked_launch(self, *args, **kwargs):
        nonlocal memory
        memory = Memory(tensors_of((*args, *kwargs.values())))
        launch(self, *memory.twin(args), **{name: memory.twin(a) for name, a in kwargs.items()})
        memory.copy_back()

    def checked_load(self, pointers, mask, other, *rest):
        memory.load(pointers.data[mask.data])
        if other is None and not mask.data.all():
            raise AssertionError("what masked lanes load is left to chance: give other=")
        return load(self, pointers, mask, other, *rest)

    def checked_store(self, pointers, value, mask, *rest):
        memory.store(pointers.data[mask.data])
        return store(self, pointers, value, mask, *rest)

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def exact_cast(self, source, target):
        kinds = (source.dtype.scalar, target.scalar)
        if kinds == (tl.bfloat16, tl.float32):  # the interpreter's own conversion is wrong for denormal numbers
            return widened(source)
        if kinds == (tl.float32, tl.bfloat16):  # and rounds towards zero
            narrow = torch.tensor(source.data).bfloat16().view(torch.int16).numpy()
            return TensorHandle(narrow.view(np.uint16), tl.bfloat16)
        return cast(self, source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", checked_launch)
        patch.setattr(builder, "create_masked_load", checked_load)
        patch.setattr(builder, "create_masked_store", checked_store)
        patch.setattr(builder, "cast_impl", exact_cast)
        patch.setattr(builder, "create_dot", lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest))
        yield
