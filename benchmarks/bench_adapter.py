"""The whole adapter, with resampling and tail, against all alternatives."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mova_kernels import MoVAdapter, MoVAdapterConfig, backends, device_routing, use_backend
from mova_kernels.dense_reference import rope_tables
from testing.golden import Golden

from . import baselines, cases
from .cases import DTYPES, Case
from .speed_test import speed_test
from .suite import Draw, Inputs, Suite, Variant, Work


def inputs(case: Case, draw: Draw) -> Inputs:
    """A random problem. The experts are frozen; the base tokens and all parameters get gradients."""
    config, n = case.config, case.samples
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in MoVAdapter(config).named_parameters()}
    parameters = {name: _as_if_trained(name, shape, draw) for name, shape in shapes.items()}
    experts = [draw(n, h * w, c) for (h, w), c in zip(case.grids, config.expert_channels, strict=True)]
    base, text = draw(n, config.num_tokens, case.width), draw(n, config.text_channels)
    return in_all_forms(config, parameters, base, experts, case.selected, text, case.grids)


def in_all_forms(
    config: MoVAdapterConfig,
    parameters: dict[str, Tensor],
    base: Tensor,
    experts: list[Tensor],
    selected: Tensor,
    text: Tensor,
    grids: list[tuple[int, int]],
) -> Inputs:
    """The problem in the forms that the variants take."""
    device = base.device
    with torch.device("meta"):
        module = MoVAdapter(config)
    module.load_state_dict(parameters, assign=True)
    rows = {
        e: selected[:, e].nonzero().squeeze(1).to(device) for e in range(config.num_experts) if selected[:, e].any()
    }
    packed = [f[rows[e]] if e in rows else None for e, f in enumerate(experts)]
    idle = [p for block in module.blocks for e in range(config.num_experts) if e not in rows for p in
            block.expert_parameters([e])]  # fmt: skip
    used = [p for p in module.parameters() if all(p is not i for i in idle)]
    return Inputs(
        parameters=dict(module.named_parameters()), module=module, config=config, base=base, experts=experts,
        packed=packed, grids=grids, selected=selected, mask=selected.to(device), rows=rows, text=text, aligned=None,
        rope=rope_tables(config, device, base.dtype),
        block_mask=baselines.pair_mask(int(selected.sum()), config.num_tokens, device),
        leaves=[base, *module.parameters()], reads=[base, text, *used, *(f for f in packed if f is not None)],
    )  # fmt: skip


def truth(t: Inputs) -> Tensor:
    """The official computation, sample by sample. Its backward pass stores no scores."""
    ones = baselines.one_by_one(t)
    return torch.cat([checkpoint(baselines.official, one, True, use_reentrant=False) for one in ones])


def ours(t: Inputs) -> Tensor:
    """The module."""
    return t.module(t.base, t.packed, t.selected, t.text, grids=t.grids)


def ours_on_device(t: Inputs) -> Tensor:
    """The module as a CUDA graph holds it, for every routing of these samples."""
    with device_routing():
        return t.module(t.base, t.experts, t.mask, t.text, grids=t.grids)


def on_backends(run: Callable[[Inputs], Tensor]) -> list[Variant]:
    """``run`` on every backend that an op has. Ops without that backend stay on auto."""

    def of(backend: str) -> Variant:
        table = backends.explain()
        request = ",".join(f"{op}={backend}" for op, names in table.items() if backend in names)

        def on_backend(t: Inputs) -> Tensor:
            with use_backend(request):
                return run(t)

        def declines(case: Case, device: torch.device) -> str | None:
            try:
                for op, names in table.items():
                    if backend in names:
                        backends.choose(op, backend, device, DTYPES[case.dtype])
            except backends.BackendError as error:
                return str(error)
            return None

        name, quick = f"mova_kernels, {backend}", backend != "reference"
        return Variant(name, on_backend, ours=True, declines=declines, quick=quick)

    return [of(backend) for backend in backends.BACKENDS]


def matches_golden_numbers(variant: Variant, device: torch.device) -> None:
    """The output of a small adapter is the official code's."""
    golden = Golden("small")
    base, experts, routing, text = golden.inputs()
    parameters = {name: p.to(device) for name, p in golden.parameters().items()}
    features = [f.to(device) for f in experts]
    t = in_all_forms(golden.config, parameters, base.to(device), features, routing, text.to(device), golden.grids)
    with torch.no_grad():
        golden.check("output", variant.run(t))


def block_flop(case: Case) -> tuple[int, int]:
    """FLOPs of a block's products, forward and backward. The frozen experts get no gradient through K and V."""
    tokens, width, hidden = case.config.num_tokens, case.width, int(case.width * 8 / 3)
    contexts = [c for row in case.selected for c, s in zip(case.config.expert_channels, row, strict=True) if s]
    attentions = len(contexts) + case.samples
    frozen = 2 * tokens * width * sum(contexts)
    dense = tokens * width * (2 * width * len(contexts) + case.samples * (4 * width + 3 * hidden))
    scores = 2 * attentions * tokens**2 * width
    return 2 * (frozen + dense + scores), int(2 * (frozen + 2 * dense + 2.5 * scores))


def exps(case: Case) -> int:
    """The exponentials of a block's attention."""
    return (int(case.selected.sum()) + case.samples) * case.config.num_tokens**2 * case.config.num_heads


def work(case: Case) -> Work:
    """The work of the blocks, the tail's 1x1 convolutions and the output layers."""
    config, width, out = case.config, case.width, case.config.out_channels
    tail = 2 * (config.num_tokens + config.num_output_tokens) * width**2
    tail += config.num_output_tokens * out * (width + out)
    forward, backward = (case.blocks * flop for flop in block_flop(case))
    tail *= 2 * case.samples
    return Work(forward + tail, case.blocks * exps(case), (backward + 2 * tail) / (forward + tail))


def _as_if_trained(name: str, shape: torch.Size, draw: Draw) -> Tensor:
    """Random parameters. In the initial state every branch ends in zeros, so experts would not affect the result."""
    if name.endswith("weight"):
        return draw(*shape, scale=shape[1:].numel() ** -0.5) if len(shape) > 1 else draw(*shape, scale=0.1, shift=1)
    return draw(*shape, scale=0.1)


IN_A_GRAPH = Variant(
    "mova_kernels, CUDA graph", ours_on_device, ours=True,
    prepare=baselines.graphed, declines=baselines.graph_declines,
)  # fmt: skip
SUITE = Suite(
    __name__, "adapter", cases.ADAPTER, inputs, baselines.ADAPTER, work,
    ours=[*on_backends(ours), IN_A_GRAPH],
    truth=truth, verify=matches_golden_numbers,
)  # fmt: skip
test_speed = speed_test(SUITE)
