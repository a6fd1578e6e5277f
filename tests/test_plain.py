"""What is not numbers in memory on one device: computed right, or refused with the name of the argument."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tiny
import torch
from op_cases import CASES
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_map_only

import mova_kernels
from mova_kernels import RaggedPairs, _compiled, ops
from mova_kernels._linear import linear
from mova_kernels.ops.feature_norm.op import centred_features

META = torch.device("meta")
each_case = pytest.mark.parametrize("name", CASES)
needs_cpu_library = pytest.mark.skipif(_compiled.cpu_reason() is not None, reason=str(_compiled.cpu_reason()))


class Recorder(TorchDispatchMode):
    """The calls of our raw ops."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, tuple] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "mova_kernels":
            self.calls[func._schema.name] = (func, args)
        return func(*args, **(kwargs or {}))


def raw_calls() -> dict[str, tuple]:
    """One call of every raw op that has a kernel for CPUs."""
    with Recorder() as recorder:
        for case in CASES.values():
            inputs = [x.requires_grad_() for x in case.inputs()]
            found = case.function(*inputs)
            (found if isinstance(found, Tensor) else torch.cat([t.flatten() for t in found])).sum().backward()
        centred = centred_features(torch.randn(2, 4, 3), (2, 2), (3, 2), torch.tensor([1]))
        pairs, one = RaggedPairs.from_routing(torch.tensor([[True]])), torch.ones(3)
        weight = torch.randn(2, 3, requires_grad=True)
        ops.ragged_linear([centred], pairs, [(one, one)], [[weight]])[0].sum().backward()
    return {name: (func, _detached(args)) for name, (func, args) in recorder.calls.items()}


def _detached(args):
    return tree_map_only(Tensor, lambda t: t.detach(), args)


RAW_OPS = sorted(
    schema.partition("(")[0]
    for schema in map(str, torch._C._jit_get_all_schemas())
    if schema.startswith("mova_kernels::")
)


@pytest.fixture(scope="module")
def calls() -> dict[str, tuple]:
    return raw_calls()


def tensors_of(func, args):
    """(name, path) of every tensor among the arguments."""
    for i, (argument, value) in enumerate(zip(func._schema.arguments, args, strict=False)):
        if isinstance(value, Tensor):
            yield argument.name, (i,)
        elif isinstance(value, (list, tuple)):
            yield from ((f"{argument.name}[{j}]", (i, j)) for j, v in enumerate(value) if isinstance(v, Tensor))


def replaced(args, path, function):
    args = [list(a) if isinstance(a, (list, tuple)) else a for a in args]
    if len(path) == 1:
        args[path[0]] = function(args[path[0]])
    else:
        args[path[0]][path[1]] = function(args[path[0]][path[1]])
    return args


@needs_cpu_library
@pytest.mark.parametrize("name", RAW_OPS)
def test_a_raw_op_refuses_one_tensor_on_the_meta_device(name, calls) -> None:
    func, args = calls[name]
    places = list(tensors_of(func, args))
    for argument, path in places if len(places) > 1 else ():
        others = re.escape(argument if path != places[0][1] else places[1][0])
        with pytest.raises(ValueError, match=f"{name.partition('::')[2]}: {others} must be on .* got"):
            func(*replaced(args, path, lambda t: t.to(META)))


@needs_cpu_library
@pytest.mark.parametrize("name", RAW_OPS)
def test_a_raw_op_of_meta_tensors_gives_meta_tensors(name, calls) -> None:
    func, args = calls[name]
    results = func(*tree_map_only(Tensor, lambda t: t.to(META), args))
    true = func(*args)
    for found, expected in zip(*map(torch.utils._pytree.tree_leaves, (results, true)), strict=True):
        assert found.is_meta and found.shape == expected.shape and found.dtype == expected.dtype


@needs_cpu_library
@pytest.mark.parametrize("name", RAW_OPS)
def test_a_raw_op_refuses_a_tensor_whose_memory_was_freed(name, calls) -> None:
    func, args = calls[name]
    for argument, path in tensors_of(func, args):

        def freed(t: Tensor) -> Tensor:
            t = torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)  # behind others, as in FSDP's flat parameter
            t.untyped_storage().resize_(0)
            return t

        value = replaced(args, path, freed)
        if torch.utils._pytree.tree_leaves(value[path[0]])[path[1] if len(path) > 1 else 0].numel():
            with pytest.raises(ValueError, match=f"{re.escape(argument)} must have memory, got a storage of 0 bytes"):
                func(*value)


