"""The vision encoders: against the official ones, at released and tiny sizes, around hand-made backbones, on disk.

CLIP, DINOv2 and BiomedCLIP are compared with their equations. Pix2Struct and DePlot are not: their names are those of
transformers, so only shapes, rows and files are.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny_experts import OFFICIAL, official_state, pixels, tiny
from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel
from transformers.modeling_outputs import BaseModelOutput

from mova import VisionExpert, experts
from mova.convert.expert_keys import from_official
from mova.encoders import VisionEncoder
from testing.golden import ExpertGolden

each_expert = pytest.mark.parametrize("name", OFFICIAL)
OWN = VisionExpert("own", "Sees.", 8, (0.5,) * 3, (0.5,) * 3, (4, 4), 3)


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    monkeypatch.setattr(experts, "_REGISTRY", dict(experts._REGISTRY))
    monkeypatch.setattr(experts, "_BUILDERS", dict(experts._BUILDERS))


# The three that no library holds in MoVA's form. Each covers what the tiny sizes cannot: the released image and grid.
GOLDEN = {
    "codetr": "nearest to 1280, 5 x 5 windows and all 6400 tokens, rotary tables scaled to 16, 80 x 80 to 37 x 37",
    "vary": "windows of 14 on a grid of 64, so padded ones, and the convolution behind the neck",
    "sam": "a block with windows before and one without behind another, and 3 heads",
}


@pytest.mark.all_threads
@pytest.mark.parametrize("name", GOLDEN)
def test_official_tokens(name):
    golden = ExpertGolden(name)
    meta = golden.meta
    sizes = {
        "hidden_size": meta["embed_dim"],
        "num_hidden_layers": meta["depth"],
        "num_attention_heads": meta["num_heads"],
        "global_attn_indexes": meta["global_blocks"],
        "window_size": meta["window"],
    }
    if name == "codetr":
        sizes["output_channels"] = meta["out_channels"]
    expert = replace(OFFICIAL[name], channels=meta["out_channels"])
    encoder = VisionEncoder.from_state(from_official(name, golden.parameters()), expert, sizes)
    tokens = encoder(golden.image())
    assert list(tokens.shape) == meta["shape"]
    torch.testing.assert_close(golden.strided(tokens), golden.output, rtol=0, atol=1e-4)


# Millions of parameters of the official modules; the paper rounds and leaves parts out.
MILLIONS = {
    "clip": 305.3, "dinov2": 1136.5, "vary": 90.85, "codetr": 310.6,
    "pix2struct": 512.8, "deplot": 91.8, "biomedclip": 85.8, "sam": 637.0,
}  # fmt: skip


@each_expert
def test_released_sizes(name):
    with torch.device("meta"):
        encoder = VisionEncoder(OFFICIAL[name])
    millions = sum(p.numel() for p in encoder.parameters()) / 1e6
    decimals = 2 if name == "vary" else 1
    assert round(millions, decimals) == MILLIONS[name]

    # At trained weights a wrong eps hides in the rounding. Co-DETR's larger one is its last norm's.
    norms = [getattr(m, "eps", getattr(m, "variance_epsilon", None)) for m in encoder.modules()]
    counts = {eps: norms.count(eps) for eps in norms if eps is not None}
    assert counts.keys() == {"clip": {1e-5}, "codetr": {1e-6, 1e-5}}.get(name, {1e-6})
    assert name != "codetr" or (counts[1e-5] == 1 and encoder.backbone.out_norm.eps == 1e-5)


def attention(x: Tensor, q: Tensor, k: Tensor, v: Tensor, heads: int = 2) -> Tensor:
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(-2, -3) for t in (q, k, v))
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    return (scores.softmax(-1) @ v).transpose(-2, -3).flatten(-2)


def test_biomedclip_against_the_equations():
    """A timm ViT from its official names: q, k, v of the fused weight in order, and the last norm."""
    expert, sizes = tiny("biomedclip")
    state = official_state("biomedclip")
    w = {key.removeprefix("trunk."): value for key, value in state.items()}

    def linear(x, name):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(x, name):
        return F.layer_norm(x, (16,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    image = pixels(expert, 2)
    seen = F.interpolate(image, size=(8, 8), mode="bilinear", align_corners=False)
    x = F.conv2d(seen, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=4).flatten(2).mT
    x = torch.cat([w["cls_token"].expand(2, 1, 16), x], 1) + w["pos_embed"]
    for i in range(3):
        y = norm(x, f"blocks.{i}.norm1")
        x = x + linear(attention(y, *linear(y, f"blocks.{i}.attn.qkv").chunk(3, -1)), f"blocks.{i}.attn.proj")
        y = norm(x, f"blocks.{i}.norm2")
        x = x + linear(F.gelu(linear(y, f"blocks.{i}.mlp.fc1")), f"blocks.{i}.mlp.fc2")
    encoder = VisionEncoder.from_state(from_official("biomedclip", state), expert, sizes)
    torch.testing.assert_close(encoder(image), norm(x, "norm")[:, 1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["clip", "dinov2"])
def test_layer_minus_two_against_the_equations(name):
    """All blocks but the last and no last norm: CLIP's pre-norm and quick GELU, DINOv2's SwiGLU and layer scale."""
    expert, sizes = tiny(name)
    state = official_state(name)
    clip = name == "clip"
    w = {key.removeprefix("vision_model."): value for key, value in state.items()}

    def linear(x, name):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(x, name):
        return F.layer_norm(x, (16,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-5 if clip else 1e-6)

    image = pixels(expert, 2)
    seen = image if clip else F.interpolate(image, size=(12, 12), mode="bilinear", align_corners=False)
    patches = "embeddings.patch_embedding" if clip else "embeddings.patch_embeddings.projection"
    x = F.conv2d(seen, w[f"{patches}.weight"], w.get(f"{patches}.bias"), stride=4).flatten(2).mT
    token = w["embeddings.class_embedding" if clip else "embeddings.cls_token"]
    positions = w["embeddings.position_embedding.weight" if clip else "embeddings.position_embeddings"]
    x = torch.cat([token.expand(2, 1, 16), x], 1) + positions
    if clip:
        x = norm(x, "pre_layrnorm")
    for i in range(2):
        if clip:
            layer = f"encoder.layers.{i}"
            y = norm(x, f"{layer}.layer_norm1")
            qkv = (linear(y, f"{layer}.self_attn.{p}_proj") for p in "qkv")
            x = x + linear(attention(y, *qkv), f"{layer}.self_attn.out_proj")
            y = linear(norm(x, f"{layer}.layer_norm2"), f"{layer}.mlp.fc1")
            x = x + linear(y * torch.sigmoid(1.702 * y), f"{layer}.mlp.fc2")
        else:
            layer = f"encoder.layer.{i}"
            y = norm(x, f"{layer}.norm1")
            qkv = (linear(y, f"{layer}.attention.attention.{p}") for p in ("query", "key", "value"))
            y = linear(attention(y, *qkv), f"{layer}.attention.output.dense")
            x = x + w[f"{layer}.layer_scale1.lambda1"] * y
            gate, up = linear(norm(x, f"{layer}.norm2"), f"{layer}.mlp.weights_in").chunk(2, -1)
            x = x + w[f"{layer}.layer_scale2.lambda1"] * linear(F.silu(gate) * up, f"{layer}.mlp.weights_out")
    encoder = VisionEncoder.from_state(from_official(name, state), expert, sizes)
    torch.testing.assert_close(encoder(image), x[:, 1:], rtol=1e-4, atol=1e-4)


@each_expert
def test_rows_are_independent(name):
    expert, sizes = tiny(name)
    encoder = VisionEncoder.from_state(from_official(name, official_state(name)), expert, sizes)
    batch = pixels(expert, 3)
    tokens = encoder(batch)
    assert tokens.shape == (3, expert.num_tokens, expert.channels) and tokens.dtype == torch.float32
    torch.testing.assert_close(tokens[1:2], encoder(batch[1:2]))
    assert not torch.allclose(tokens[0], tokens[1], atol=1e-2)
    assert encoder(batch[:0]).shape == (0, expert.num_tokens, expert.channels)


@each_expert
def test_bf16(name):
    """Within what rounding the weights and the input does, and nearer to fp32 than to another image's tokens."""
    expert, sizes = tiny(name)
    state = {key: 0.3 * value.bfloat16() for key, value in from_official(name, official_state(name)).items()}
    exact = VisionEncoder.from_state(state, expert, sizes, dtype=torch.float32)
    encoder = VisionEncoder.from_state(state, expert, sizes)
    batch = pixels(expert, 2, torch.bfloat16)
    tokens = encoder(batch)
    assert tokens.dtype == encoder(batch[:0]).dtype == torch.bfloat16
    assert exact(batch).dtype == torch.float32, "pixels follow the weights"
    expected = exact(batch.float())
    error = (tokens.float() - expected).norm() / expected.norm()
    assert error < 0.03, f"{error:.3g}"


