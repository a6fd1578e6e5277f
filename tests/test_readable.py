"""Whatever is changed about a module: the ops give what its own forward gives, or the error that it gives.

The truth is a copy of the model all of whose parts carry a hook that does nothing, so that every one of them is called.
"""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from torch import nn

from mova_kernels import MoVAdapter

BASE, EXPERTS, TEXT = tiny.inputs()
# One module of each role that a fused path reads or a shortcut bypasses.
PLACES = {
    "query": "blocks.0.cross_attn.0.q_proj",
    "value": "blocks.1.cross_attn.0.v_proj",
    "inner norm": "blocks.0.cross_attn.1.inner_attn_ln",
    "projection": "blocks.0.cross_attn.1.proj",
    "attention": "blocks.0.cross_attn.0",
    "first attention of a list": "blocks.1.cross_attn.0",
    "attentions": "blocks.0.cross_attn",
    "query norm": "blocks.0.norm1.0",
    "feature norm": "blocks.1.norm2.1",
    "norms": "blocks.1.norm2",
    "self-attention": "blocks.0.self_attn",
    "self-attention's key": "blocks.0.self_attn.k_proj",
    "feed-forward": "blocks.1.mlp",
    "feed-forward's gate": "blocks.1.mlp.w1",
    "feed-forward's norm": "blocks.0.mlp.ffn_ln",
    "feed-forward's end": "blocks.0.mlp.w3",
    "gate": "blocks.0.gate",
    "gate's activation": "blocks.0.gate.1",
    "tail": "downsample",
    "stage": "downsample.0",
    "bottleneck": "downsample.0.b1",
    "convolution with norm": "downsample.0.b1.conv1",
    "convolution": "downsample.0.b1.conv1.conv",
    "depthwise convolution": "downsample.2.b1.conv2.conv",
    "tail's norm": "downsample.2.b1.conv3.bn",
    "squeeze-excite": "downsample.0.b1.se",
    "squeeze": "downsample.0.b1.se.fc1",
    "pooling": "downsample.1",
    "end": "mlp",
    "end's linear": "mlp.2",
    "end's activation": "mlp.1",
}
INNER = {"_modules", "_parameters", "_buffers", "_built", "training"}  # changed by what follows, or not read


def hooked(adapter):
    for module in adapter.modules():
        module.register_forward_hook(lambda *_: None)
    return adapter


def outcome(adapter):
    try:
        with torch.no_grad():
            return adapter(BASE, EXPERTS, tiny.ROUTING, TEXT, grids=tiny.GRIDS)
    except Exception as error:
        return type(error), str(error)


def assert_same(change):
    """The model that was changed computes what its modules compute."""
    adapter, truth = tiny.adapter(), tiny.adapter()
    change(adapter)
    change(truth)
    found, expected = outcome(adapter), outcome(hooked(truth))
    if isinstance(expected, tuple):
        assert found == expected
    else:
        assert isinstance(found, torch.Tensor), found
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    return found


