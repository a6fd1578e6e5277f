"""Derivatives other than one backward pass, of every op and of the adapter: the right numbers, or a backend error."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
import torch.autograd.forward_ad as forward_ad
from op_cases import CASES
from torch import Tensor
from torch.autograd.functional import jacobian

from mova_kernels import BackendError, backends, use_backend

each_case = pytest.mark.parametrize("name", CASES)
each_op = pytest.mark.parametrize("name", [name for name in CASES if name in backends.ops()])


def output(name: str, *inputs: Tensor, backend: str | None = None) -> Tensor:
    """All results of a case, in one vector."""
    found = CASES[name].function(*inputs, backend=backend)
    return found if isinstance(found, Tensor) else torch.cat([t.flatten() for t in found])


def leaves(name: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [x.requires_grad_() for x in CASES[name].inputs(dtype)]


def tangents(inputs: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in inputs]


def second_derivatives(name: str, dtype: torch.dtype) -> list[Tensor]:
    """Of <gradient, tangents>: a column of the Hessian."""
    inputs = leaves(name, dtype)
    value = output(name, *inputs).sin().sum()
    found = torch.autograd.grad(value, inputs, create_graph=True, allow_unused=True)
    used = [(g, t) for g, t in zip(found, tangents(inputs), strict=True) if g is not None]
    second = torch.autograd.grad(sum((g * t).sum() for g, t in used), inputs, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, second, strict=True)]


@each_case
def test_the_reference_is_differentiable_in_every_way(name) -> None:
    """fp64 against differences: one backward pass and one forward, both batched, and the gradient's own gradient."""
    inputs, function = leaves(name, torch.float64), lambda *t: output(name, *t, backend="reference")
    batched = {"check_batched_grad": True, "check_forward_ad": True, "check_batched_forward_grad": True}
    torch.autograd.gradcheck(function, inputs, fast_mode=True, **batched)
    torch.autograd.gradgradcheck(function, inputs, fast_mode=True, check_batched_grad=True)


@each_case
def test_a_gradient_of_the_kernels_has_the_references_gradient(name) -> None:
    for found, true in zip(
        second_derivatives(name, torch.float32), second_derivatives(name, torch.float64), strict=True
    ):
        torch.testing.assert_close(found, true.float(), rtol=1e-4, atol=1e-4)


@each_case
@pytest.mark.parametrize("outer", [torch.func.jacfwd, torch.func.jacrev])
def test_a_derivative_of_a_tangent(name, outer) -> None:
    """PyTorch's own layer_norm is wrong there."""
    inputs = CASES[name].inputs(torch.float64)
    directions = tangents(inputs)

    def along(step: Tensor) -> Tensor:
        moved = [x + step * t for x, t in zip(inputs, directions, strict=True)]
        return output(name, *moved).sin().sum()

    start = torch.zeros((), dtype=torch.float64)
    expected = torch.autograd.functional.hessian(along, start)
    torch.testing.assert_close(outer(torch.func.jacfwd(along))(start), expected, rtol=1e-8, atol=1e-8)


@each_case
def test_a_gradient_of_one_input_alone_and_its_own(name) -> None:
    for i in range(len(CASES[name].shapes)):
        inputs = CASES[name].inputs()
        inputs[i].requires_grad_()
        wide = CASES[name].inputs(torch.float64)
        wide[i].requires_grad_()
        true_value = output(name, *wide).sin().sum()
        if true_value.requires_grad:  # not that of an idle expert
            (found,) = torch.autograd.grad(output(name, *inputs).sin().sum(), inputs[i], create_graph=True)
            (true,) = torch.autograd.grad(true_value, wide[i])
            torch.testing.assert_close(found, true.float(), rtol=1e-4, atol=1e-4)


@each_case
def test_batched_gradients(name) -> None:
    inputs = leaves(name)
    value = output(name, *inputs)
    cotangents = torch.randn(3, *value.shape)
    options = {"retain_graph": True, "allow_unused": True}
    found = torch.autograd.grad(value, inputs, cotangents, is_grads_batched=True, **options)
    each = [torch.autograd.grad(value, inputs, c, **options) for c in cotangents]
    for x, f, *expected in zip(inputs, found, *each, strict=True):
        zeros = torch.zeros_like(x)
        expected = torch.stack([zeros if e is None else e for e in expected])
        torch.testing.assert_close(zeros.expand_as(expected) if f is None else f, expected)