@each_expert
def test_save_and_load_are_exact(name, tmp_path):
    expert, sizes = tiny(name)
    encoder = VisionEncoder(expert, sizes)
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.3)
    encoder.save(tmp_path)
    loaded = VisionEncoder.load(tmp_path, expert, sizes)
    batch = pixels(expert, 2)
    assert torch.equal(loaded(batch), encoder(batch))
    for one in (encoder, loaded):
        assert not one.training and not any(m.training for m in one.modules())
        assert not any(p.requires_grad for p in one.parameters())
    narrow = VisionEncoder.load(tmp_path, expert, sizes, dtype=torch.bfloat16, device="cpu")
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}
    narrow.save(tmp_path / "narrow")
    assert {p.dtype for p in VisionEncoder.load(tmp_path / "narrow", expert, sizes).parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("name", "changed"),
    [("sam", {"window_size": 4}), ("clip", {"layer_norm_eps": 1e-6}), ("codetr", {"num_attention_heads": 1})],
)
def test_sizes_must_be_those_of_the_file(name, changed, tmp_path):
    """Also those that change no shape, so that only the saved config tells."""
    expert, sizes = tiny(name)
    VisionEncoder(expert, sizes).save(tmp_path)
    with pytest.raises(
        ValueError, match=f"sizes must be those of .*config.json of {name}.*got {{'{next(iter(changed))}'"
    ):
        VisionEncoder.load(tmp_path, expert, {**sizes, **changed})


