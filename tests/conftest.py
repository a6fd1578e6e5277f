"""Settings for all tests: no cached graphs, fixed seeds, and memory whose leftovers nobody takes for results."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # a cached graph would test yesterday's code

import numpy as np
import pytest
import torch

from mova_kernels import _native, _triton


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """One thread, which small tensors are fastest with on a busy machine; ``@pytest.mark.all_threads`` for the rest."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if request.node.get_closest_marker("all_threads") else 1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fill every fresh allocation with NaN (integers: the largest one), so that an element nobody wrote shows."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture(params=() if _native.cpu_reason() else _native.cpu_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set of this processor, one after the other, for the kernels in C++."""
    before = _native.cpu_isa()
    _native.set_cpu_isa(request.param)
    yield request.param
    _native.set_cpu_isa(before)


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skips a test unless Triton interprets its kernels, and mends the interpreter's bfloat16.

    It truncates where a GPU rounds, and multiplies the bits as integers (Triton 3.6).
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("TRITON_INTERPRET=1 is not set")
    tl = pytest.importorskip("triton.language")
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def nearest(self, source, target):
        if (source.dtype.scalar, target.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, source, target)
        narrow = torch.tensor(source.data).bfloat16().view(torch.int16).numpy()
        return TensorHandle(narrow.view(np.uint16), tl.bfloat16)

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    monkeypatch.setattr(InterpreterBuilder, "cast_impl", nearest)
    monkeypatch.setattr(
        InterpreterBuilder, "create_dot", lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest)
    )
    monkeypatch.setattr(_triton, "INTERPRETED_DTYPES", _triton.DTYPES)
