"""expert_attention in Triton's interpreter where fp32 overflows or does not tell scores apart: fp64 is the truth."""

from __future__ import annotations

import pytest
import torch
from helpers import check_budget, cotangent_like, value_and_gradients
from test_expert_attention import plain, truth
from test_expert_attention_triton import op, problem

pytestmark = pytest.mark.usefixtures("interpreter", "poisoned_memory")

# factors of queries and keys; the query that is multiplied, or None for all of them
CASES = {
    "weights that the log-sum-exp in fp32 would not tell apart": (100, 100, None),
    "differences of scores beyond the range of powers of 2": (1e9, 1, None),
    "scores beyond fp32": (1e25, 1e25, None),
    "one long query": (1e12, 1, 3),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_softmax_in_fp64_is_the_truth(case, dtype) -> None:
    """Where plain torch overflows, nothing but the rounding of the result is allowed."""
    of_q, of_k, query = CASES[case]
    (q, k, v), tables = problem(1, 7, 1, 32)
    q[:, slice(None) if query is None else query] *= of_q
    inputs = [t.to(dtype) for t in (q, of_k * k, v)]
    cotangent = cotangent_like(inputs[2])
    expected = value_and_gradients(truth(tables, 1), [t.double() for t in inputs], cotangent)
    rival = value_and_gradients(plain(tables, 1), inputs, cotangent)
    found = value_and_gradients(op(tables, 1), inputs, cotangent)
    for name, f, e, r in zip(("out", "grad_q", "grad_k", "grad_v"), found, expected, rival, strict=True):
        check_budget(name, f, e, r if r.isfinite().all() else e.to(dtype), norms=(2,))


def test_missing_numbers_beside_large_ones() -> None:
    (q, k, v), tables = problem(1, 7, 1, 32)
    expected = op(tables, 1)(1e12 * q, k, v)
    q[0, 3] = torch.nan
    found = op(tables, 1)(1e12 * q, k, v)
    others = torch.arange(7) != 3
    assert found[0, 3].isnan().all() and torch.equal(found[0, others], expected[0, others])
