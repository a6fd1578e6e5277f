"""Settings for all tests: no cached graphs, fixed seeds, and memory whose leftovers nobody takes for results."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # a cached graph would test yesterday's code

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
    """Every instruction set of this processor, one after the other; skips where there is no native library."""
    before = _native.cpu_isa()
    _native.set_cpu_isa(request.param)
    yield request.param
    _native.set_cpu_isa(before)


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Skips a test unless Triton interprets its kernels, and makes the interpreter as strict as a GPU."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("TRITON_INTERPRET=1 is not set")
    pytest.importorskip("triton")
    from interpreter import strict

    monkeypatch.setattr(_triton, "INTERPRETED_DTYPES", _triton.DTYPES)
    with strict():
        yield