def unaligned(t: Tensor) -> Tensor:
    """The same numbers, one byte behind where their type belongs."""
    if not t.numel():
        return t
    memory = bytearray(1) + bytearray(t.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    t = torch.frombuffer(memory, dtype=t.dtype, offset=1).view(t.shape)
    assert t.data_ptr() % t.element_size()
    return t


@needs_cpu_library
@pytest.mark.parametrize("name", RAW_OPS)
def test_a_raw_op_of_unaligned_tensors(name, calls, monkeypatch) -> None:
    func, args = calls[name]
    expected, seen = func(*args), []
    monkeypatch.setattr(_compiled, "address", lambda x: seen.append(x) or mova_kernels._plain.address(x))
    found = func(*tree_map_only(Tensor, lambda t: unaligned(t) if t.element_size() > 1 else t, args))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert all(x is None or x.data_ptr() % x.element_size() == 0 for x in seen)


def results(name: str, inputs: list[Tensor], **options) -> list[Tensor]:
    found = CASES[name].function(*inputs, **options)
    return [found] if isinstance(found, Tensor) else list(found)


def negated(t: Tensor) -> Tensor:
    """A view that says: the negative of what lies here."""
    t = torch.complex(torch.zeros_like(t), -t).conj().imag
    assert t.is_neg()
    return t


KINDS = {
    "lazily negated": negated,
    "expanded": lambda t: t[:1].expand_as(t) if t.shape[0] else t,
    "without adjacent channels": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
    "zero without memory": lambda t: torch._efficientzerotensor(t.shape),
    "of inference mode": lambda t: _of_inference(t),
    "unaligned": unaligned,
    "of a subclass": lambda t: t.as_subclass(Marked),
    "of a subclass that computes": lambda t: Wrapper(t),
}


def _of_inference(t: Tensor) -> Tensor:
    with torch.inference_mode():
        return t.clone()


class Marked(Tensor):
    """Numbers in memory under another name."""


class Wrapper(Tensor):
    """Holds another tensor, with which everything is computed."""

    @staticmethod
    def __new__(cls, inner):
        return Tensor._make_wrapper_subclass(cls, inner.shape, inner.stride(), dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        assert func.namespace != "mova_kernels", "a kernel reads memory, which a wrapper has not got"
        inner = tree_map_only(Wrapper, lambda t: t.inner, (args, kwargs or {}))
        out = tree_map_only(Tensor, Wrapper, func(*inner[0], **inner[1]))
        return return_and_correct_aliasing(func, args, kwargs or {}, out)


@each_case
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_tensors_that_mean_numbers(kind, name) -> None:
    inputs = [KINDS[kind](t) for t in CASES[name].inputs()]
    plain = [torch.zeros(t.shape) + (t.inner if isinstance(t, Wrapper) else t.as_subclass(Tensor)) for t in inputs]
    for found, expected in zip(results(name, inputs), results(name, plain), strict=True):
        found = found.inner if isinstance(found, Wrapper) else found.as_subclass(Tensor)
        torch.testing.assert_close(found, expected)


WRONG = {
    "sparse": lambda t: t.to_sparse(),
    "mkldnn": lambda t: t.to_mkldnn(),
    "quantized": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "nested": lambda t: (
        torch.nested.nested_tensor([t[:1].squeeze(0), t[1:2].squeeze(0)])
        if t.shape[0] > 1
        else torch.nested.nested_tensor([t])
    ),
    "jagged": lambda t: torch.nested.nested_tensor([t, t], layout=torch.jagged),
}


@pytest.mark.filterwarnings("ignore")
@each_case
@pytest.mark.parametrize("kind", WRONG)
def test_kinds_of_tensors_that_are_refused(kind, name) -> None:
    for i, argument in enumerate(CASES[name].shapes):
        inputs = CASES[name].inputs()
        if inputs[i].numel():
            inputs[i] = WRONG[kind](inputs[i])
            with pytest.raises(TypeError, match=rf"^{re.escape(argument)} must be a dense, strided tensor, got a "):
                results(name, inputs)


@each_case
def test_integers_are_refused(name) -> None:
    for i, argument in enumerate(CASES[name].shapes):
        inputs = CASES[name].inputs()
        inputs[i] = inputs[i].long()
        with pytest.raises((TypeError, ValueError), match=rf"^{re.escape(argument) if i else '.*'} must "):
            results(name, inputs)


@each_case
def test_one_argument_on_the_meta_device_is_named(name) -> None:
    shapes = CASES[name].shapes
    for i, argument in enumerate(shapes):
        inputs = CASES[name].inputs()
        inputs[i] = inputs[i].to(META)
        # Everything else is compared with the first tensor, so where that is the odd one, the second is named.
        with pytest.raises(ValueError, match=rf"^{re.escape(argument) if i else '.*'} must be on .*, got device"):
            results(name, inputs)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "subclass" not in kind])
