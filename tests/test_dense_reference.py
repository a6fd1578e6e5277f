"""The dense reference against the official numbers, and the properties that make it an oracle."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mova_kernels.dense_reference import dense_adapter, rope_tables
from testing.golden import AdapterInputs, Golden

# The parameters which the official code initialises to zero, apart from the biases of ordinary norms.
ZERO_AT_INIT = re.compile(
    r"pos_embed|blocks\..*\.proj\.(weight|bias)|blocks\..*\.mlp\.w3\.(weight|bias)|blocks\..*\.gate\.2\.(weight|bias)"
    r"|downsample\..*\.conv3\.bn\.(weight|bias)"
)


@pytest.fixture(scope="module")
def small() -> Golden:
    return Golden("small")


def cast(inputs: AdapterInputs, dtype: torch.dtype) -> AdapterInputs:
    experts = [expert.to(dtype) for expert in inputs.experts]
    return AdapterInputs(inputs.base.to(dtype), experts, inputs.routing, inputs.text.to(dtype))


def rows(inputs: AdapterInputs, index: slice) -> AdapterInputs:
    experts = [expert[index] for expert in inputs.experts]
    return AdapterInputs(inputs.base[index], experts, inputs.routing[index], inputs.text[index])


def parameters_of(golden: Golden, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: tensor.to(dtype) for name, tensor in golden.parameters().items()}


def check_forward(golden: Golden, output: Tensor, trace: dict[str, list[Tensor]]) -> None:
    for j, aligned in enumerate(trace["aligned"]):
        golden.check(f"aligned.{j}", aligned)
    golden.check("gate_logits", torch.stack(trace["gate_logits"]))
    golden.check("block_outputs", torch.stack(trace["block_outputs"]))
    golden.check("output", output)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["small", "over_topk"])
def test_official_outputs_and_gradients(name: str, dtype: torch.dtype) -> None:
    golden = Golden(name)
    parameters = parameters_of(golden, dtype)
    inputs = cast(golden.inputs(), dtype)
    for leaf in (*parameters.values(), inputs.base, *inputs.experts, inputs.text):
        leaf.requires_grad_()

    trace: dict[str, list[Tensor]] = {}
    output = dense_adapter(parameters, golden.config, *inputs, grids=golden.grids, trace=trace)
    assert output.dtype == dtype
    check_forward(golden, output, trace)

    output.backward(golden.cotangent().to(dtype))
    golden.check("grad.base", inputs.base.grad)
    golden.check("grad.text", inputs.text.grad)
    for j, expert in enumerate(inputs.experts):
        golden.check(f"grad.expert.{j}", expert.grad)
    golden.check_gradients({name: parameter.grad for name, parameter in parameters.items()})


@torch.no_grad()
@pytest.mark.all_threads
def test_official_outputs_at_official_dimensions() -> None:
    golden = Golden("official_dims")
    trace: dict[str, list[Tensor]] = {}
    output = dense_adapter(golden.parameters(), golden.config, *golden.inputs(), grids=golden.grids, trace=trace)
    check_forward(golden, output, trace)


@torch.no_grad()
def test_zero_init_is_the_projected_mean_of_the_base(small: Golden) -> None:
    parameters = {
        name: torch.zeros_like(tensor) if ZERO_AT_INIT.fullmatch(name) else tensor
        for name, tensor in parameters_of(small, torch.float64).items()
    }
    inputs = cast(small.inputs(), torch.float64)
    output = dense_adapter(parameters, small.config, *inputs)

    half = small.config.resolution // 2
    pooled = inputs.base.unflatten(1, (half, 2, half, 2)).mean(dim=(2, 4)).flatten(1, 2)
    hidden = F.gelu(F.linear(pooled, parameters["mlp.0.weight"], parameters["mlp.0.bias"]))
    expected = F.linear(hidden, parameters["mlp.2.weight"], parameters["mlp.2.bias"])
    torch.testing.assert_close(output, expected)


@torch.no_grad()
def test_sample_without_experts_ignores_their_features(small: Golden) -> None:
    parameters, inputs = small.parameters(), small.inputs()
    empty = ~inputs.routing.any(dim=1)
    assert empty.any() and not empty.all()
    others = inputs._replace(experts=[expert.flip(1) + 1 for expert in inputs.experts])
    before = dense_adapter(parameters, small.config, *inputs)
    after = dense_adapter(parameters, small.config, *others)
    assert torch.equal(before[empty], after[empty])
    assert not torch.equal(before[~empty], after[~empty])


@torch.no_grad()
@pytest.mark.parametrize("skip_unselected", [False, True])
def test_a_sample_alone_equals_its_row_of_a_batch(small: Golden, skip_unselected: bool) -> None:
    parameters, inputs = parameters_of(small, torch.float64), cast(small.inputs(), torch.float64)
    together = dense_adapter(parameters, small.config, *inputs)
    for i in range(small.batch):
        alone = dense_adapter(parameters, small.config, *rows(inputs, slice(i, i + 1)), skip_unselected=skip_unselected)
        torch.testing.assert_close(alone, together[i : i + 1])


@torch.no_grad()
def test_skipping_needs_a_batch_of_one(small: Golden) -> None:
    with pytest.raises(ValueError, match="batch of 1 can skip experts, got 4"):
        dense_adapter(small.parameters(), small.config, *small.inputs(), skip_unselected=True)


@torch.no_grad()
def test_skipped_experts_are_not_read(small: Golden) -> None:
    parameters, inputs = small.parameters(), rows(small.inputs(), slice(1))
    poisoned = [
        expert if selected else torch.full_like(expert, torch.nan)
        for expert, selected in zip(inputs.experts, inputs.routing[0], strict=True)
    ]
    expected = dense_adapter(parameters, small.config, *inputs)
    actual = dense_adapter(parameters, small.config, *inputs._replace(experts=poisoned), skip_unselected=True)
    torch.testing.assert_close(actual, expected)


@torch.no_grad()
def test_working_dtype_is_that_of_the_base(small: Golden) -> None:
    parameters, inputs = parameters_of(small, torch.bfloat16), cast(small.inputs(), torch.bfloat16)
    trace: dict[str, list[Tensor]] = {}
    output = dense_adapter(parameters, small.config, *inputs, trace=trace)
    assert output.isfinite().all()
    assert {tensor.dtype for tensor in (output, *trace["aligned"], *trace["block_outputs"])} == {torch.bfloat16}
    assert {logits.dtype for logits in trace["gate_logits"]} == {torch.float32}


def test_rope_tables_turn_adjacent_pairs_by_row_then_column(small: Golden) -> None:
    """Small angles are checked against their definition; the order of operations is left to the golden numbers."""
    config = small.config
    cos, sin = rope_tables(config, "cpu", torch.float32)
    head, size = config.in_channels // config.num_heads, config.resolution
    assert cos.shape == sin.shape == (size * size, head)
    row, column = 5, 3
    frequencies = 10000.0 ** (-torch.arange(0, head // 2, 2, dtype=torch.float64) / (head // 2))
    angles = torch.cat([row * frequencies, column * frequencies]).repeat_interleave(2)
    torch.testing.assert_close(cos[row * size + column].double(), angles.cos(), rtol=0, atol=1e-6)
    torch.testing.assert_close(sin[row * size + column].double(), angles.sin(), rtol=0, atol=1e-6)