def other(value):
    """A value of the same type that means something else."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return [value + 1, max(value // 2, 1)]
    if isinstance(value, float):
        return value + 1.0
    if isinstance(value, str):
        return {"zeros": ["circular", "reflect"], "none": "tanh"}[value]
    if isinstance(value, tuple) and all(isinstance(v, int) for v in value):
        return [tuple(v + 1 for v in value), (*value[:-1], value[-1] + 1), tuple(2 for _ in value)]
    return []


def attributes():
    adapter = tiny.adapter()
    for place, path in PLACES.items():
        for name, value in vars(adapter.get_submodule(path)).items():
            changed = [] if name in INNER else other(value)
            for i, new in enumerate(changed if isinstance(changed, list) else [changed]):
                yield pytest.param(path, name, new, id=f"{place}: {name} ({i})")


def test_the_list_of_attributes_has_those_that_matter():
    """It is made of vars(): a list that became empty would test nothing."""
    names = {parameter.values[1] for parameter in attributes()}
    assert names >= {"in_features", "eps", "normalized_shape", "elementwise_affine", "stride", "padding", "dilation"}
    assert names >= {"groups", "padding_mode", "kernel_size", "output_size", "num_heads", "resolution", "approximate"}


@pytest.mark.parametrize(("path", "name", "value"), [*attributes()])
def test_a_changed_attribute(path, name, value):
    assert_same(lambda adapter: setattr(adapter.get_submodule(path), name, value))


def tensors():
    adapter = tiny.adapter()
    for place, path in PLACES.items():
        for name in adapter.get_submodule(path)._parameters:
            for kind in TENSOR_CHANGES:
                yield pytest.param(path, name, kind, id=f"{place}: {name}, {kind}")


def buffer(module, name, old):
    delattr(module, name)
    module.register_buffer(name, 2 * old)


def attribute(module, name, old):
    delattr(module, name)
    setattr(module, name, 2 * old)


def shadow(module, name, old):
    vars(module)[name] = 2 * old


class Twice(torch.Tensor):
    """A tensor that the ops do not know."""


TENSOR_CHANGES = {
    "removed": lambda m, name, old: setattr(m, name, None),
    "another": lambda m, name, old: setattr(m, name, nn.Parameter(1.5 * old + 0.25)),
    "one more row": lambda m, name, old: setattr(m, name, nn.Parameter(torch.cat([old, old[:1]]))),
    "one row": lambda m, name, old: setattr(m, name, nn.Parameter(old[:1].clone())),
    "fp64": lambda m, name, old: setattr(m, name, nn.Parameter(old.double())),
    "a strided view": lambda m, name, old: setattr(m, name, nn.Parameter(old.repeat_interleave(2, -1)[..., ::2])),
    "expanded": lambda m, name, old: setattr(m, name, nn.Parameter(old[:1].expand_as(old))),
    "a buffer": buffer,
    "an attribute": attribute,
    "shadowed": shadow,
    "a subclass": lambda m, name, old: setattr(m, name, nn.Parameter((2 * old).as_subclass(Twice))),
}


@pytest.mark.parametrize(("path", "name", "kind"), [*tensors()])
def test_a_changed_tensor(path, name, kind):
    def change(adapter):
        module = adapter.get_submodule(path)
        old = getattr(module, name)
        if old is None:
            old = torch.linspace(-1, 1, module.weight.shape[0])
            if kind in ("removed", "shadowed"):
                kind_of_none[kind](module, name, old)
                return
        TENSOR_CHANGES[kind](module, name, old.detach())

    assert_same(change)


kind_of_none = {"removed": lambda *_: None, "shadowed": lambda m, name, old: vars(m).__setitem__(name, old)}


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("path", [*PLACES.values(), "blocks.0.gate.0", "blocks.1.norm3"])
def test_a_tensor_without_data_is_refused(path, name):
    """PyTorch's own modules take some, and give memory that nobody wrote."""
    adapter = tiny.adapter()
    module = adapter.get_submodule(path)
    if module._parameters.get(name) is not None:
        setattr(module, name, nn.Parameter(getattr(module, name).to("meta")))
        with pytest.raises(ValueError, match="meta"):
            adapter(BASE, EXPERTS, tiny.ROUTING, TEXT, grids=tiny.GRIDS)


def replaced(path, build):
    def change(adapter):
        torch.manual_seed(0)
        parent, _, name = path.rpartition(".")
        setattr(adapter.get_submodule(parent), name, build(adapter.get_submodule(path)))

    return change


