"""Names of the vision experts' weights: the official checkpoint's, the published files', and what loading reports."""

from __future__ import annotations

import re

import pytest
import torch
from tiny_experts import OFFICIAL, official_state, pixels, tiny
from torch.nn.functional import interpolate

from mova.convert.expert_keys import from_official, from_public, to_official, to_public
from mova.encoders import VisionEncoder

each_expert = pytest.mark.parametrize("name", OFFICIAL)


def same(found, expected) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype and torch.equal(found[key], value), key


@each_expert
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_official_round_trip_is_exact(name, dtype):
    state = {key: value.to(dtype) for key, value in official_state(name).items()}
    ours = from_official(name, state)
    same(to_official(name, ours, tiny(name)[1]), state)
    same(from_official(name, to_official(name, ours, tiny(name)[1])), ours)


@each_expert
def test_official_weights_survive_the_encoder(name, tmp_path):
    """Strict loading says that the names are right, and what comes back that every tensor went to its own place.

    They go through the layout of the installed transformers, which for CLIP, DINOv2 and ViT is not the published one.
    """
    from safetensors.torch import load_file

    expert, sizes = tiny(name)
    state = official_state(name)
    VisionEncoder.from_state(from_official(name, state), expert, sizes).save(tmp_path)
    same(to_official(name, load_file(tmp_path / "model.safetensors"), sizes), state)


def test_codetr_tables_at_released_sizes():
    """26 modules hold a table: 20 blocks and the model that of the windows, 4 blocks and the model that of all."""
    written = to_official("codetr", {"pos_embed": torch.zeros(1, dtype=torch.bfloat16)})
    del written["pos_embed"]
    rows = [table.shape[0] for table in written.values()]
    assert len(written) == 52 and rows.count(256) == 42 and rows.count(6400) == 10
    assert {table.shape[1] for table in written.values()} == {64}
    assert {table.dtype for table in written.values()} == {torch.bfloat16}
    # In a window of the pretraining size the positions are 0 to 15: token 17 is in row 1 and column 1.
    assert written["blocks.0.attn.rope.freqs_cos"][17, [0, 32]].tolist() == [torch.tensor(1.0).cos().bfloat16()] * 2


def test_biomedclip_head_is_dropped():
    """MoVA's checkpoint holds the projection behind the tower, and never runs it."""
    state = official_state("biomedclip")
    same(
        from_official("biomedclip", {**state, "head.proj.weight": torch.ones(4, 16)}),
        from_official("biomedclip", state),
    )


# The file of the authors: the prefix of the encoder, and what else it holds.
PUBLIC = {
    "clip": (
        "",
        """text_model.final_layer_norm.weight text_model.embeddings.position_ids text_projection.weight logit_scale
        vision_model.embeddings.position_ids visual_projection.weight""",
    ),
    "dinov2": ("", ""),
    "vary": ("", "net_3.weight"),
    "vary tiny": (
        "model.vision_tower.",
        "model.vision_tower.net_3.weight model.decoder.embed_tokens.weight lm_head.weight",
    ),
    "vary toy": (
        "transformer.vision_tower_high.",
        """transformer.vision_tower_high.net_3.weight transformer.vision_tower.vision_model.pre_layrnorm.weight
        transformer.wte.weight transformer.h.0.ln_1.weight transformer.mm_projector_vary.bias""",
    ),
    "codetr": ("backbone.", "neck.0.weight query_head.transformer.x rpn_head.x roi_head.0.x bbox_head.0.x"),
    "pix2struct": ("encoder.", "decoder.layer.0.mlp.layer_norm.weight"),
    "deplot": ("encoder.", "decoder.lm_head.weight"),
    "biomedclip": ("visual.", "visual.head.proj.weight text.proj.0.weight logit_scale"),
    "sam": ("image_encoder.", "prompt_encoder.pe_layer.x mask_decoder.iou_token.weight"),
}


@pytest.mark.parametrize("form", PUBLIC)
def test_public_form(form):
    name, (prefix, others) = form.split()[0], PUBLIC[form]
    official = official_state(name)
    public = {prefix + key: value for key, value in official.items()} | dict.fromkeys(others.split(), torch.zeros(1))
    same(from_public(name, public, tiny(name)[1]), from_official(name, official))
    unknown = from_public(name, {**public, "surprise.weight": torch.zeros(1)}, tiny(name)[1])
    assert "surprise.weight" in unknown


@each_expert
def test_public_round_trip_is_exact(name):
    ours = from_official(name, official_state(name))
    same(from_public(name, to_public(name, ours), tiny(name)[1]), ours)