def test_attention_implementation_is_passed_through(tmp_path):
    """Eager attention gives the same tokens, and the saved file does not fix the choice."""
    expert, sizes = tiny("clip")
    encoder = VisionEncoder(expert, sizes)
    encoder.save(tmp_path)
    eager = VisionEncoder.load(tmp_path, expert, {**sizes, "attn_implementation": "eager"})
    assert encoder.backbone.config._attn_implementation == "sdpa"
    assert eager.backbone.config._attn_implementation == "eager"
    image = pixels(expert, 1)
    torch.testing.assert_close(eager(image), encoder(image))


def test_codetr_positions_are_resized_to_another_grid():
    """An input of 96 pixels on positions stored for 64, in windows of 2: 6 x 6 tokens."""
    expert, sizes = tiny("codetr")
    state = from_official("codetr", official_state("codetr"))
    larger = replace(expert, input_size=96, native_grid=(6, 6))
    encoder = VisionEncoder.from_state(state, larger, sizes)
    grid = state["pos_embed"][:, 1:].mT.unflatten(2, (4, 4))
    resized = F.interpolate(grid, size=(6, 6), mode="bicubic", align_corners=False).flatten(2).mT
    own = {**state, "pos_embed": torch.cat([state["pos_embed"][:, :1], resized], 1)}
    image = pixels(expert, 1)
    expected = VisionEncoder.from_state(own, larger, {**sizes, "image_size": 96})(image)
    torch.testing.assert_close(encoder(image), expected)
    with pytest.raises(ValueError, match="pixel_values must be square, with sides that are multiples of 32"):
        encoder.backbone(torch.zeros(1, 3, 48, 48))


class Camera(nn.Module):
    """Shows what reaches a backbone and hands out ``result`` of it."""

    def __init__(self, result) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.result = result
        self.seen = None

    def forward(self, pixels, **options):
        self.seen = pixels
        return self.result(pixels * self.scale, **options)


def camera(result, **fields) -> VisionEncoder:
    expert = replace(OWN, **fields)
    experts.register(expert, lambda: Camera(result), replace=True)
    return VisionEncoder(expert)


