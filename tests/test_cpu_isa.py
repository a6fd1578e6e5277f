"""MOVA_CPU_ISA from the environment to the bits of a result."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import combinations

import pytest
import torch
from torch import Tensor

from mova_kernels import _compiled
from mova_kernels.ops import feature_norm

if _compiled.cpu_reason() is not None:
    pytest.skip(str(_compiled.cpu_reason()), allow_module_level=True)

ISAS = [isa for isa in _compiled.cpu_isas() if isa != "avx512_bf16"]  # which computes here as avx512 does
PROGRAM = """
import sys, torch
from mova_kernels.ops import feature_norm
x = torch.load(sys.argv[1])
torch.save(feature_norm([x], [(4, 4)], (5, 5), [None], backend="cpu")[0], sys.argv[1])
"""


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(1, 16, 1000, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def by_isa(x) -> dict[str, Tensor]:
    """What each instruction set computes in this process: sums in an order of its own, hence other bits."""
    before, results = _compiled.cpu_isa(), {}
    for isa in ISAS:
        _compiled.set_cpu_isa(isa)
        results[isa] = feature_norm([x], [(4, 4)], (5, 5), [None], backend="cpu")[0]
    _compiled.set_cpu_isa(before)
    assert not any(torch.equal(a, b) for a, b in combinations(results.values(), 2))
    return results


@pytest.mark.parametrize("isa", ISAS)
def test_the_environment_decides(isa, x, by_isa, tmp_path):
    file = tmp_path / "tensor.pt"
    torch.save(x, file)
    subprocess.run([sys.executable, "-c", PROGRAM, file], env=os.environ | {"MOVA_CPU_ISA": isa}, check=True)
    assert torch.equal(torch.load(file), by_isa[isa])