def test_linear_and_centred_features_which_no_dispatcher_guards(kind) -> None:
    x, weight, bias = torch.randn(3, 4, 8), torch.randn(5, 8), torch.randn(5)
    given = [KINDS[kind](t) for t in (x, weight, bias)]
    plain = [torch.zeros(t.shape) + t for t in given]
    torch.testing.assert_close(linear(*given), torch.nn.functional.linear(*plain))
    if not _compiled.cpu_reason():
        found, expected = (centred_features(t, (2, 2), (3, 3), None) for t in (given[0], plain[0]))
        torch.testing.assert_close(found[:2], expected[:2])


ROWS = {"negated": (torch.tensor([2, 0, 1]), lambda r: torch._neg_view(-r)), "zeros": (
    torch.tensor([0]), lambda r: torch._efficientzerotensor(r.shape, dtype=r.dtype)
)}  # fmt: skip


@pytest.mark.parametrize("kind", ROWS)
def test_rows_that_are_not_what_their_memory_holds(kind) -> None:
    """PyTorch resolves every kind of argument but a list with gaps."""
    plain, lazily = ROWS[kind][0], ROWS[kind][1](ROWS[kind][0])
    found = []
    for rows in (plain, lazily):
        x = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = torch.cat(ops.feature_norm([x, x], [(2, 2), (2, 2)], (3, 3), [rows, None]))
        found.append((y, *torch.autograd.grad(y.square().sum(), x)))
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("which", ["x", "weight", "bias"])
def test_linear_of_freed_memory(which) -> None:
    operands = {"x": torch.randn(3, 8), "weight": torch.randn(5, 8), "bias": torch.randn(5)}
    operands[which].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"storage of size 0|not allocated"):
        linear(*operands.values())


@needs_cpu_library
@pytest.mark.parametrize("num_valid", [-1, 4, 10**9])
def test_a_count_beyond_the_pairs(num_valid) -> None:
    q = torch.randn(3, 64, 32, requires_grad=True)
    cos, sin = ops.rope2d_table(8, 16)
    with pytest.raises(ValueError, match=f"num_valid must be from 0 to the 3 pairs, got {num_valid}"):
        ops.expert_attention(q, q, q, cos, sin, 2, num_valid=torch.tensor([num_valid]), backend="cpu")
    num_valid = torch.tensor([2])
    out = ops.expert_attention(q, q, q, cos, sin, 2, num_valid=num_valid, backend="cpu")
    num_valid += 2
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation"):
        out.sum().backward()


def test_adapter_trains_on_features_from_inference_mode() -> None:
    base, experts, text = tiny.inputs()
    gradients = []
    for kind in (lambda t: t, _of_inference):
        adapter = tiny.adapter()
        adapter(kind(base), [kind(e) for e in experts], tiny.ROUTING, kind(text), grids=tiny.GRIDS).sum().backward()
        gradients.append([p.grad for p in adapter.parameters()])
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_only_the_door_takes_addresses() -> None:
    package = Path(mova_kernels.__file__).parent
    guilty = {p.name for p in package.rglob("*.py") if ".data_ptr(" in p.read_text()}
    assert guilty == {"_plain.py"}
