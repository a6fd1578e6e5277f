"""An official checkpoint becomes a model of this library."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedConfig

from mova_kernels.ops import rope2d_table

from .._checks import check, check_weights
from ..checkpoint import read_state
from ..configuration_mova import MoVAConfig
from ..encoders import VisionEncoder
from ..experts import VisionExpert
from ..processing_mova import MoVAProcessor
from .expert_files import convert_expert
from .expert_keys import from_official
from .official_code import official_system_prompt, official_template
from .official_config import (
    bert_config,
    chat_template,
    generation_config,
    mova_config,
    official_fields,
    question_tokenizer,
)
from .official_layout import (
    EMBEDDINGS,
    HEAD,
    KEPT,
    PREFIXES,
    TABLES,
    TOWERS,
    check_new,
    copy_small_files,
    expected_tensors,
    split_parts,
)


def from_official_checkpoint(
    source: Path,
    target: Path,
    *,
    code: Path | None = None,
    text_encoder: str | None = None,
    skip: Collection[str] = (),
    own: Mapping[str, Path] | None = None,
    towers: Sequence[VisionExpert] = TOWERS,
    encoder_sizes: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Convert the official checkpoint in ``source`` into a model with a processor.

    Values and dtypes of all tensors stay. Weights are mapped into memory and written shard by shard; only tensors that
    a larger vocabulary changes are held in memory. config.json is written last, after everything else has succeeded.

    Args:
        source: directory with config.json, weights (safetensors or PyTorch's, in shards or not) and a tokenizer.
        target: the directory to write, which must not hold a model.
        code: the user's copy of the official code, whose routing prompt and system prompt go into the model.
        text_encoder: directory or hub name of the BERT whose tokenizer the model uses; None: what the config says.
        skip: experts that are left out. The model does not use them until :func:`add_experts` adds them.
        own: name to the expert's own checkpoint, which replaces the tower in ``source``.
        towers: base encoder and experts; the config in ``source`` takes precedence.
        encoder_sizes: sizes that differ from the released ones (``MoVAConfig.encoder_sizes``).

    Raises:
        OSError: a file does not exist, or the tokenizer of the text encoder cannot be loaded.
        ValueError: keys are missing, unexpected or of another shape (the message names them), the rotary tables do not
            follow from the config, a name is not that of an expert, or ``target`` holds a model.
    """
    own = own or {}
    names = [tower.name for tower in towers]
    for argument, given in (("skip", skip), ("expert", own)):
        unknown = sorted(set(given) - set(names[1:]))
        check(not unknown, argument, f"must be of the experts ({', '.join(names[1:])})", unknown)
    check_new(target)

    fields = official_fields(source)
    # With an empty config, since transformers does not know mova_llama.
    tokenizer = AutoTokenizer.from_pretrained(source, config=PreTrainedConfig())
    parts = split_parts(read_state(source))
    absent = [name for name in names if not parts[name] and name not in {*skip, *own}]
    rule = "must hold all towers; give an expert's own checkpoint by expert (name=path), or skip it"
    check(not absent, "source", rule, f"none of {', '.join(absent)}")
    words = question_tokenizer(text_encoder or fields.get("mm_projector_text_encoder"))
    bert = bert_config(parts["text_encoder"])
    config = mova_config(fields, parts, tokenizer, bert, towers, encoder_sizes or {})
    processor = MoVAProcessor.for_config(
        config,
        tokenizer,
        words,
        system_prompt=None if code is None else official_system_prompt(code),
        routing_template=None if code is None else official_template(code),
        chat_template=chat_template(tokenizer),
    )
    fits = len(words) == bert.vocab_size
    check(fits, "text_encoder", f"must have the {bert.vocab_size} words of the checkpoint's", len(words))

    _widen(parts["language_model"], fields["vocab_size"], config.text_config.vocab_size)
    _check_parts(config, parts)
    base, sizes = config.base_expert, config.encoder_sizes
    backbone = from_official(base.name, parts[base.name])
    VisionEncoder.from_state(backbone, base, sizes.get(base.name))  # for its checks

    for expert in config.pool:
        directory = target / "experts" / expert.name
        if expert.name in own:
            convert_expert(expert, own[expert.name], directory, sizes.get(expert.name))
        elif expert.name not in skip:
            state = from_official(expert.name, parts[expert.name])
            VisionEncoder.from_state(state, expert, sizes.get(expert.name)).save(directory)
    weights = {
        f"{part}.{key}": value
        for part in ("language_model", "text_encoder", "adapter")
        for key, value in parts[part].items()
        if TABLES not in key
    }
    target.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(weights | {f"base.backbone.{key}": value for key, value in backbone.items()}, target)
    processor.save_pretrained(target)
    generation_config(config, tokenizer).save_pretrained(target)
    copy_small_files(source, target / KEPT)
    if skipped := {*skip} - {*own}:
        config.experts_in_use = [name for name in names[1:] if name not in skipped]
    config.save_pretrained(target)


def _check_parts(config: MoVAConfig, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Check names and shapes of all parts but the vision towers, and the values of the rotary tables."""
    for part, expected in expected_tensors(config).items():
        prefix, state = PREFIXES[part], parts[part]
        check_weights(
            f"the {part.replace('_', ' ')} at its config's sizes",
            missing=[prefix + key for key in expected.keys() - state.keys() if TABLES not in key],
            unexpected=[prefix + key for key in state.keys() - expected.keys()],
            wrong=[
                f"{prefix}{key} {tuple(state[key].shape)} instead of {tuple(expected[key].shape)}"
                for key in expected.keys() & state.keys()
                if expected[key].shape != state[key].shape
            ],
        )
    adapter = config.adapter_config
    tables = dict(zip(("cos", "sin"), rope2d_table(adapter.resolution, adapter.head_channels), strict=True))
    for key, value in parts["adapter"].items():
        if TABLES in key:
            same = torch.allclose(value.float(), tables[key[-3:]], rtol=0, atol=2**-8)  # bf16 rounds by 2**-9
            check(same, "source", "must hold the rotary tables of its config", PREFIXES["adapter"] + key)


def _widen(language_model: dict[str, Tensor], official_rows: int, rows: int) -> None:
    """Add rows of zeros for the image's token, which is never looked up and never an answer."""
    for key in (EMBEDDINGS, HEAD):
        value = language_model.get(key)
        if value is not None:
            rule = f"must have as many rows in {key} as vocab_size in its config, {official_rows}"
            check(len(value) == official_rows, "source", rule, len(value))
            if rows > official_rows:
                language_model[key] = torch.cat([value, value.new_zeros(rows - official_rows, *value.shape[1:])])
