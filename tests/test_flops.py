"""torch.utils.flop_counter sees the ops: as many FLOPs as the definition has, however they are computed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import tiny
import torch
from helpers import mask
from op_cases import CASES
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import mova_kernels
from mova_kernels import _compiled, ops
from mova_kernels.dense_reference import dense_adapter
from mova_kernels.ops.feature_norm.op import centred_features

needs_cpu = pytest.mark.skipif(_compiled.cpu_reason() is not None, reason=str(_compiled.cpu_reason()))


def count(function: Callable[[], object]) -> dict[str, int]:
    with FlopCounterMode(display=False) as counter:
        function()
    return {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}


def forward_and_backward(name: str, backend: str, needing: slice = slice(None)) -> tuple[dict, dict]:
    """The counts of each; the inputs in ``needing`` need gradients."""
    inputs, results = CASES[name].inputs(), []
    for x in inputs[needing]:
        x.requires_grad_()

    def forward() -> None:
        found = CASES[name].function(*inputs, backend=backend)
        results.extend([found] if isinstance(found, Tensor) else found)

    return count(forward), count(lambda: sum(r.sum() for r in results).backward())


@needs_cpu
@pytest.mark.parametrize("name", ["ragged_linear", "ragged_linear of rows", "gated_combine"])
def test_as_many_as_the_reference(name) -> None:
    """Whose products PyTorch counts itself."""
    for found, expected in zip(forward_and_backward(name, "cpu"), forward_and_backward(name, "reference"), strict=True):
        assert all(op.startswith("mova_kernels") for op in found)
        assert all(op.startswith("aten") for op in expected)
        assert sum(found.values()) == sum(expected.values()) > 0


@needs_cpu
def test_gradients_of_parameters_alone() -> None:
    whole, part = (forward_and_backward("ragged_linear", "cpu", needing) for needing in (slice(None), slice(1, None)))
    assert whole[0] == part[0]
    assert sum(whole[1].values()) == 2 * sum(part[1].values()) > 0


@needs_cpu
def test_token_downsample() -> None:
    """Backward is twice forward; PyTorch counts a depthwise convolution's gradient as if its groups were one."""
    forward, backward = forward_and_backward("token_downsample", "cpu")
    expected, _ = forward_and_backward("token_downsample", "reference")
    assert sum(forward.values()) == sum(expected.values()) > 0
    assert sum(backward.values()) == 2 * sum(forward.values())


@needs_cpu
def test_attention() -> None:
    """(P, L, H*D) is (2, 4, 8): scores and results, and in the backward pass the scores again and four gradients."""
    product = 2 * 2 * 4 * 4 * 8
    assert forward_and_backward("expert_attention", "cpu") == (
        {"mova_kernels.expert_attention_fwd": 2 * product},
        {"mova_kernels.expert_attention_bwd": 5 * product},
    )


@needs_cpu
def test_padding_does_not_count() -> None:
    q, (cos, sin) = torch.randn(3, 4, 8), ops.rope2d_table(2, 4)
    attend = lambda number: ops.expert_attention(q, q, q, cos, sin, 2, num_valid=number, backend="cpu")  # noqa: E731
    whole, part = (sum(count(lambda n=n: attend(torch.tensor([n]))).values()) for n in (3, 1))
    assert whole == 3 * part > 0


@needs_cpu
def test_features_that_are_resampled_later_count_as_if_they_were_not() -> None:
    """A coarse grid is projected first, with fewer products: an implementation's business."""
    pairs = mova_kernels.RaggedPairs.from_routing(mask("x", "x"))
    affine, weight = (torch.ones(8), torch.zeros(8)), torch.randn(6, 8)
    x = torch.randn(2, 4, 8)
    later = centred_features(x, (2, 2), (4, 4), None)
    (now,) = ops.feature_norm([x], [(2, 2)], (4, 4), [None])
    found, expected = (
        count(lambda source=source: ops.ragged_linear([source], pairs, [affine], [[weight]], backend="cpu"))
        for source in (later, now)
    )
    assert found == expected == {"mova_kernels.ragged_linear_fwd": 2 * 2 * 16 * 6 * 8}


def test_without_values_the_count_is_an_upper_bound() -> None:
    """Nobody knows who selected what: all pairs are taken to be the expert's with the largest weight."""
    meta = {"device": "meta"}
    tables = [torch.empty(n, dtype=torch.int64, **meta) for n in (5, 5, 5, 3, 5, 4)]
    x = [torch.empty(4, 7, c, **meta) for c in (2, 6)]
    affines, weights = [torch.empty(c, **meta) for c in (2, 6)], [torch.empty(3, c, **meta) for c in (2, 6)]
    raw = torch.ops.mova_kernels.ragged_linear_fwd
    found = count(lambda: raw(x, False, tables, affines, affines, weights, [], [], [], torch.float32, "cpu"))
    assert found == {"mova_kernels.ragged_linear_fwd": 2 * 5 * 7 * 3 * 6}


def test_adapter_with_every_expert_selected() -> None:
    """As many as the official formula has, in which every expert is attended to."""
    config = replace(tiny.CONFIG, topk=3)
    base, experts, text = tiny.inputs(config)
    tensors = [x.requires_grad_() for x in (base, *experts, text)]
    routing, adapter = torch.ones_like(tiny.ROUTING), tiny.adapter(config)
    weights = {name: p.detach().requires_grad_() for name, p in adapter.state_dict().items()}
    arguments = (tensors[0], tensors[1:-1], routing, tensors[-1])
    found = [], []
    for counts, function in zip(
        found,
        (
            lambda: adapter(*arguments, grids=tiny.GRIDS),
            lambda: dense_adapter(weights, config, *arguments, grids=tiny.GRIDS),
        ),
        strict=True,
    ):
        with FlopCounterMode(display=False) as counter:
            result = function()
            counts.append(counter.get_total_flops())
            result.sum().backward()
            counts.append(counter.get_total_flops())
    (forward, both), (true_forward, true_both) = found
    assert forward == true_forward
    # The dense formula keeps the scores; attention that does not computes them again, as PyTorch's own does.
    scores = 2 * 4 * 36 * 36 * config.in_channels * (3 + 1) * config.num_layers
    assert both == true_both + scores * (_compiled.cpu_reason() is None)


IMPORTS = {
    "the counter first": "import torch.utils.flop_counter as c; import mova_kernels",
    "the library first": "import mova_kernels; import torch.utils.flop_counter as c",
    "looked for, then imported": (
        "import mova_kernels, importlib.util; importlib.util.find_spec('torch.utils.flop_counter'); "
        "import torch.utils.flop_counter as c"
    ),
}


@pytest.mark.parametrize("imports", IMPORTS.values(), ids=IMPORTS)
def test_order_of_imports(imports) -> None:
    program = f"{imports}; import torch; assert torch.ops.mova_kernels.gated_combine_bwd in c.flop_registry"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_importing_the_library_does_not_import_the_counter() -> None:
    program = "import mova_kernels, sys; assert 'torch.utils.flop_counter' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
