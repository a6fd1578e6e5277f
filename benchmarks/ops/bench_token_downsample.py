"""token_downsample: the adapter's tail on the base grid, against the official steps."""

from __future__ import annotations

from torch import Tensor, nn

from benchmarks import cases
from benchmarks.cases import Case
from benchmarks.speed_test import speed_test
from benchmarks.suite import Draw, Inputs, Suite, Variant, Work
from mova_kernels.adapter import Downsample
from mova_kernels.dense_reference import dense_downsample
from mova_kernels.ops import token_downsample


def inputs(case: Case, draw: Draw) -> Inputs:
    module = Downsample(case.width, case.side)
    for name, p in module.named_parameters():
        scale = p[0].numel() ** -0.5 if p.ndim > 1 else 0.1
        shift = 1 if p.ndim == 1 and name.endswith("weight") else 0
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, nn.Parameter(draw(*p.shape, scale=scale, shift=shift)))
    x = draw(case.samples, case.config.num_tokens, case.width)
    named = {f"downsample.{name}": p for name, p in module.named_parameters()}
    stages = (module[0].b1.weights(), module[2].b1.weights())
    leaves = [x, *named.values()]
    return Inputs(x=x, side=case.side, named=named, stages=stages, leaves=leaves, reads=leaves)


def official(t: Inputs) -> Tensor:
    return dense_downsample(t.named, t.x, t.side)


def ours(t: Inputs, backend: str) -> Tensor:
    return token_downsample(t.x, t.side, t.stages, backend=backend)


def work(case: Case) -> Work:
    """The two 1x1 convolutions of each stage."""
    tokens = case.config.num_tokens + case.config.num_output_tokens
    return Work(2 * 2 * case.samples * tokens * case.width**2)


SUITE = Suite(__name__, "token_downsample", cases.STAGES, inputs, [Variant("official", official)], work, op=ours)
test_speed = speed_test(SUITE)
