"""One small call of every op, as a function of floating-point tensors alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from helpers import mask
from torch import Tensor

from mova_kernels import RaggedPairs, ops

SELECTED = mask("x.x", "...", "x..")  # an idle expert, a sample without experts
ROWS = torch.tensor([2, 0, -1])


class Case(NamedTuple):
    """``function(*inputs, backend=...)`` is one tensor or several; ``names`` are what errors call the inputs."""

    function: Callable[..., Tensor | tuple[Tensor, ...]]
    shapes: dict[str, tuple[int, ...]]

    def inputs(self, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        generator = torch.Generator().manual_seed(3)
        return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in self.shapes.values()]


def _pairs() -> RaggedPairs:
    return RaggedPairs.from_routing(SELECTED)


def _ragged(x, *p, backend=None):
    affines, weights, biases = [(p[e], p[3 + e]) for e in range(3)], [p[6:9]], [p[9:12]]
    return ops.ragged_linear(x, _pairs(), affines, weights, biases, backend=backend)[0]


def _ragged_rows(*t, backend=None):
    x, p = t[:3], t[3:]
    return ops.ragged_linear(x, _pairs(), [(p[e], p[3 + e]) for e in range(3)], [p[6:9], p[9:12]], backend=backend)


def _combine(x, attended, gate, *p, backend=None):
    return ops.gated_combine(
        x, attended, gate, _pairs(), [(p[e], p[3 + e]) for e in range(3)], p[6:9], p[9:12], backend=backend
    )


def _downsample(x, *flat, backend=None):
    stages = ops.StageWeights.of(flat[:13]), ops.StageWeights.of(flat[13:])
    return ops.token_downsample(x, 3, stages, backend=backend)


def _parameters(names: tuple[str, ...], shapes: tuple[tuple[int, ...], ...]) -> dict[str, tuple[int, ...]]:
    return {name.format(e): shape for name, shape in zip(names, shapes, strict=True) for e in range(3)}


_AFFINES = ("affines[{}][0]", "affines[{}][1]")
_STAGE = {
    "conv1": (4, 4, 1, 1), "norm1[0]": (4,), "norm1[1]": (4,), "conv2": (4, 1, 3, 3), "norm2[0]": (4,),
    "norm2[1]": (4,), "squeeze[0]": (2, 4, 1, 1), "squeeze[1]": (2,), "excite[0]": (4, 2, 1, 1), "excite[1]": (4,),
    "conv3": (4, 4, 1, 1), "norm3[0]": (4,), "norm3[1]": (4,),
}  # fmt: skip

CASES = {
    "feature_resample": Case(
        lambda x, backend=None: ops.feature_resample(x, (2, 2), (3, 2), ROWS, backend=backend), {"x": (3, 4, 3)}
    ),
    "feature_norm": Case(
        lambda *x, backend=None: ops.feature_norm(x, [(2, 2), (3, 1)], (3, 2), [ROWS[:2], None], backend=backend),
        {"features[0]": (3, 4, 4), "features[1]": (1, 3, 5)},
    ),
    "expert_gate": Case(
        lambda x, backend=None: ops.expert_gate(x, mask("xxx", "x.x", ".x."), 2, backend=backend)[0], {"logits": (3, 3)}
    ),
    "ragged_linear": Case(
        _ragged,
        {
            "x": (3, 2, 3),
            **_parameters((*_AFFINES, "weights[0][{}]", "biases[0][{}]"), ((3,), (3,), (2, 3), (2,))),
        },
    ),
    "ragged_linear of rows": Case(
        _ragged_rows,
        {
            "x[0]": (2, 2, 3),
            "x[1]": (0, 2, 3),
            "x[2]": (1, 2, 3),
            **_parameters((*_AFFINES, "weights[0][{}]", "weights[1][{}]"), ((3,), (3,), (2, 3), (4, 3))),
        },
    ),
    "rope2d": Case(
        lambda x, backend=None: ops.rope2d(x, *ops.rope2d_table(2, 4), backend=backend), {"x": (1, 4, 2, 4)}
    ),
    "expert_attention": Case(
        lambda q, k, v, backend=None: ops.expert_attention(q, k, v, *ops.rope2d_table(2, 4), 2, backend=backend),
        dict.fromkeys("qkv", (2, 4, 8)),
    ),
    "gated_combine": Case(
        _combine,
        {
            "x": (3, 2, 3),
            "attended": (3, 2, 4),
            "gate": (3,),
            **_parameters(("norms[{}][0]", "norms[{}][1]", "weights[{}]", "biases[{}]"), ((4,), (4,), (3, 4), (3,))),
        },
    ),
    "swiglu_norm": Case(
        lambda *t, backend=None: ops.swiglu_norm(*t, channels=5, backend=backend),
        {"gate": (1, 2, 6), "up": (1, 2, 6), "weight": (6,), "bias": (6,)},
    ),
    "token_downsample": Case(
        _downsample, {"x": (1, 9, 4), **{f"stages[{i}].{n}": s for i in range(2) for n, s in _STAGE.items()}}
    ),
}