def as_tokens(pixels: Tensor) -> Tensor:
    return pixels.flatten(2).mT


def test_image_is_resized_bilinearly():
    """Half-pixel centres, no antialiasing, in fp32: output pixel 0 of 8 -> 4 is the mean of the pixels 0 and 1."""
    encoder = camera(as_tokens, input_size=4, resize="bilinear")
    image = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(
        encoder(image).mT.unflatten(2, (4, 4)), image.unflatten(3, (4, 2)).unflatten(2, (4, 2)).mean((3, 5))
    )
    encoder.bfloat16()
    narrow = image.bfloat16()
    expected = F.interpolate(narrow.double(), size=(4, 4), mode="bilinear", align_corners=False)
    assert torch.equal(encoder(narrow), as_tokens(expected.float().bfloat16()))


def test_image_is_resized_to_the_nearest():
    """Output pixel i of 8 -> 10 is input pixel floor(0.8 i), as MoVA has it for Co-DETR."""
    encoder = camera(lambda x: as_tokens(x)[:, :16], input_size=10, resize="nearest")
    image = torch.randn(1, 3, 8, 8)
    encoder(image)
    chosen = torch.arange(10) * 8 // 10
    assert torch.equal(encoder.backbone.seen, image[:, :, chosen][:, :, :, chosen])


def test_image_of_the_right_size_is_not_touched():
    encoder = camera(lambda x: x[:, :, :4, :4])
    image = torch.randn(1, 3, 8, 8)
    assert torch.equal(encoder(image), as_tokens(image[:, :, :4, :4]))
    assert torch.equal(encoder.backbone.seen, image)


@pytest.mark.parametrize("native", [(6, 6), (3, 5)])
def test_native_grid_is_brought_to_the_grid(native):
    encoder = camera(lambda x: x[:, :, : native[0], : native[1]], native_grid=native)
    image = torch.randn(2, 3, 8, 8)
    expected = F.interpolate(image[:, :, : native[0], : native[1]], size=(4, 4), mode="bilinear", align_corners=False)
    torch.testing.assert_close(encoder(image), as_tokens(expected))
    narrow = encoder.bfloat16()(image.bfloat16())
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.float(), as_tokens(expected), rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("layer", [None, 0, 1, -1, -2])
def test_layer_and_prefix(layer):
    """Three hidden states, each of one number, and two leading tokens of another; the result is 9."""

    def result(pixels, output_hidden_states=False):
        assert output_hidden_states == (layer is not None)
        states = [torch.full((pixels.shape[0], 18, 3), float(i)) for i in (0, 1, 2, 9)]
        for state in states:
            state[:, :2] = -1
        return BaseModelOutput(last_hidden_state=states[3], hidden_states=tuple(states[:3]))

    tokens = camera(result, layer=layer, prefix_tokens=2)(torch.zeros(2, 3, 8, 8))
    assert tokens.unique().tolist() == [9.0 if layer is None else float(layer % 3)]


def test_no_rows_do_not_reach_the_backbone():
    encoder = camera(as_tokens).half()
    tokens = encoder(torch.zeros(0, 3, 8, 8))
    assert tokens.shape == (0, 16, 3) and tokens.dtype == torch.float16 and encoder.backbone.seen is None


def test_gradients_when_asked_for():
    """The base encoder can be trained."""
    expert, sizes = tiny("clip")
    encoder = VisionEncoder(expert, sizes).requires_grad_(True)
    encoder(pixels(expert, 1)).square().sum().backward()
    gradients = [p.grad for name, p in encoder.named_parameters() if "patch_embedding" in name]
    assert len(gradients) == 1 and gradients[0].any()


