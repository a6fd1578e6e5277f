"""One block of the adapter at the official size on a CPU, against the official computation and what torch ops can do.

Three experts for each of one or two samples. "official" computes all seven experts as soon as there are two samples, or
gradients; "torch" is a hand-written composition of torch ops that computes only the selected ones (baselines.py). With
gradients: those of the tokens and all parameters; the experts are frozen, as in MoVA's training. What happens once per
forward and not per block is left out: resampling, and with us the normalisation of the features.

The official side depends on what the process did before: after our kernels have asked for huge pages its stored scores
may be mapped twice as fast. For a comparison with it run one case per process, for example
``pytest benchmarks/bench_block.py -k "bf16 and one-sample" --benchmark-only``.
"""

from __future__ import annotations

import baselines
import pytest
import torch
from torch import Tensor

from mova_kernels import MoVAdapter, MoVAdapterConfig, RaggedPairs
from mova_kernels.demo.comparison import EXPERTS
from mova_kernels.dense_reference import dense_block, rope_tables

CONFIG = MoVAdapterConfig(num_layers=1)
GRIDS = (37, 32, 37, 45, 45, 14, 64)
CHOSEN = (("DINOv2", "Vary", "Deplot"), ("Pix2Struct", "BiomedCLIP", "SAM"))
CASES = {"one-sample-forward": (1, False), "two-samples-forward": (2, False), "two-samples-both": (2, True)}


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def adapter(request: pytest.FixtureRequest) -> MoVAdapter:
    torch.manual_seed(0)
    adapter = MoVAdapter(CONFIG)
    for parameter in adapter.parameters():  # zeros would make every result the same
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return adapter.to(request.param)


class Problem:
    """The inputs of a block, in the forms that the implementations take."""

    def __init__(self, adapter: MoVAdapter, num_samples: int, with_gradients: bool) -> None:
        dtype = adapter.pos_embed.dtype
        self.adapter, self.with_gradients = adapter, with_gradients
        self.routing = torch.tensor([[name in chosen for name in EXPERTS] for chosen in CHOSEN[:num_samples]])
        self.x = torch.randn(num_samples, CONFIG.num_tokens, CONFIG.in_channels, dtype=dtype).requires_grad_(
            with_gradients
        )
        self.text = torch.randn(num_samples, CONFIG.text_channels, dtype=dtype)
        widths = CONFIG.expert_channels
        self.experts = [torch.randn(num_samples, s * s, c, dtype=dtype) for s, c in zip(GRIDS, widths, strict=True)]
        self.rounded = rope_tables(CONFIG, "cpu", dtype)
        target = (CONFIG.resolution,) * 2
        with torch.no_grad():
            self.aligned = list(adapter._align(self.experts, self.routing, [(s, s) for s in GRIDS], False)[0])
            self.normalised, packed = adapter._align(self.experts, self.routing, [(s, s) for s in GRIDS], True)
            dense = torch.ones_like(self.routing)
            self.dense = list(adapter._align(self.experts, dense, [(s, s) for s in GRIDS], False)[0])
        assert all(f.shape[1] == target[0] * target[1] for f in self.dense)
        self.pairs = RaggedPairs.from_routing(self.routing, packed)
        self.parameters = {f"block.{n}": p.detach() for n, p in adapter.blocks[0].named_parameters()}
        if with_gradients:
            self.parameters = {n: p.requires_grad_() for n, p in self.parameters.items()}
        self.grad = torch.randn_like(self.x)

    def forward(self, implementation: str) -> Tensor:
        if implementation == "official":
            skips = len(self.routing) == 1 and not self.with_gradients
            arguments = (self.dense, self.routing, self.text, self.rounded, skips)
            return dense_block(self.parameters, "block", CONFIG, self.x, *arguments)[0]
        if implementation == "torch":
            names = {n.removeprefix("block."): p for n, p in self.parameters.items()}
            return baselines.ragged_block(names, CONFIG, self.x, self.aligned, self.routing, self.text, self.rounded)
        rope = self.adapter.rope
        return self.adapter.blocks[0](self.x, self.text, self.normalised, self.pairs, rope.cos, rope.sin)

    def run(self, implementation: str) -> Tensor:
        if not self.with_gradients:
            with torch.no_grad():
                return self.forward(implementation)
        out = self.forward(implementation)
        parameters = self.adapter.blocks[0].parameters() if implementation == "ours" else self.parameters.values()
        torch.autograd.grad(out, [self.x, *parameters], self.grad, allow_unused=True)
        return out.detach()


@pytest.fixture(scope="module")
def problems(adapter: MoVAdapter) -> dict[str, Problem]:
    return {case: Problem(adapter, *sizes) for case, sizes in CASES.items()}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("implementation", ["official", "torch", "ours"])
def test_block(benchmark, problems, case, implementation):
    problem = problems[case]
    benchmark.group = f"block {case} {problem.x.dtype}"
    benchmark.extra_info["threads"] = torch.get_num_threads()
    out = problem.run(implementation)
    expected = out if implementation == "torch" else problem.run("torch")
    error = (out.double() - expected.double()).norm() / expected.double().norm()
    assert error < 16 * torch.finfo(out.dtype).eps  # nothing is grossly wrong; the tests hold errors to budgets
    rounds = 3 if implementation != "official" else 1 if problem.with_gradients else 2
    benchmark.pedantic(problem.run, (implementation,), rounds=rounds)