class Linear(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


REPLACED = {
    "a linear with bias": replaced("blocks.0.cross_attn.0.v_proj", lambda m: nn.Linear(20, 32)),
    "a linear without bias": replaced("blocks.0.cross_attn.0.proj", lambda m: nn.Linear(32, 32, bias=False)),
    "a wider hidden layer": replaced("blocks.0.cross_attn.0.inner_attn_ln", lambda m: nn.LayerNorm(32, 1e-3)),
    "a norm without bias": replaced("blocks.0.norm1.0", lambda m: nn.LayerNorm(32, 1e-5, bias=False)),
    "a norm without parameters": replaced(
        "blocks.0.norm2.1", lambda m: nn.LayerNorm(8, 1e-5, elementwise_affine=False)
    ),
    "a norm of tokens and channels": replaced("blocks.0.norm1.0", lambda m: nn.LayerNorm((36, 32), 1e-5)),
    "another norm": replaced("blocks.0.norm1.0", lambda m: nn.RMSNorm(32)),
    "a subclass": replaced("blocks.1.cross_attn.2.k_proj", lambda m: Linear(16, 32, bias=False)),
    "identity": replaced("blocks.0.mlp.ffn_ln", lambda m: nn.Identity()),
    "up is one channel": replaced("blocks.0.mlp.w2", lambda m: nn.Linear(32, 1)),
    "the gate is one channel": replaced("blocks.0.mlp.w1", lambda m: nn.Linear(32, 1)),
    "no pooling": replaced("downsample.1", lambda m: nn.Identity()),
    "pooling of another class": replaced("downsample.1", lambda m: nn.AvgPool2d(2)),
    "a wrapped pooling": replaced("downsample.1", Wrapper),
    "a wrapped block": replaced("blocks.0", Wrapper),
    "pooling of maxima": replaced("downsample.1", lambda m: nn.AdaptiveMaxPool2d(3)),
    "pooling to fewer tokens": replaced("downsample.1", lambda m: nn.AdaptiveAvgPool2d(2)),
    "pooling to more tokens": replaced("downsample.1", lambda m: nn.AdaptiveAvgPool2d(6)),
    "a dilated convolution": replaced(
        "downsample.0.b1.conv2.conv", lambda m: nn.Conv2d(32, 32, 3, padding=2, dilation=2, groups=32, bias=False)
    ),
    "a convolution with bias": replaced("downsample.0.b1.conv1.conv", lambda m: nn.Conv2d(32, 32, 1)),
    "a wider squeeze": replaced("downsample.0.b1.se.fc1", lambda m: nn.Conv2d(32, 9, 1)),
    "an activation between": replaced("mlp.1", lambda m: nn.ReLU()),
    "one more layer": lambda a: a.mlp.append(nn.LayerNorm(24)),
    "one more stage": lambda a: a.downsample.append(copy.deepcopy(a.downsample[0])),
    "stages in another order": lambda a: a.downsample._modules.update({"0": a.downsample[2], "2": a.downsample[0]}),
    "keys in another order": lambda a: a.downsample._modules.update({"0": a.downsample._modules.pop("0")}),
    "one more expert": lambda a: a.blocks[0].cross_attn.append(copy.deepcopy(a.blocks[0].cross_attn[0])),
    "experts in another order": lambda a: a.blocks[0].norm1._modules.update({"0": a.blocks[0].norm1[1]}),
    "another forward": lambda a: setattr(a.blocks[0].norm1[0], "forward", lambda x: 2 * x),
    "another convolution": lambda a: setattr(
        a.downsample[0].b1.conv1.conv, "_conv_forward", lambda x, weight, bias: 2 * x
    ),
    "a compiled part": lambda a: a.blocks[0].norm1[0].compile(backend="eager"),
    "another topk": lambda a: setattr(a.blocks[0], "topk", 1),
    "other heads everywhere": lambda a: [setattr(m, "num_heads", 4) for m in a.blocks[0].cross_attn],
}


@pytest.mark.parametrize("name", REPLACED)
def test_a_replaced_part(name):
    assert_same(REPLACED[name])


def test_a_changed_dtype_of_a_whole_part():
    for path in ("blocks.0.cross_attn", "blocks.0.norm2", "downsample", "blocks.0.mlp"):
        assert_same(lambda adapter, path=path: adapter.get_submodule(path).double())


def test_an_equal_part_is_still_read():
    """Otherwise all of the above could be true because nothing is ever read."""
    adapter = tiny.adapter()
    adapter.blocks[0].cross_attn[0].v_proj = nn.Linear(20, 32, bias=False)
    adapter.blocks[0].norm1[0].weight = nn.Parameter(torch.ones(32))
    assert adapter.blocks[0].modules_to_call(adapter.pos_embed) == []


HOOKS = {
    "forward": lambda m, hook: m.register_forward_hook(hook),
    "forward with keywords": lambda m, hook: m.register_forward_hook(hook, with_kwargs=True),
    "forward, always": lambda m, hook: m.register_forward_hook(hook, always_call=True),
    "before": lambda m, hook: m.register_forward_pre_hook(hook),
    "before, with keywords": lambda m, hook: m.register_forward_pre_hook(hook, with_kwargs=True),
    "backward": lambda m, hook: m.register_full_backward_hook(hook),
    "before backward": lambda m, hook: m.register_full_backward_pre_hook(hook),
}
GLOBAL_HOOKS = {
    "forward": nn.modules.module.register_module_forward_hook,
    "before": nn.modules.module.register_module_forward_pre_hook,
    "backward": nn.modules.module.register_module_full_backward_hook,
    "before backward": nn.modules.module.register_module_full_backward_pre_hook,
}
HOOKED = [
    "blocks.0.cross_attn.0.q_proj", "blocks.0.norm2.1", "blocks.0.mlp.ffn_ln", "blocks.1.self_attn.proj",
    "downsample.0.b1.conv2.conv", "downsample.1", "mlp.0",
]  # fmt: skip


def train(adapter):
    output = adapter(BASE, EXPERTS, tiny.ROUTING, TEXT, grids=tiny.GRIDS)
    output.sum().backward()
    return output


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("path", HOOKED)
def test_every_hook_is_called(path, kind):
    adapter, called = tiny.adapter(), []
    HOOKS[kind](adapter.get_submodule(path), lambda *_: called.append(path))
    torch.testing.assert_close(train(adapter), train(tiny.adapter()), rtol=1e-5, atol=1e-5)
    assert called


@pytest.mark.parametrize("kind", GLOBAL_HOOKS)
def test_a_hook_for_all_modules_sees_all(kind):
    adapter, called = tiny.adapter(), set()
    handle = GLOBAL_HOOKS[kind](lambda module, *_: called.add(module))
    try:
        output = train(adapter)
    finally:
        handle.remove()
    torch.testing.assert_close(output, train(tiny.adapter()), rtol=1e-5, atol=1e-5)
    assert {adapter.get_submodule(path) for path in HOOKED} <= called


@pytest.mark.parametrize("path", HOOKED)
def test_a_forward_replaced_for_a_whole_class_is_called(monkeypatch, path):
    adapter, called = tiny.adapter(), []
    kind = type(adapter.get_submodule(path))
    original = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: called.append(self) or original(self, x))
    train(adapter)
    assert adapter.get_submodule(path) in called


