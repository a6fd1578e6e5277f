"""Names of the vision experts' weights in other checkpoints: the official MoVA's, and each expert's own.

A state dict of an expert has three forms:

- ours, which :meth:`VisionEncoder.save` writes and :meth:`VisionEncoder.from_state` takes. For a backbone of
  transformers it is the layout of the checkpoints on the Hugging Face Hub, which every version of transformers
  converts to its own;
- official, below ``model.vision_tower.vision_tower_<i>.`` in a MoVA checkpoint;
- public, the file that the expert's authors published.

``DROPPED`` and ``AROUND`` list the weights that are left out on purpose. Any other unknown name is kept as it is, so
that loading reports it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import check
from ..encoders.builders import BUILDERS, config_of
from ..encoders.codetr import rope_table


class _Rename(NamedTuple):
    """Official names that begin with ``official`` begin with ``ours`` here; # is a number.

    If ``ours`` has several names, the official tensor is the concatenation of their tensors.
    """

    official: str
    ours: tuple[str, ...]


def _renames(prefix: str, table: Mapping[str, str | tuple[str, ...]]) -> tuple[_Rename, ...]:
    return tuple(
        _Rename(official, tuple(prefix + name for name in ((ours,) if isinstance(ours, str) else ours)))
        for official, ours in table.items()
    )


# The first match counts in both directions, so the general rule of a block comes last.
_SAM = {
    "pos_embed": "pos_embed",
    "patch_embed.proj.": "patch_embed.projection.",
    "blocks.#.norm1.": "layers.#.layer_norm1.",
    "blocks.#.norm2.": "layers.#.layer_norm2.",
    "blocks.#.": "layers.#.",
    "neck.0.": "neck.conv1.",
    "neck.1.": "neck.layer_norm1.",
    "neck.2.": "neck.conv2.",
    "neck.3.": "neck.layer_norm2.",
}
_ATTENTION = "encoder.layer.#.attention.attention."
_VIT: dict[str, str | tuple[str, ...]] = {
    "trunk.cls_token": "embeddings.cls_token",
    "trunk.pos_embed": "embeddings.position_embeddings",
    "trunk.patch_embed.proj.": "embeddings.patch_embeddings.projection.",
    "trunk.blocks.#.norm1.": "encoder.layer.#.layernorm_before.",
    "trunk.blocks.#.norm2.": "encoder.layer.#.layernorm_after.",
    "trunk.blocks.#.attn.qkv.": (_ATTENTION + "query.", _ATTENTION + "key.", _ATTENTION + "value."),
    "trunk.blocks.#.attn.proj.": "encoder.layer.#.attention.output.dense.",
    "trunk.blocks.#.mlp.fc1.": "encoder.layer.#.intermediate.dense.",
    "trunk.blocks.#.mlp.fc2.": "encoder.layer.#.output.dense.",
    "trunk.norm.": "layernorm.",
}
_RENAMES: dict[str, tuple[_Rename, ...]] = {
    "vary": _renames("sam.vision_encoder.", _SAM),
    "sam": _renames("vision_encoder.", _SAM),
    "biomedclip": _renames("", _VIT),
}  # the others have the same names in both forms

# Patterns of names that no backbone of ours has: CLIP's text half and old index buffer, Vary's second convolution,
# which MoVA does not use, Co-DETR's tables, which follow from the sizes, and BiomedCLIP's projection behind the tower,
# which MoVA skips. to_official cannot restore that projection.
DROPPED: dict[str, tuple[str, ...]] = {
    "clip": (
        r"text_model\.",
        r"(text|visual)_projection\.",
        "logit_scale$",
        r"vision_model\.embeddings\.position_ids$",
    ),
    "vary": (r"net_3\.",),
    "codetr": (r"(rope_win|rope_glb|blocks\.\d+\.attn\.rope)\.freqs_(cos|sin)$",),
    "biomedclip": (r"head\.",),
}
# For authors' files that hold a larger model: the possible prefixes of the encoder, and patterns of all other weights.
_ROOTS = ("model.", "transformer.", "")
AROUND: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "vary": (
        tuple(f"{root}{tower}." for tower in ("vision_tower_high", "vision_tower") for root in _ROOTS),
        (
            r"(model\.|transformer\.)?(vision_tower|mm_projector|mm_projector_vary|embed_tokens|layers|norm|decoder)\.",
            r"transformer\.(wte|h|ln_f|visual)\.",
            r"lm_head\.",
        ),
    ),
    "codetr": (("backbone.",), (r"(neck|rpn_head|query_head|roi_head|bbox_head|mask_head)\.",)),
    "pix2struct": (("encoder.",), (r"decoder\.",)),
    "deplot": (("encoder.",), (r"decoder\.",)),
    "biomedclip": (("visual.",), (r"text\.", "logit_scale$")),
    "sam": (("image_encoder.",), (r"(prompt_encoder|mask_decoder)\.", r"pixel_(mean|std)$")),
}
_CLIP_POSITIONS = "vision_model.embeddings.position_embedding.weight"
# A weight of the encoder by which the prefix of a file is recognised.
_ANCHOR = {"pix2struct": "layernorm.weight", "deplot": "layernorm.weight", "biomedclip": "trunk.pos_embed"}


def from_official(name: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turn expert ``name``'s official weights into our form, without those in ``DROPPED``; tensors are not copied.

    Raises:
        ValueError: ``name`` is neither an official expert nor ``clip``, a fused weight cannot be divided, or two names
            become one.
    """
    check(name in BUILDERS, "name", f"must be one of {', '.join(BUILDERS)}", name)
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        if _matches(key, DROPPED.get(name, ())):
            continue
        ours = _our_names(name, key)
        if len(ours) == 1:
            _put(found, ours[0], value)
            continue
        rule = f"must hold a multiple of {len(ours)} rows in {key}"
        check(value.dim() > 0 and value.shape[0] % len(ours) == 0, "state", rule, tuple(value.shape))
        for part, tensor in zip(ours, value.chunk(len(ours)), strict=True):
            _put(found, part, tensor)
    return found


