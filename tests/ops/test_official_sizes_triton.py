"""Triton kernels at the official model's sizes, one head, one pair and one expert each: only compiled, with --gpu.

The truth is plain torch in fp64: the explicit sums of the ops' other tests would not fit into memory.
"""

from __future__ import annotations

import pytest
import test_expert_attention
import test_gated_combine
import test_ragged_linear
import torch
from helpers import assert_within_budget, mask

from mova_kernels import RaggedPairs, use_backend
from mova_kernels.ops import expert_attention, rope2d_table

TOKENS, HEAD, WIDTH = 48 * 48, 64, 1024
ONE = mask("x..")  # of three experts, which the other tests' problems have


@pytest.fixture(autouse=True)
def compiled(request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--gpu"):
        pytest.skip("Triton's interpreter would take an hour: --gpu is not given")
    request.getfixturevalue("triton_kernels")


def test_attention_of_one_head() -> None:
    tables = rope2d_table(48, HEAD)
    assert_within_budget(
        test_expert_attention.truth(tables, 1),
        lambda q, k, v: expert_attention(q, k, v, *tables, 1, backend="triton"),
        test_expert_attention.plain(tables, 1),
        lambda: list(torch.randn(3, 1, TOKENS, HEAD)),
        torch.bfloat16,
        draws=1,
    )


def test_keys_and_values_of_one_expert() -> None:
    problem = test_ragged_linear.Problem(ONE, tokens=TOKENS, widths=(1536, 16, 16), outputs=(WIDTH, WIDTH))
    function = problem.op(RaggedPairs.from_routing(ONE))
    with use_backend("ragged_linear=triton"):
        assert_within_budget(problem.plain(), function, problem.plain(), problem.inputs, torch.bfloat16, draws=1)


def test_gated_combination_of_one_pair() -> None:
    function = test_gated_combine.op(RaggedPairs.from_routing(ONE))
    plain = test_gated_combine.plain(ONE)
    with use_backend("gated_combine=triton"):
        draw = lambda: test_gated_combine.problem(ONE, torch.float64, TOKENS, WIDTH, WIDTH)  # noqa: E731
        assert_within_budget(plain, function, plain, draw, torch.bfloat16, draws=1)
