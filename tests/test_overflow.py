"""LayerNorms of tokens whose squares fp32 does not hold: NaN where the result is not right, and never zeros."""

from __future__ import annotations

import pytest
import torch
from op_cases import CASES

from mova_kernels import _compiled

LARGE = {  # which input is large
    "feature_norm": 0,
    "gated_combine": 1,
    "swiglu_norm": 0,
    "token_downsample": 1,
}
each_op = pytest.mark.parametrize("name", LARGE)


def check(name: str, backend: str) -> None:
    inputs = CASES[name].inputs()
    inputs[LARGE[name]][:1] *= 1e25
    found, true = (
        CASES[name].function(*tensors, backend=b)
        for tensors, b in ((inputs, backend), ([x.double() for x in inputs], "reference"))
    )
    found, true = ((t,) if torch.is_tensor(t) else t for t in (found, true))
    found, true = (torch.cat([t.flatten() for t in ts]) for ts in (found, true))
    assert true.isfinite().all() and found.isnan().any()
    torch.testing.assert_close(found, torch.where(found.isnan(), torch.nan, true).float(), equal_nan=True)


@pytest.mark.skipif(_compiled.cpu_reason() is not None, reason=str(_compiled.cpu_reason()))
@each_op
def test_cpp(name, isa) -> None:
    check(name, "cpu")


@pytest.mark.usefixtures("triton_kernels", "poisoned_memory")
@each_op
def test_triton(name) -> None:
    check(name, "triton")