def to_official(name: str, state: Mapping[str, Tensor], sizes: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
    """Turn our weights into the official form; the inverse of :func:`from_official`.

    Co-DETR's tables are computed from ``sizes``, the builder's keywords, in the dtype of its positions.

    Raises:
        ValueError: ``name`` is neither an official expert nor ``clip``, a part of a fused weight or Co-DETR's positions
            are missing, or two names become one.
    """
    check(name in BUILDERS, "name", f"must be one of {', '.join(BUILDERS)}", name)
    fused: dict[str, dict[int, Tensor]] = {}
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        official, part, count = _official_name(name, key)
        if count == 1:
            _put(found, official, value)
            continue
        parts = fused.setdefault(official, {})
        parts[part] = value
        if len(parts) == count:
            _put(found, official, torch.cat([parts[i] for i in range(count)]))
    incomplete = sorted(fused.keys() - found.keys())
    check(not incomplete, "state", "must hold every part of a fused weight", incomplete)
    if name == "codetr":
        check("pos_embed" in found, "state", "must hold pos_embed", sorted(found)[:1])
        found.update(_rope_tables(found["pos_embed"].dtype, **(sizes or {})))
    return found


def from_public(name: str, state: Mapping[str, Tensor], sizes: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
    """Turn the weights that expert ``name``'s authors published into our form, without ``AROUND`` and ``DROPPED``.

    CLIP's positions, except that of the CLS token, are resized to the grid of ``sizes``, the builder's keywords:
    bicubically, as in MoVA. MoVA's Co-DETR has its own neck and last norm, which a detector's file may lack.

    Raises:
        ValueError: as :func:`from_official`.
    """
    check(name in BUILDERS, "name", f"must be one of {', '.join(BUILDERS)}", name)
    prefixes, around = AROUND.get(name, ((), ()))
    anchor = _ANCHOR.get(name, "pos_embed")
    prefix = next((p for p in prefixes if p + anchor in state), "")
    inner: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.startswith(prefix) or not _matches(key, around):
            _put(inner, key.removeprefix(prefix), value)
    found = from_official(name, inner)
    if name == "clip" and _CLIP_POSITIONS in found:
        config = config_of("clip", **(sizes or {}))
        found[_CLIP_POSITIONS] = _resized(found[_CLIP_POSITIONS], config.image_size // config.patch_size)
    return found


def to_public(name: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename our weights to the names in the file that expert ``name``'s authors published; the encoder alone.

    Weights that :func:`from_public` leaves out are missing, and CLIP's positions keep their grid.

    Raises:
        ValueError: as :func:`to_official`.
    """
    official = to_official(name, state) if name != "codetr" else state  # its tables are not needed
    prefix = AROUND.get(name, (("",),))[0][0]
    return {prefix + key: value for key, value in official.items()}


def _matches(key: str, patterns: Iterable[str]) -> bool:
    return any(re.match(pattern, key) for pattern in patterns)


def _put(found: dict[str, Tensor], key: str, value: Tensor) -> None:
    check(key not in found, "state", "must not hold two names for one weight", key)
    found[key] = value


def _our_names(name: str, key: str) -> tuple[str, ...]:
    for official, ours in _RENAMES.get(name, ()):
        moved = [_moved(key, official, beginning) for beginning in ours]
        if moved[0] is not None:
            return tuple(map(str, moved))
    return (key,)


def _official_name(name: str, key: str) -> tuple[str, int, int]:
    """Return the official name, the part of it that ``key`` is, and the number of parts."""
    for official, ours in _RENAMES.get(name, ()):
        for part, beginning in enumerate(ours):
            if moved := _moved(key, beginning, official):
                return moved, part, len(ours)
    return key, 0, 1


def _moved(key: str, old: str, new: str) -> str | None:
    """Replace the beginning ``old`` of ``key`` by ``new``; None if the key begins otherwise."""
    match = re.match(r"(\d+)".join(map(re.escape, old.split("#"))), key)
    return match and new.replace("#", match[match.lastindex or 0]) + key[match.end() :]


def _resized(positions: Tensor, side: int) -> Tensor:
    """Resize positions (1 + n * n, C), that of the CLS token first, to (1 + side * side, C)."""
    stored = math.isqrt(positions.shape[0] - 1)
    if stored in (0, side) or stored**2 + 1 != positions.shape[0]:
        return positions
    grid = positions[1:].float().T.unflatten(1, (stored, stored))[None]
    grid = F.interpolate(grid, size=(side, side), mode="bicubic")
    return torch.cat([positions[:1], grid[0].flatten(1).T.to(positions.dtype)])


def _rope_tables(dtype: torch.dtype, **sizes: Any) -> dict[str, Tensor]:
    """Make Co-DETR's rotary tables under the official names: two of the model, and a copy of one in each block."""
    config = config_of("codetr", **sizes)
    sides = {"rope_win": config.window_size, "rope_glb": config.image_size // config.patch_size}
    tables = {
        owner: [
            table.to(dtype)
            for table in rope_table(side, config.rope_size, config.hidden_size // config.num_attention_heads)
        ]
        for owner, side in sides.items()
    }
    owners = {owner: owner for owner in tables}
    for i in range(config.num_hidden_layers):
        owners[f"blocks.{i}.attn.rope"] = "rope_glb" if i in config.global_attn_indexes else "rope_win"
    return {
        f"{name}.freqs_{function}": table.clone()
        for name, owner in owners.items()
        for function, table in zip(("cos", "sin"), tables[owner], strict=True)
    }
