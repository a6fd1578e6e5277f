"""What several benchmarks share."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(params=["1-thread", "all-threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(1 if request.param == "1-thread" else before)
    yield request.param
    torch.set_num_threads(before)
