"""Checks of an op: an error budget that is measured in the test, gradients as vectors, and pairs in both forms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from mova_kernels import RaggedPairs

Function = Callable[..., Tensor]


def value_and_gradients(function: Function, inputs: Sequence[Tensor], cotangent: Tensor | None = None) -> list[Tensor]:
    """function(*inputs), then the gradient of each input; zeros for an input that was not used.

    The cotangent is random by default, because errors could cancel in a sum. An empty result may be detached.
    """
    leaves = [_twin(x).requires_grad_() for x in inputs]
    output = function(*leaves)
    if not output.numel() and not output.requires_grad:
        return [output, *map(torch.zeros_like, inputs)]
    if cotangent is None:
        cotangent = cotangent_like(output)
    gradients = torch.autograd.grad(output, leaves, cotangent.to(output.dtype), allow_unused=True)
    return [output.detach(), *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients, strict=True))]


def _twin(x: Tensor) -> Tensor:
    """A copy with the same strides, also if they leave gaps, which clone() would close."""
    x = x.detach()
    storage = x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
    return storage.clone().as_strided(x.shape, x.stride(), x.storage_offset())


def cotangent_like(output: Tensor) -> Tensor:
    return torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)


def assert_true_to(truth: Function, function: Function, inputs: Sequence[Tensor]) -> None:
    """In fp64 the values and gradients of ``function`` are those of ``truth``; the tolerance is torch.testing's."""
    assert all(x.dtype == torch.float64 for x in inputs)
    expected = value_and_gradients(truth, inputs)
    actual = value_and_gradients(function, inputs)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        torch.testing.assert_close(a, e, msg=lambda m, i=i, a=a, e=e: f"{_name(i)}: {compare(a, e)}\n{m}")


def assert_within_budget(
    truth: Function,
    function: Function,
    plain: Function,
    draw: Callable[[], Sequence[Tensor]],
    dtype: torch.dtype,
    draws: int = 9,
    times: float = 2,
) -> None:
    """The errors of values and gradients in ``dtype`` are at most ``times`` those of plain torch in ``dtype``.

    Both are errors against the fp64 truth. Their medians over several draws of inputs are compared, because a norm can
    amplify rounding so much that one draw outweighs all others in a sum.
    """
    errors: dict[str, list[tuple[float, float]]] = {}
    for _ in range(draws):
        narrow = [x.to(dtype) for x in draw()]
        wide = [x.double() for x in narrow]
        actual = value_and_gradients(function, narrow)
        cotangent = cotangent_like(actual[0])
        expected = value_and_gradients(truth, wide, cotangent)
        rival = value_and_gradients(plain, narrow, cotangent)
        for i, (a, e, p) in enumerate(zip(actual, expected, rival, strict=True)):
            errors.setdefault(_name(i), []).append(_error_and_budget(a, e, p, 2, times))
    for name, pairs in errors.items():
        found, allowed = (median(side) for side in zip(*pairs, strict=True))
        assert found <= allowed, f"{name}: median error {found:.3g}, allowed {allowed:.3g}"


def check_budget(
    name: str,
    actual: Tensor,
    truth: Tensor,
    plain: Tensor,
    norms: Sequence[float] = (2, torch.inf),
    times: float = 2,
) -> None:
    """The error of ``actual``, in the largest entry and in the L2 norm, is at most ``times`` that of ``plain``."""
    for norm in norms:
        found, allowed = _error_and_budget(actual, truth, plain, norm, times)
        assert found <= allowed, (
            f"{name}: error {found:.3g} in norm {norm}, allowed {allowed:.3g}; {compare(actual, truth)}"
        )


def _error_and_budget(actual: Tensor, truth: Tensor, plain: Tensor, norm: float, times: float) -> tuple[float, float]:
    """The norm of the error, and ``times`` that of plain torch.

    Rounding the truth to the dtype has an error of half a unit in the last place. Plain torch may have less by chance,
    so that much is added to the budget.
    """
    assert actual.shape == truth.shape == plain.shape, (actual.shape, truth.shape, plain.shape)
    assert actual.dtype == plain.dtype, (actual.dtype, plain.dtype)
    if not actual.numel():
        return 0.0, 0.0
    tensors = (actual.double() - truth, plain.double() - truth, truth)
    error, plain_error, size = (float(torch.linalg.vector_norm(t, norm)) for t in tensors)
    return error, times * plain_error + torch.finfo(actual.dtype).eps / 2 * size


def assert_threads_do_not_matter(function: Callable[[], Sequence[Tensor]]) -> None:
    """function() gives the same bits with any number of threads."""
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5, 1):
            torch.set_num_threads(threads)
            results.append(function())
    finally:
        torch.set_num_threads(before)
    for found in results[1:]:
        assert all(map(torch.equal, found, results[0]))


def compare(actual: Tensor, expected: Tensor) -> str:
    """The difference as a vector: relative L2, cosine, signed bias, and the worst index."""
    if actual.shape != expected.shape or not actual.numel():
        return f"shapes {tuple(actual.shape)} and {tuple(expected.shape)}"
    a, e = actual.double().flatten(), expected.double().flatten()
    tiny = torch.finfo(torch.float64).tiny
    relative = (a - e).norm() / e.norm().clamp(min=tiny)
    cosine = a @ e / (a.norm() * e.norm()).clamp(min=tiny)
    worst = int((a - e).abs().nan_to_num(nan=torch.inf).argmax())
    index = tuple(map(int, torch.unravel_index(torch.tensor(worst), actual.shape)))
    return (
        f"relative L2 {relative:.3g}, cosine {cosine:.9f}, bias {(a - e).mean():.3g}, "
        f"worst at {index}: expected {e[worst]:.9g}, got {a[worst]:.9g}"
    )


def padded_pairs(selected: Tensor, packed: Sequence[bool] | None = None) -> RaggedPairs:
    """The pairs as they are while torch.compile traces: the host knows no offsets, tables are padded to B * N."""

    def build(selected: Tensor) -> RaggedPairs:
        return RaggedPairs.from_routing(selected, packed)

    torch._dynamo.reset()
    pairs = torch.compile(build, fullgraph=True, backend="eager", dynamic=False)(selected)
    assert pairs.host_offsets is None
    return pairs


def mask(*rows: str) -> Tensor:
    """A routing from its picture: mask("x.x", "...") has two samples and three experts."""
    return torch.tensor([[c == "x" for c in row] for row in rows])


# All degenerate batches of pairs, by what is special about them.
ROUTINGS = {
    "no pair": mask("...", "...", "..."),
    "one pair": mask("...", ".x.", "..."),
    "all pairs": mask("xxx", "xxx", "xxx"),
    "same expert for everybody": mask("..x", "..x", "..x"),
    "one expert per sample": mask(".x.", "x..", "..x"),
    "idle expert and sample without experts": mask("x.x", "...", "x..", "x.x"),
    "no sample": torch.zeros(0, 3, dtype=torch.bool),
}


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """The formula of LayerNorm, for truths."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias


def _name(i: int) -> str:
    return "value" if i == 0 else f"gradient of input {i - 1}"


def interpolate(x: Tensor, in_size: tuple[int, int], out_size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """torch's own resampling, computed in ``dtype`` on a (M, h*w, C) tensor."""
    grid = x.to(dtype).unflatten(1, in_size).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=out_size, mode="bilinear", align_corners=False)
    return grid.permute(0, 2, 3, 1).flatten(1, 2)