@each_case
def test_forward_mode(name) -> None:
    inputs = CASES[name].inputs()
    directions = tangents(inputs)
    wide, wide_directions = ([t.double() for t in ts] for ts in (inputs, directions))
    _, true = torch.autograd.functional.jvp(lambda *t: output(name, *t), tuple(wide), tuple(wide_directions))
    _, by_func = torch.func.jvp(lambda *t: output(name, *t), tuple(inputs), tuple(directions))
    with forward_ad.dual_level():
        duals = map(forward_ad.make_dual, inputs, directions)
        tangent = forward_ad.unpack_dual(output(name, *duals)).tangent
    for found in (by_func, tangent):
        torch.testing.assert_close(found, true.float(), rtol=1e-4, atol=1e-4)


@each_case
def test_vmap(name) -> None:
    first = CASES[name].inputs()
    both = [torch.stack([a, b]) for a, b in zip(first, tangents(first), strict=True)]
    found = torch.func.vmap(lambda *t: output(name, *t))(*both)
    expected = torch.stack([output(name, *(t[i] for t in both)) for i in range(2)])
    torch.testing.assert_close(found, expected)


@each_case
def test_gradients_of_torch_func(name) -> None:
    inputs = leaves(name)
    expected = torch.autograd.grad(output(name, *inputs).sin().sum(), inputs, allow_unused=True)
    loss = lambda ts: output(name, *ts).sin().sum()  # noqa: E731
    for found, g, x in zip(torch.func.grad(loss)([x.detach() for x in inputs]), expected, inputs, strict=True):
        torch.testing.assert_close(found, torch.zeros_like(x) if g is None else g, rtol=1e-4, atol=1e-5)


@each_op
def test_a_kernel_by_name_is_refused(name) -> None:
    backend = "cpu" if "cpu" in backends._TABLE[name] else "triton"
    inputs = CASES[name].inputs()
    with pytest.raises(BackendError, match=r"torch\.func transforms .* are active"):
        torch.func.grad(lambda x: output(name, x, *inputs[1:], backend=backend).sum())(inputs[0])
    with forward_ad.dual_level(), use_backend(f"{name}={backend}"), pytest.raises(BackendError, match="has a tangent"):
        output(name, forward_ad.make_dual(inputs[0], torch.ones_like(inputs[0])), *inputs[1:])


def test_explain_says_so() -> None:
    def asked(x: Tensor) -> Tensor:
        answers.append(backends.explain())
        return x.sum()

    answers: list[dict] = []
    torch.func.grad(asked)(torch.ones(2))
    assert all(answer["reference"] == "runs" for answer in answers[0].values())
    assert "torch.func transforms" in answers[0]["rope2d"]["cpu"] or "compiled" in answers[0]["rope2d"]["cpu"]


BASE, EXPERTS, TEXT = tiny.inputs()
DIRECTION = torch.randn(BASE.shape, generator=torch.Generator().manual_seed(2))


def adapted(module):
    """The adapter's result as a function of the base tokens."""
    dtype = module.pos_embed.dtype
    features, text = [e.to(dtype) for e in EXPERTS], TEXT.to(dtype)
    return lambda base: module(base, features, tiny.ROUTING, text, grids=tiny.GRIDS)


def differences(function, base: Tensor, direction: Tensor, step: float = 1e-5) -> Tensor:
    return (function(base + step * direction) - function(base - step * direction)) / (2 * step)


@pytest.fixture(scope="module")
def slope() -> Tensor:
    """Of the adapter's result along DIRECTION, by differences in fp64."""
    wide = tiny.adapter(dtype=torch.float64).requires_grad_(False)
    return differences(adapted(wide), BASE.double(), DIRECTION.double()).float()


