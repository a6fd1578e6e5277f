"""The backbones of the official experts, at the sizes of the released model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Pix2StructVisionConfig,
    Pix2StructVisionModel,
    PreTrainedConfig,
    PreTrainedModel,
    SamVisionConfig,
    SamVisionModel,
    ViTConfig,
    ViTModel,
)

from ..experts import builder, set_builder
from .codetr import CoDetrConfig, CoDetrModel
from .vary import VaryConfig, VaryModel

_PIX2STRUCT = {"patch_embed_hidden_size": 768, "d_kv": 64, "seq_len": 4096}

# Name -> the class, the class of its config, and the fields of the config that differ from its defaults.
_RELEASED: dict[str, tuple[Callable[..., PreTrainedModel], type[PreTrainedConfig], dict[str, Any]]] = {
    "clip": (
        CLIPVisionModel,
        CLIPVisionConfig,
        {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 672,
            "patch_size": 14,
        },
    ),
    "dinov2": (
        Dinov2Model,
        Dinov2Config,
        {
            "hidden_size": 1536,
            "num_hidden_layers": 40,
            "num_attention_heads": 24,
            "image_size": 518,
            "patch_size": 14,
            "use_swiglu_ffn": True,
        },
    ),
    "vary": (VaryModel, VaryConfig, {}),
    "codetr": (CoDetrModel, CoDetrConfig, {}),
    "pix2struct": (
        Pix2StructVisionModel,
        Pix2StructVisionConfig,
        {**_PIX2STRUCT, "hidden_size": 1536, "d_ff": 3968, "num_hidden_layers": 18, "num_attention_heads": 24},
    ),
    "deplot": (
        Pix2StructVisionModel,
        Pix2StructVisionConfig,
        {**_PIX2STRUCT, "hidden_size": 768, "d_ff": 2048, "num_hidden_layers": 12, "num_attention_heads": 12},
    ),
    "biomedclip": (partial(ViTModel, add_pooling_layer=False), ViTConfig, {"layer_norm_eps": 1e-6}),
    "sam": (
        SamVisionModel,
        SamVisionConfig,
        {
            "hidden_size": 1280,
            "num_hidden_layers": 32,
            "num_attention_heads": 16,
            "global_attn_indexes": (7, 15, 23, 31),
        },
    ),
}


def is_released(name: str) -> bool:
    """Whether the expert's builder is the one in this file."""
    return name in BUILDERS and builder(name) is BUILDERS[name]


def config_of(name: str, **sizes: Any) -> PreTrainedConfig:
    """Make the config of the official expert ``name``; ``sizes`` replace the released ones."""
    _, config, released = _RELEASED[name]
    return config(**{**released, **sizes})


def _build(name: str, **sizes: Any) -> PreTrainedModel:
    return _RELEASED[name][0](config_of(name, **sizes))


BUILDERS: dict[str, Callable[..., PreTrainedModel]] = {name: partial(_build, name) for name in _RELEASED}
for _name, _builder in BUILDERS.items():
    set_builder(_name, _builder)
