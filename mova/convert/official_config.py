"""The config, chat template and generation config of a model that is made from an official checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoConfig, BertConfig, BertTokenizer, GenerationConfig

from .._checks import check, check_weights
from ..configuration_mova import MoVAConfig
from ..experts import VisionExpert
from ..modeling_mova import MoVAForConditionalGeneration
from ..processing_mova import IMAGE_TOKEN
from .official_layout import PREFIXES, TABLES

_OF_THE_FILE = {"architectures", "auto_map", "dtype", "model_type", "torch_dtype", "transformers_version"}
# Llama 3's template, with which the official model was trained; chat_template adds the token for the beginning.
_LLAMA_3 = (
    "{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
_BOS, _END_OF_TURN = "<|begin_of_text|>", "<|eot_id|>"


def official_fields(source: Path) -> dict[str, Any]:
    """Read the fields of the official config."""
    fields = json.loads((source / "config.json").read_text(encoding="utf-8"))
    kind = fields.get("model_type")
    check(kind == "mova_llama", "source", "must be an official MoVA, model_type mova_llama", kind)
    check("vocab_size" in fields, "source", "must have vocab_size in its config", None)
    feature = fields.get("mm_vision_select_feature", "patch")
    check(feature == "patch", "source", "must have mm_vision_select_feature patch", feature)
    return fields


def mova_config(
    fields: Mapping[str, Any],
    parts: Mapping[str, Mapping[str, Tensor]],
    tokenizer: Any,
    text_encoder: BertConfig,
    towers: Sequence[VisionExpert],
    encoder_sizes: Mapping[str, Mapping[str, Any]],
) -> MoVAConfig:
    """Make the config, and add the image's token to the tokenizer, possibly beyond the official vocabulary."""
    tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    known = {*AutoConfig.for_model("llama").to_dict(), "rope_theta", "rope_scaling"} - _OF_THE_FILE
    text = {key: value for key, value in fields.items() if key in known and value is not None}
    text["vocab_size"] = max(fields["vocab_size"], image_token_id + 1)
    width = fields.get("mm_hidden_size", towers[0].channels)
    table = parts["adapter"].get(f"blocks.0.self_attn{TABLES}cos")
    head_channels = 64 if table is None else table.shape[-1]
    base, *experts = _towers(fields, towers)
    sizes = dict(encoder_sizes)
    if base.image_size != towers[0].image_size:
        sizes[base.name] = {**sizes.get(base.name, {}), "image_size": base.image_size}
    config = MoVAConfig(
        {**text, "model_type": "llama"},
        text_encoder,
        base=replace(base, channels=width),
        experts=experts,
        encoder_sizes=sizes,
        adapter_heads=width // head_channels,
        adapter_layers=fields.get("num_projector_layers", 3),
        topk=fields.get("topk_experts", fields.get("topk", 3)),  # the official builder reads one and writes the other
        num_routing_tokens=fields.get("num_routing_tokens", 144),
        image_token_id=image_token_id,
        architectures=[MoVAForConditionalGeneration.__name__],
    )
    config.dtype = next((value.dtype for value in parts["language_model"].values()), None)
    return config


def _towers(fields: Mapping[str, Any], towers: Sequence[VisionExpert]) -> list[VisionExpert]:
    """Adapt base encoder and experts to the official config."""
    base, *experts = towers
    side, layer = fields.get("image_feat_size", base.grid[0]), fields.get("mm_vision_select_layer", base.layer)
    channels = fields.get("expert_channels", [expert.channels for expert in experts])
    right = isinstance(channels, list) and len(channels) == len(experts)
    check(right, "source", f"must have {len(experts)} expert_channels in its config", channels)
    size = side * (base.image_size // base.grid[0])
    found = [replace(base, image_size=size, input_size=size, grid=(side, side), native_grid=(side, side), layer=layer)]
    for expert, width in zip(experts, channels, strict=True):
        changes: dict[str, Any] = {"channels": width}
        if expert.name in ("dinov2", "biomedclip"):  # their input is the base encoder's image
            seen = expert.input_size
            if expert.name == "dinov2":
                changes["layer"] = layer
                seen = min(seen, size)  # the official code reduces images, but never enlarges them
                cells = seen // (expert.input_size // expert.native_grid[0])
                changes |= {"grid": (cells, cells), "native_grid": (cells, cells)}
            changes |= {"image_size": size, "input_size": seen, "resize": None if seen == size else "bilinear"}
        found.append(replace(expert, **changes))
    return found


def bert_config(state: Mapping[str, Tensor]) -> BertConfig:
    """Derive the config of a BERT from its weights; heads are 64 wide in all published BERTs."""
    words, positions = "embeddings.word_embeddings.weight", "embeddings.position_embeddings.weight"
    inner = "encoder.layer.0.intermediate.dense.weight"
    absent = [PREFIXES["text_encoder"] + key for key in (words, positions, inner) if key not in state]
    check_weights("the text encoder", missing=absent)
    width = state[words].shape[-1]
    return BertConfig(
        vocab_size=len(state[words]),
        hidden_size=width,
        num_hidden_layers=len({key.split(".")[2] for key in state if key.startswith("encoder.layer.")}),
        num_attention_heads=max(1, width // 64),
        intermediate_size=len(state[inner]),
        max_position_embeddings=len(state[positions]),
    )


def question_tokenizer(name: str | None) -> BertTokenizer:
    name = name or "bert-large-uncased"
    error: Exception | None = None
    try:
        tokenizer = BertTokenizer.from_pretrained(name)
        # If no file is found, transformers may return a tokenizer without words instead of an error.
        if not set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
            return tokenizer
    except (OSError, ValueError) as reason:
        error = reason
    raise OSError(
        f"no tokenizer of the text encoder at {name!r}: give the directory or hub name of the BERT by text_encoder "
        "(bert-large-uncased's, officially)"
    ) from error


def chat_template(tokenizer: Any) -> str | None:
    """Return the chat template of the official code if the tokenizer has Llama 3's tokens; None: the tokenizer's own.

    The official template starts with the token for the beginning, and the official code keeps the one that a tokenizer
    may add by itself. So a prompt may begin with two of them.
    """
    if _END_OF_TURN not in tokenizer.get_vocab():
        return None
    adds_one = tokenizer("x")["input_ids"][0] == tokenizer.convert_tokens_to_ids(_BOS)
    return _BOS * (2 if adds_one else 1) + _LLAMA_3


def generation_config(config: MoVAConfig, tokenizer: Any) -> GenerationConfig:
    """Generate greedily to the end of the turn, and never the image's placeholder."""
    vocabulary = tokenizer.get_vocab()
    ends = [vocabulary[token] for token in dict.fromkeys((_END_OF_TURN, tokenizer.eos_token)) if token in vocabulary]
    return GenerationConfig(
        do_sample=False,
        suppress_tokens=[config.image_token_id],
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
    )
