"""Official vision experts at tiny sizes, and their weights under the names of the official checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mova import VisionExpert, experts

OFFICIAL = {expert.name: expert for expert in (experts.BASE, *experts.OFFICIAL)}
_SAM = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "window_size": 3, "image_size": 64}
_SAM |= {"global_attn_indexes": (1,), "output_channels": 6}
_ENCODER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "d_kv": 8, "d_ff": 24, "seq_len": 9}
_ENCODER |= {"patch_embed_hidden_size": 48}
_PATCHES = ({"image_size": 20, "input_size": 20, "grid": (5, 5), "native_grid": (5, 5), "channels": 16}, _ENCODER)
_VIT = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 4}

# What differs from the released expert, and the builder's sizes. Grids stay square and unlike each other.
_TINY: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "clip": (
        {"image_size": 20, "input_size": 20, "grid": (5, 5), "native_grid": (5, 5), "channels": 16},
        {**_VIT, "image_size": 20, "intermediate_size": 32},
    ),
    "dinov2": (
        {"image_size": 20, "input_size": 12, "grid": (3, 3), "native_grid": (3, 3), "channels": 16},
        {**_VIT, "image_size": 12},
    ),
    "vary": (
        {"image_size": 64, "input_size": 64, "grid": (2, 2), "native_grid": (2, 2), "channels": 12},
        _SAM,
    ),
    "codetr": (
        {"image_size": 48, "input_size": 64, "grid": (3, 3), "native_grid": (4, 4), "channels": 6},
        {**_SAM, "window_size": 2},
    ),
    "pix2struct": _PATCHES,
    "deplot": _PATCHES,
    "biomedclip": (
        {"image_size": 20, "input_size": 8, "grid": (2, 2), "native_grid": (2, 2), "channels": 16},
        {**_VIT, "image_size": 8, "intermediate_size": 32},
    ),
    "sam": (
        {"image_size": 64, "input_size": 64, "grid": (4, 4), "native_grid": (4, 4), "channels": 6},
        _SAM,
    ),
}  # fmt: skip


def tiny(name: str) -> tuple[VisionExpert, dict[str, Any]]:
    """The expert and the sizes of its backbone."""
    fields, sizes = _TINY[name]
    return replace(OFFICIAL[name], **fields), sizes


def pixels(expert: VisionExpert, batch: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random input, for ``patches`` with the row and column of every patch."""
    if not expert.patches:
        return torch.randn(batch, 3, expert.image_size, expert.image_size).to(dtype)
    side = expert.grid[0]
    cells = torch.cartesian_prod(torch.arange(1, side + 1), torch.arange(1, side + 1)).expand(batch, -1, 2)
    return torch.cat([cells, torch.randn(batch, side * side, 3 * (expert.image_size // side) ** 2)], 2).to(dtype)


def official_state(name: str) -> dict[str, Tensor]:
    """Random weights of the tiny expert under the official names, in their official shapes."""
    return {key: 0.3 * torch.randn(shape) for key, shape in _shapes(name)} | _rope_tables(name)


def _shapes(name: str) -> Iterable[tuple[str, tuple[int, ...]]]:
    sizes = tiny(name)[1]
    channels, depth = sizes["hidden_size"], sizes["num_hidden_layers"]
    if name == "clip":
        yield from _clip(channels, depth, sizes["intermediate_size"])
    elif name == "dinov2":
        yield from _dinov2(channels, depth)
    elif name in ("vary", "sam"):
        yield from _sam(channels, depth, sizes)
        if name == "vary":
            yield "net_2.weight", (12, 6, 3, 3)
    elif name == "codetr":
        yield from _codetr(channels, depth)
    elif name == "biomedclip":
        yield from _biomedclip(channels, depth, sizes["intermediate_size"])
    else:
        yield from _pix2struct(channels, depth, sizes["d_ff"])


def _both(name: str, weight: tuple[int, ...]) -> Iterable[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", weight
    yield f"{name}.bias", weight[:1]


def _clip(c, depth, hidden):
    yield "vision_model.embeddings.class_embedding", (c,)
    yield "vision_model.embeddings.patch_embedding.weight", (c, 3, 4, 4)
    yield "vision_model.embeddings.position_embedding.weight", (26, c)
    yield from _both("vision_model.pre_layrnorm", (c,))
    for i in range(depth):
        layer = f"vision_model.encoder.layers.{i}"
        for projection in ("k_proj", "v_proj", "q_proj", "out_proj"):
            yield from _both(f"{layer}.self_attn.{projection}", (c, c))
        yield from _both(f"{layer}.layer_norm1", (c,))
        yield from _both(f"{layer}.mlp.fc1", (hidden, c))
        yield from _both(f"{layer}.mlp.fc2", (c, hidden))
        yield from _both(f"{layer}.layer_norm2", (c,))
    yield from _both("vision_model.post_layernorm", (c,))


def _dinov2(c, depth):
    hidden = (int(4 * c * 2 / 3) + 7) // 8 * 8
    yield "embeddings.cls_token", (1, 1, c)
    yield "embeddings.mask_token", (1, c)
    yield "embeddings.position_embeddings", (1, 10, c)
    yield from _both("embeddings.patch_embeddings.projection", (c, 3, 4, 4))
    for i in range(depth):
        layer = f"encoder.layer.{i}"
        yield from _both(f"{layer}.norm1", (c,))
        for projection in ("query", "key", "value"):
            yield from _both(f"{layer}.attention.attention.{projection}", (c, c))
        yield from _both(f"{layer}.attention.output.dense", (c, c))
        yield f"{layer}.layer_scale1.lambda1", (c,)
        yield from _both(f"{layer}.norm2", (c,))
        yield from _both(f"{layer}.mlp.weights_in", (2 * hidden, c))
        yield from _both(f"{layer}.mlp.weights_out", (c, hidden))
        yield f"{layer}.layer_scale2.lambda1", (c,)
    yield from _both("layernorm", (c,))


def _sam(c, depth, sizes):
    yield "pos_embed", (1, 4, 4, c)
    yield from _both("patch_embed.proj", (c, 3, 16, 16))
    for i in range(depth):
        block = f"blocks.{i}"
        side = 4 if i in sizes["global_attn_indexes"] else sizes["window_size"]
        yield from _both(f"{block}.norm1", (c,))
        yield f"{block}.attn.rel_pos_h", (2 * side - 1, c // 2)
        yield f"{block}.attn.rel_pos_w", (2 * side - 1, c // 2)
        yield from _both(f"{block}.attn.qkv", (3 * c, c))
        yield from _both(f"{block}.attn.proj", (c, c))
        yield from _both(f"{block}.norm2", (c,))
        yield from _both(f"{block}.mlp.lin1", (4 * c, c))
        yield from _both(f"{block}.mlp.lin2", (c, 4 * c))
    yield "neck.0.weight", (6, c, 1, 1)
    yield from _both("neck.1", (6,))
    yield "neck.2.weight", (6, 6, 3, 3)
    yield from _both("neck.3", (6,))


def _codetr(c, depth):
    hidden = int(c * 8 / 3)
    yield "pos_embed", (1, 17, c)
    yield from _both("patch_embed.proj", (c, 3, 16, 16))
    for i in range(depth):
        block = f"blocks.{i}"
        yield from _both(f"{block}.norm1", (c,))
        for name in ("q_bias", "v_bias"):
            yield f"{block}.attn.{name}", (c,)
        for name in ("q_proj", "k_proj", "v_proj", "proj"):
            yield f"{block}.attn.{name}.weight", (c, c)
        yield f"{block}.attn.proj.bias", (c,)
        yield from _both(f"{block}.norm2", (c,))
        yield from _both(f"{block}.mlp.w1", (hidden, c))
        yield from _both(f"{block}.mlp.w2", (hidden, c))
        yield from _both(f"{block}.mlp.ffn_ln", (hidden,))
        yield from _both(f"{block}.mlp.w3", (c, hidden))
    yield from _both("out_norm", (c,))
    yield "neck.0.weight", (6, c, 1, 1)
    yield from _both("neck.1", (6,))
    yield "neck.3.weight", (6, 6, 3, 3)
    yield from _both("neck.4", (6,))


def _pix2struct(c, depth, hidden):
    yield from _both("embeddings.patch_projection", (c, 48))
    yield "embeddings.row_embedder.weight", (9, c)
    yield "embeddings.column_embedder.weight", (9, c)
    for i in range(depth):
        layer = f"encoder.layer.{i}"
        for projection in ("query", "key", "value", "output"):
            yield f"{layer}.attention.{projection}.weight", (c, c)
        yield f"{layer}.mlp.wi_0.weight", (hidden, c)
        yield f"{layer}.mlp.wi_1.weight", (hidden, c)
        yield f"{layer}.mlp.wo.weight", (c, hidden)
        yield f"{layer}.pre_mlp_layer_norm.weight", (c,)
        yield f"{layer}.pre_attention_layer_norm.weight", (c,)
    yield "layernorm.weight", (c,)


def _biomedclip(c, depth, hidden):
    yield "trunk.cls_token", (1, 1, c)
    yield "trunk.pos_embed", (1, 5, c)
    yield from _both("trunk.patch_embed.proj", (c, 3, 4, 4))
    for i in range(depth):
        block = f"trunk.blocks.{i}"
        yield from _both(f"{block}.norm1", (c,))
        yield from _both(f"{block}.attn.qkv", (3 * c, c))
        yield from _both(f"{block}.attn.proj", (c, c))
        yield from _both(f"{block}.norm2", (c,))
        yield from _both(f"{block}.mlp.fc1", (hidden, c))
        yield from _both(f"{block}.mlp.fc2", (c, hidden))
    yield from _both("trunk.norm", (c,))


def _rope_tables(name: str) -> dict[str, Tensor]:
    """Co-DETR's buffers, element by element: 8 channels per head, windows of 2 x 2 and a grid of 4 x 4."""
    if name != "codetr":
        return {}
    tables = {}
    for owners, side in ((("rope_win", "blocks.0.attn.rope"), 2), (("rope_glb", "blocks.1.attn.rope"), 4)):
        frequencies = [1.0, 0.01]  # 10000 ** -(2k / 4)
        angles = torch.tensor(
            [
                [place * f for place in (row * 16 / side, column * 16 / side) for f in frequencies for _ in range(2)]
                for row in range(side)
                for column in range(side)
            ]
        )
        for owner in owners:
            tables |= {f"{owner}.freqs_cos": angles.cos(), f"{owner}.freqs_sin": angles.sin()}
    return tables