class Stem(nn.Module):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 2, stride=2)
        self.register_buffer("shift", torch.linspace(0, 1, width)[:, None, None], persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.conv(pixels) + self.shift


def test_own_module(tmp_path):
    expert = experts.register(replace(OWN, channels=5), Stem)
    encoder = VisionEncoder(expert, {"width": 5})
    encoder.save(tmp_path / "stem")
    assert [path.name for path in (tmp_path / "stem").iterdir()] == ["model.safetensors"]
    loaded = VisionEncoder.load(tmp_path / "stem", expert, {"width": 5})
    image = torch.randn(1, 3, 8, 8)
    assert torch.equal(loaded(image), encoder(image))
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    half = VisionEncoder.load(tmp_path / "stem", expert, {"width": 5}, dtype=torch.float16)
    assert half(image).dtype == torch.float16
    with pytest.raises(
        ValueError, match=r"those of own at its sizes, got 2 of another shape \(conv.bias, conv.weight\)"
    ):
        VisionEncoder.load(tmp_path / "stem", expert)
    state = {"conv.weight": torch.zeros(5, 3, 2, 2), "stray": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"got 1 missing \(conv.bias\); 1 unexpected \(stray\)"):
        VisionEncoder.from_state(state, expert, {"width": 5})
    with pytest.raises(OSError):
        VisionEncoder.load(tmp_path / "nowhere", expert, {"width": 5})


def test_own_model_of_transformers(tmp_path):
    def build(**sizes):
        return SiglipVisionModel(SiglipVisionConfig(vision_use_head=False, **sizes))

    expert = VisionExpert("siglip", "Sees.", 32, (0.5,) * 3, (0.5,) * 3, (4, 4), 16, layer=-2)
    experts.register(expert, build)
    sizes = {"image_size": 32, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 2, "intermediate_size": 24}
    encoder = VisionEncoder(expert, sizes)
    image = torch.randn(2, 3, 32, 32)
    assert torch.equal(encoder(image), encoder.backbone(image, output_hidden_states=True).hidden_states[-2])
    encoder.save(tmp_path)
    assert torch.equal(VisionEncoder.load(tmp_path, expert, sizes)(image), encoder(image))
    with pytest.raises(OSError):
        VisionEncoder.load(tmp_path / "nowhere", expert, sizes)


def test_builders():
    assert experts.builder("sam") is experts.builder("sam")
    experts.register(replace(OFFICIAL["sam"], mean=(0.5,) * 3), replace=True)
    assert experts.builder("sam").__module__ == "functools", "a replaced expert keeps its builder"
    experts.register(OFFICIAL["sam"], Stem, replace=True)
    assert experts.builder("sam") is Stem


IMAGE = torch.zeros(1, 3, 8, 8)
BAD = {
    "no builder": (
        lambda: VisionEncoder(OWN), ValueError,
        "name must be of an expert with a builder: register it with experts.register(expert, build), got 'own'",
    ),
    "builder": (lambda: experts.register(OWN, "Stem"), TypeError, "build must be callable, got 'Stem'"),
    "builder of what": (lambda: experts.builder(3), TypeError, "name must be a string, got 3"),
    "no expert": (lambda: VisionEncoder("sam"), TypeError, "expert must be a VisionExpert, got 'sam'"),
    "resized patches": (
        lambda: camera(as_tokens, patches=True, input_size=4, resize="bilinear"), ValueError,
        "expert must not resize patches, got 'bilinear'",
    ),
    "image side": (
        lambda: camera(as_tokens)(IMAGE[..., :7]), ValueError,
        "pixels must have shape (B, 3, 8, 8) for own, got (1, 3, 8, 7)",
    ),
    "no batch": (lambda: camera(as_tokens)(IMAGE[0]), ValueError, "pixels must have shape (B, 3, 8, 8) for own"),
    "patches": (
        lambda: camera(as_tokens, patches=True)(IMAGE), ValueError,
        "pixels must have shape (B, 16, 14) for own, got (1, 3, 8, 8)",
    ),
    "bytes": (
        lambda: camera(as_tokens)(IMAGE.byte()), TypeError, "pixels must be floating point, got torch.uint8",
    ),
    "tokens": (
        lambda: camera(as_tokens)(IMAGE), ValueError,
        "backbone must return shape (1, 16, 3) for own, got (1, 64, 3)",
    ),
    "map": (
        lambda: camera(lambda x: x)(IMAGE), ValueError,
        "backbone must return shape (1, 3, 4, 4) for own, got (1, 3, 8, 8)",
    ),
    "no hidden states": (
        lambda: camera(lambda x, output_hidden_states: x, layer=-2)(IMAGE), ValueError,
        "layer must index the backbone's 0 hidden_states, got -2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, kind, message = BAD[name]
    with pytest.raises(kind, match=re.escape(message)):
        call()