def test_public_names_are_those_of_the_authors():
    ours = {name: from_official(name, official_state(name)) for name in ("sam", "biomedclip", "pix2struct", "codetr")}
    assert "image_encoder.blocks.0.attn.qkv.weight" in to_public("sam", ours["sam"])
    assert "visual.trunk.blocks.0.attn.qkv.weight" in to_public("biomedclip", ours["biomedclip"])
    assert "encoder.encoder.layer.0.attention.query.weight" in to_public("pix2struct", ours["pix2struct"])
    assert "backbone.blocks.0.attn.q_proj.weight" in to_public("codetr", ours["codetr"])


def test_clip_positions_are_resized_without_the_cls_token():
    expert, sizes = tiny("clip")
    key = "vision_model.embeddings.position_embedding.weight"
    state = official_state("clip")
    state[key] = torch.randn(1 + 3 * 3, 16)
    found = from_public("clip", state, sizes)
    assert torch.equal(found[key][0], state[key][0])
    for channel in range(16):
        grid = interpolate(state[key][1:, channel].view(1, 1, 3, 3), size=(5, 5), mode="bicubic", align_corners=False)
        torch.testing.assert_close(found[key][1:, channel], grid.flatten())
    VisionEncoder.from_state(found, expert, sizes)
    assert from_public("clip", {key: torch.zeros(577, 2)})[key].shape == (2305, 2), "336 px to the released 672 px"


def test_rope_tables_need_no_buffer():
    """from_pretrained builds on the meta device, where a buffer that no file holds would lose its values."""
    expert, sizes = tiny("codetr")
    encoder = VisionEncoder.from_state(from_official("codetr", official_state("codetr")), expert, sizes)
    assert not list(encoder.buffers())
    built = VisionEncoder(expert, sizes)
    built.backbone.load_state_dict(encoder.backbone.state_dict())
    image = pixels(expert, 1)
    assert torch.equal(built(image), encoder(image)) and encoder(image).isfinite().all()


@each_expert
def test_wrong_weights_are_named(name):
    expert, sizes = tiny(name)
    state = from_official(name, official_state(name))
    weights = [key for key in state if key.endswith(".weight")]
    lost, bent = weights[1], weights[-1]
    leaf = lost.removesuffix(".weight").rpartition(".")[2]
    wrong = {key: value for key, value in state.items() if key != lost}
    with pytest.raises(ValueError, match=f"must be exactly those of {name} at its sizes, got 1 missing .*{leaf}"):
        VisionEncoder.from_state(wrong, expert, sizes)
    with pytest.raises(ValueError, match=r"got 1 unexpected \(.*surprise.weight\)"):
        VisionEncoder.from_state({**state, "surprise.weight": torch.zeros(1)}, expert, sizes)
    with pytest.raises(ValueError, match="got 1 of another shape"):
        VisionEncoder.from_state({**state, bent: torch.zeros(1, 2, 3)}, expert, sizes)


def test_many_wrong_weights_are_counted():
    expert, sizes = tiny("sam")
    with pytest.raises(ValueError, match=r"got 37 missing \(([^,]+, ){5}\.\.\.\)"):
        VisionEncoder.from_state({}, expert, sizes)


CALLS = {
    "unknown expert": (lambda: from_official("eva", {}), "name must be one of clip, dinov2, vary, codetr, "),
    "unknown expert, out": (lambda: to_official("eva", {}), "name must be one of clip, "),
    "unknown expert, public": (lambda: from_public("eva", {}), "name must be one of clip, "),
    "fused weight": (
        lambda: from_official("biomedclip", {"trunk.blocks.0.attn.qkv.bias": torch.zeros(4)}),
        "state must hold a multiple of 3 rows in trunk.blocks.0.attn.qkv.bias, got (4,)",
    ),
    "part of a fused weight": (
        lambda: to_official("biomedclip", {"encoder.layer.7.attention.attention.key.bias": torch.zeros(4)}),
        "state must hold every part of a fused weight, got ['trunk.blocks.7.attn.qkv.bias']",
    ),
    "two names": (
        lambda: from_official("sam", dict.fromkeys(("pos_embed", "vision_encoder.pos_embed"), torch.zeros(1))),
        "state must not hold two names for one weight, got 'vision_encoder.pos_embed'",
    ),
    "no positions": (lambda: to_official("codetr", {}), "state must hold pos_embed, got []"),
}


@pytest.mark.parametrize("name", CALLS)
def test_bad_call(name):
    call, message = CALLS[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