PATCHED = [
    *((kind, "__call__") for kind in (nn.Module, nn.Linear, nn.LayerNorm, nn.Conv2d, nn.AdaptiveAvgPool2d)),
    (nn.Module, "_call_impl"),
    *((nn.functional, name) for name in ("linear", "layer_norm", "adaptive_avg_pool2d")),
]


@pytest.mark.parametrize(("where", "name"), PATCHED, ids=[f"{where.__name__}.{name}" for where, name in PATCHED])
def test_what_torch_calls_for_a_module_may_be_replaced(monkeypatch, where, name):
    """The results are those of modules that are all called."""
    original = getattr(where, name)
    monkeypatch.setattr(where, name, lambda *a, **k: 1.1 * original(*a, **k))
    called = tiny.adapter()
    for module in called.modules():
        module.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(train(tiny.adapter()), train(called), rtol=1e-4, atol=1e-4)


def tie(adapter):
    first, second = adapter.blocks[0].cross_attn[:2]
    second.proj.weight = first.proj.weight
    adapter.blocks[0].norm1[1].weight = adapter.blocks[0].norm1[0].weight
    adapter.blocks[1].cross_attn[0] = adapter.blocks[0].cross_attn[0]
    adapter.downsample[2].b1.conv1.conv.weight = adapter.downsample[0].b1.conv1.conv.weight
    adapter.blocks[0].mlp.w2.weight = adapter.blocks[0].mlp.w1.weight


def test_tied_parameters_have_the_sum_of_their_gradients():
    tied, truth = tiny.adapter(), tiny.adapter()
    for adapter in (tied, truth):
        tie(adapter)
    assert tied.blocks[0].modules_to_call(tied.pos_embed) == []
    train(tied)
    train(hooked(truth))
    for (name, p), q in zip(tied.named_parameters(), truth.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-4 * float(q.grad.abs().max()), msg=name)


def test_a_changed_part_is_refused_by_name_where_modules_cannot_be_called():
    adapter = tiny.adapter()
    adapter.blocks[1].norm1[2].eps = 1.0
    with pytest.raises(RuntimeError, match=r"norm1\.2 is hooked, wrapped or replaced"):
        torch.export.export(adapter, (BASE, EXPERTS, tiny.ROUTING, TEXT), {"grids": tiny.GRIDS})


def test_a_hook_for_all_modules_is_named_in_the_error():
    adapter = MoVAdapter(tiny.CONFIG)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert adapter.blocks[0].modules_to_call() == [
            "every module (by a hook for all, or by a new forward of its class)"
        ]
    finally:
        handle.remove()
