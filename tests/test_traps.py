"""The traps of the official code that concern the adapter: each test guards one of them, T1 to T26."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import tiny
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import mova_kernels.ops
from mova_kernels import MoVAdapter, MoVAdapterConfig
from mova_kernels.adapter import Attention
from mova_kernels.dense_reference import dense_adapter

NONE = torch.zeros(4, 3)


def run(adapter, routing=tiny.ROUTING, base=None, experts=None, text=None):
    inputs = tiny.inputs()
    base = inputs[0] if base is None else base
    experts = inputs[1] if experts is None else experts
    text = inputs[2] if text is None else text
    return adapter(base, experts, routing, text, grids=tiny.GRIDS)


def close(actual, expected, tolerance=2e-5):
    assert (actual.double() - expected).abs().max() <= tolerance * expected.abs().max()


def test_t1_routing_none_means_all_experts():
    adapter = tiny.adapter()
    assert torch.equal(run(adapter, None), run(adapter, torch.ones(4, 3)))


def test_t2_without_experts_the_result_depends_on_the_base_alone():
    adapter, (base, experts, _) = tiny.adapter(), tiny.inputs()
    expected = run(adapter, NONE)
    assert torch.equal(run(adapter, NONE, experts=[f + 1 for f in experts], text=torch.ones(4, 12)), expected)
    assert torch.equal(adapter(base, [None] * 3, NONE), expected)
    # A sample without experts inside a batch of others, and the official answer.
    assert torch.equal(run(adapter)[1], expected[1])
    close(expected, tiny.truth(*tiny.inputs()[:2], NONE, tiny.inputs()[2]))


def test_t3_fewer_experts_than_topk():
    routing = torch.eye(3)[[0, 1, 2, 2]]
    base, experts, text = tiny.inputs()
    close(run(tiny.adapter(), routing), tiny.truth(base, experts, routing, text))


def test_t4_each_block_computes_only_its_own_topk(monkeypatch):
    num_pairs = []
    attend = mova_kernels.ops.expert_attention

    def spy(q, *args, **options):
        num_pairs.append(len(q))
        return attend(q, *args, **options)

    monkeypatch.setattr(mova_kernels.ops, "expert_attention", spy)
    base, experts, text = tiny.inputs()
    close(run(tiny.adapter(), None), tiny.truth(base, experts, torch.ones(4, 3), text))
    # Per block: four samples with the two best of three selected experts; then the self-attention of four samples.
    assert num_pairs == [8, 4, 8, 4]


def test_t5_a_single_expert_gives_the_gate_no_gradient():
    adapter = tiny.adapter()
    run(adapter, torch.eye(3)[[0, 1, 2, 0]]).sum().backward()
    assert all(not p.grad.any() for block in adapter.blocks for p in block.gate.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_t6_a_batch_gives_what_its_samples_give_alone(training):
    adapter, (base, experts, text) = tiny.adapter().train(training), tiny.inputs()
    together = run(adapter)
    for b in range(4):
        one = slice(b, b + 1)
        alone = adapter(base[one], [f[one] for f in experts], tiny.ROUTING[one], text[one], grids=tiny.GRIDS)
        close(alone, together[one].double())


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("resampled", [True, False])
def test_t7_unselected_features_are_never_read(poison, resampled):
    adapter = tiny.adapter()
    grids = tiny.GRIDS if resampled else ((6, 6),) * 3
    base, experts, text = tiny.inputs(grids=grids)
    clean = adapter(base, experts, tiny.ROUTING, text, grids=grids)
    clean.sum().backward()
    expected = {name: p.grad for name, p in adapter.named_parameters()}
    adapter.zero_grad()
    for e, feature in enumerate(experts):
        feature[~tiny.ROUTING[:, e]] = poison
    text[1] = poison  # the sample without experts
    leaves = [t.requires_grad_() for t in (text, *experts)]
    output = adapter(base, experts, tiny.ROUTING, text, grids=grids)
    output.sum().backward()
    assert torch.equal(output, clean)
    for name, p in adapter.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=0, atol=0, msg=name)
    assert all(leaf.grad.isfinite().all() for leaf in leaves)


@pytest.mark.parametrize("value", [0.5, -1.0, 2.0, torch.nan])
def test_t8_routing_other_than_0_and_1_is_refused(value):
    routing = tiny.ROUTING.float()
    routing[2, 1] = value
    with pytest.raises(ValueError, match=rf"routing must hold only 0 and 1, got \[{value}\]"):
        run(tiny.adapter(), routing)


@pytest.mark.parametrize("shape", [(4, 1), (4, 2), (4, 9), (1, 3), (3,)])
def test_t9_routing_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"routing must have shape \(4, 3\), got"):
        run(tiny.adapter(), torch.ones(shape))


def test_t10_the_width_of_an_unselected_expert_is_checked():
    _, experts, _ = tiny.inputs()
    with pytest.raises(ValueError, match=r"experts\[2\] must have shape .* 16\), got \(4, 15, 15\)"):
        run(tiny.adapter(), NONE, experts=[*experts[:2], experts[2][..., :15]])


def test_t11_the_number_of_base_tokens_is_checked_and_may_be_odd():
    with pytest.raises(ValueError, match=r"base must have shape \(B, 36, 32\), got \(4, 35, 32\)"):
        run(tiny.adapter(), base=tiny.inputs()[0][:, :35])
    config = tiny.square_config(1, resolution=5)  # pools 5 to 2 with windows of unequal size
    base, experts, text = tiny.inputs(config, 2, ((3, 3),))
    output = tiny.adapter(config)(base, experts, None, text)
    assert output.shape == (2, 4, 24)
    close(output, tiny.truth(base, experts, torch.ones(2, 1), text, config, ((3, 3),)))


# The narrowest head; widths that are no power of two; one head; the text narrower and wider than the tokens.
@pytest.mark.parametrize(("channels", "heads", "text"), [(16, 4, 5), (36, 3, 40), (24, 1, 24)])
def test_t12_widths_and_heads_come_from_the_config(channels, heads, text):
    config = tiny.square_config(2, in_channels=channels, num_heads=heads, text_channels=text)
    base, experts, text = tiny.inputs(config, 2, ((4, 4), (7, 7)))
    expected = tiny.truth(base, experts, torch.ones(2, 2), text, config, ((4, 4), (7, 7)))
    close(tiny.adapter(config)(base, experts, None, text), expected)


def test_t13_one_text_serves_all_samples_and_no_other_number_does():
    adapter, text = tiny.adapter(), tiny.inputs()[2]
    assert torch.equal(run(adapter, text=text[:1]), run(adapter, text=text[:1].repeat(4, 1)))
    with pytest.raises(ValueError, match="text must have 1 or 4 rows, got 2"):
        run(adapter, text=text[:2])


def test_t14_topk_has_one_name():
    assert asdict(MoVAdapterConfig(topk=2))["topk"] == 2
    with pytest.raises(TypeError, match="topk_experts"):
        MoVAdapterConfig(topk_experts=2)


def test_t15_topk_may_exceed_the_number_of_experts():
    config = tiny.square_config(2, topk=5)
    base, experts, text = tiny.inputs(config, 2, ((4, 4),) * 2)
    expected = tiny.truth(base, experts, torch.ones(2, 2), text, config, ((4, 4),) * 2)
    close(tiny.adapter(config)(base, experts, None, text), expected)


def test_t16_rope_tables_are_dropped_on_load_written_on_export_and_stay_fp32():
    adapter = tiny.adapter()
    state = adapter.official_state_dict()
    tables = [name for name in state if ".rope." in name]
    assert len(tables) == 2 * 2 * (3 + 1)  # cosine and sine, for the attentions of two blocks
    assert not any("rope" in name for name in adapter.state_dict())
    rounded = {name: t.bfloat16() if ".rope." in name else t for name, t in state.items()}
    assert tiny.adapter(seed=8).load_state_dict(rounded, strict=True) == ([], [])
    exact = adapter.rope.cos.clone()
    adapter.bfloat16().float()
    assert torch.equal(adapter.rope.cos, exact)
    # The number of official keys at the official size, without the text encoder.
    with torch.device("meta"):
        assert len(MoVAdapter(MoVAdapterConfig()).official_state_dict()) == 379


def test_t16_anything_else_missing_or_unexpected_is_reported():
    adapter = tiny.adapter()
    state = {**adapter.official_state_dict(), "blocks.0.cross_attn.0.rope.phase": torch.ones(1)}
    del state["blocks.1.norm4.bias"]
    with pytest.raises(RuntimeError, match=r"(?s)Missing.*blocks\.1\.norm4\.bias.*Unexpected.*rope\.phase"):
        adapter.load_state_dict(state)


def test_t17_positions_are_rounded_as_officially():
    cos, _ = mova_kernels.ops.rope2d_table(37, 8)
    position = torch.arange(37) / 37 * 37
    assert (position != torch.arange(37)).sum() == 4
    assert torch.equal(cos.view(37, 37, 8)[:, 0, 0], position.cos())
    assert torch.equal(cos.view(37, 37, 8)[0, :, 4], position.cos())


def test_t18_every_norm_has_eps_1e_5():
    norms = [m for m in tiny.adapter().modules() if isinstance(m, nn.LayerNorm)]
    assert {n.eps for n in norms} == {1e-5}
    # A base so small that eps decides: also the op paths must use it.
    base, experts, text = tiny.inputs()
    actual = run(tiny.adapter(), base=base * 1e-3)
    close(actual, tiny.truth(base * 1e-3, experts, tiny.ROUTING, text))


def test_t19_the_downsampler_is_a_depthwise_bottleneck_with_squeeze_excite():
    stage = tiny.adapter().downsample[0]
    assert stage.b1.conv2.conv.groups == stage.b1.conv2.conv.in_channels == 32
    x = torch.randn(2, 32, 6, 6)
    b1 = stage.b1
    y = nn.functional.silu(b1.conv2(nn.functional.silu(b1.conv1(x))))
    squeezed = nn.functional.silu(b1.se.fc1(y.mean((2, 3), keepdim=True)))
    torch.testing.assert_close(stage(x), x + b1.conv3(y * torch.sigmoid(b1.se.fc2(squeezed))))
    # At init the last norm is zero: no activation follows it, and the shortcut is the identity.
    torch.testing.assert_close(MoVAdapter(tiny.CONFIG).downsample[0](x), x, rtol=0, atol=0)


def test_t20_scores_are_never_materialised():
    config = tiny.square_config(2, resolution=16, in_channels=16)
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                largest = max(largest, t.numel() if isinstance(t, torch.Tensor) else 0)
            return out

    base, experts, text = tiny.inputs(config, 1, ((8, 8),) * 2)
    adapter, parameters = tiny.adapter(config), tiny.parameters(config)
    with Sizes():
        adapter(base, experts, None, text).sum().backward()
    assert largest < config.num_heads * config.num_tokens**2
    with Sizes():  # the measure does see the scores of the official computation
        dense_adapter(parameters, config, base, experts, torch.ones(1, 2), text)
    assert largest >= config.num_heads * config.num_tokens**2


def test_t21_training_mode_changes_nothing():
    adapter = tiny.adapter()
    assert torch.equal(run(adapter.train()), run(adapter.eval()))


def test_t22_text_is_needed_exactly_when_a_sample_selected_an_expert():
    adapter, (base, experts, _) = tiny.adapter(), tiny.inputs()
    adapter(base, experts, NONE, None, grids=tiny.GRIDS)
    with pytest.raises(ValueError, match="text must be given when a sample selected an expert, got None"):
        adapter(base, experts, tiny.ROUTING, None, grids=tiny.GRIDS)


def test_t23_at_init_the_output_is_the_mlp_of_the_pooled_base():
    adapter, (base, _, _) = MoVAdapter(tiny.CONFIG), tiny.inputs()
    pooled = nn.functional.avg_pool2d(base.view(4, 6, 6, 32).permute(0, 3, 1, 2), 2)
    expected = adapter.mlp(pooled.permute(0, 2, 3, 1).flatten(1, 2))
    output = run(adapter)
    torch.testing.assert_close(output, expected, rtol=0, atol=0)
    output.square().sum().backward()
    nonzero = {name for name, p in adapter.named_parameters() if p.grad.any()}
    ends = {"pos_embed", *(f"mlp.{i}.{leaf}" for i in (0, 2) for leaf in ("weight", "bias"))}
    ends |= {f"downsample.{i}.b1.conv3.bn.{leaf}" for i in (0, 2) for leaf in ("weight", "bias")}
    for i in range(2):
        modules = ["self_attn.proj", "mlp.w3", *(f"cross_attn.{e}.proj" for e in range(3))]
        ends |= {f"blocks.{i}.{m}.{leaf}" for m in modules for leaf in ("weight", "bias")}
    assert nonzero == ends


def test_t24_the_initial_state_survives_post_init_of_transformers():
    transformers = pytest.importorskip("transformers")

    class Model(transformers.PreTrainedModel):
        config_class = transformers.PretrainedConfig

        def __init__(self, config):
            super().__init__(config)
            self.other = nn.Linear(4, 4)
            self.adapter = MoVAdapter(tiny.CONFIG)
            self.before = {name: p.clone() for name, p in self.adapter.state_dict().items()}
            self.post_init()

        def _init_weights(self, module):
            super()._init_weights(module)
            if isinstance(module, nn.Linear):
                nn.init.constant_(module.weight, 3.0)

    model = Model(transformers.PretrainedConfig())
    assert model.other.weight.eq(3).all()  # post_init did its work
    for name, p in model.adapter.state_dict().items():
        assert torch.equal(p, model.before[name]), name


def test_t24_reset_parameters_restores_the_initial_state():
    adapter = tiny.adapter()
    adapter.reset_parameters()
    base = tiny.inputs()[0]
    assert torch.equal(run(adapter), run(adapter, NONE))
    assert not adapter.blocks[0].cross_attn[0].proj.bias.any()
    assert adapter(base, [None] * 3, NONE).any()


def test_t25_idle_experts_get_no_gradient_or_zeros_when_asked():
    routing = torch.tensor([[1, 0, 0]]).repeat(4, 1)
    adapter = tiny.adapter()
    run(adapter, routing).sum().backward()
    idle = {name for name, p in adapter.named_parameters() if p.grad is None}
    prefixes = tuple(f"blocks.{i}.{m}.{e}." for i in (0, 1) for m in ("cross_attn", "norm1", "norm2") for e in (1, 2))
    assert idle == {name for name, _ in adapter.named_parameters() if name.startswith(prefixes)}

    before = {name: p.grad for name, p in adapter.named_parameters()}
    adapter.zero_grad()
    adapter.idle_expert_gradients = True
    run(adapter, routing).sum().backward()
    for name, p in adapter.named_parameters():
        assert not p.grad.any() if name in idle else torch.equal(p.grad, before[name]), name
    # Nobody selects anything; everybody selects everything, of which each block keeps two.
    for everybody in (NONE, torch.ones(4, 3)):
        adapter.zero_grad()
        run(adapter, everybody).sum().backward()
        assert all(p.grad is not None for p in adapter.parameters())


def test_t26_the_hidden_width_is_the_official_one():
    with torch.device("meta"):
        adapter = MoVAdapter(MoVAdapterConfig())
    assert {block.mlp.w1.out_features for block in adapter.blocks} == {2730}
    assert isinstance(adapter.blocks[0].self_attn, Attention)
