"""Settings for all tests: no cached graphs, fixed seeds, and memory whose leftovers nobody takes for results."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # a cached graph would test yesterday's code

import pytest
import torch


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