def test_adapter_jvp(slope) -> None:
    function = adapted(tiny.adapter().requires_grad_(False))
    torch.testing.assert_close(torch.func.jvp(function, (BASE,), (DIRECTION,))[1], slope, rtol=1e-4, atol=1e-4)


def test_adapter_forward_mode(slope) -> None:
    function = adapted(tiny.adapter())
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(function(forward_ad.make_dual(BASE, DIRECTION))).tangent
    torch.testing.assert_close(found, slope, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["blocks.0.cross_attn.0.k_proj.weight", "blocks.1.norm2.2.bias", "mlp.0.weight"])
def test_adapter_forward_mode_of_a_parameter(name) -> None:
    """Also where a coarse grid of features would be projected before it is resampled."""
    config = replace(tiny.CONFIG, expert_channels=(96,) * 3, resolution=8)
    grids = [(2, 2)] * 3
    base, experts, text = tiny.inputs(config, 2, grids)
    routing = torch.ones(2, 3, dtype=torch.bool)
    wide = tiny.adapter(config, dtype=torch.float64)
    direction = torch.randn(wide.get_parameter(name).shape, generator=torch.Generator().manual_seed(4))

    def result(module, value: Tensor) -> Tensor:
        dtype = module.pos_embed.dtype
        arguments = (base.to(dtype), [e.to(dtype) for e in experts], routing, text.to(dtype))
        return torch.func.functional_call(module, {name: value}, arguments, {"grids": grids})

    module = tiny.adapter(config)
    with forward_ad.dual_level():
        value = forward_ad.make_dual(module.get_parameter(name).detach(), direction)
        found = forward_ad.unpack_dual(result(module, value)).tangent
    value = wide.get_parameter(name).detach()
    expected = differences(lambda value: result(wide, value), value, direction.double()).detach().float()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_adapter_second_derivative_by_tangents() -> None:
    function = adapted(tiny.adapter(dtype=torch.float64).requires_grad_(False))
    along = lambda c: function(BASE.double() + c * DIRECTION.double()).square().sum()  # noqa: E731
    start = torch.zeros((), dtype=torch.float64)
    expected = torch.autograd.functional.hessian(along, start)
    found = torch.func.jacfwd(torch.func.jacfwd(along))(start)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # the rotary tables are fp32


@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
def test_adapter_vectorised_jacobian(strategy, slope) -> None:
    function = adapted(tiny.adapter().requires_grad_(False))
    along = lambda c: function(BASE + c * DIRECTION)[0, 0]  # noqa: E731
    found = jacobian(along, torch.zeros(()), vectorize=True, strategy=strategy)
    torch.testing.assert_close(found, slope[0, 0], rtol=1e-4, atol=1e-4)


def test_adapter_hessian_vector_product() -> None:
    def gradient(function, base: Tensor, create_graph: bool = False) -> Tensor:
        base = base.requires_grad_()
        return torch.autograd.grad(function(base).square().sum(), base, create_graph=create_graph)[0]

    wide = adapted(tiny.adapter(dtype=torch.float64))
    expected = differences(lambda base: gradient(wide, base), BASE.double(), DIRECTION.double()).float()
    base = BASE.clone().requires_grad_()
    found = torch.autograd.grad((gradient(adapted(tiny.adapter()), base, True) * DIRECTION).sum(), base)[0]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_adapter_vmap() -> None:
    function = adapted(tiny.adapter())
    found = torch.func.vmap(function)(torch.stack([BASE, DIRECTION]))
    torch.testing.assert_close(found, torch.stack([function(BASE), function(DIRECTION)]), rtol=1e-4, atol=1e-4)


def test_adapter_functional_call() -> None:
    module = tiny.adapter()

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        arguments = (BASE, EXPERTS, tiny.ROUTING, TEXT)
        return torch.func.functional_call(module, parameters, arguments, {"grids": tiny.GRIDS}).square().mean()

    parameters = dict(module.named_parameters())
    expected = dict(zip(parameters, torch.autograd.grad(loss(parameters), list(parameters.values())), strict=True))
    found = torch.func.grad(loss)({name: p.detach() for name, p in parameters.items()})
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5, msg=name)
