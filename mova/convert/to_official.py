"""A model of this library becomes the official checkpoint again that it was made from."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from huggingface_hub import save_torch_state_dict
from torch import Tensor

from mova_kernels.ops import rope2d_table

from .._checks import check
from ..checkpoint import read_state
from ..configuration_mova import MoVAConfig
from ..encoders import VisionEncoder
from ..routing_lora import ROUTING_LORA
from .expert_keys import to_official
from .official_layout import EMBEDDINGS, HEAD, KEPT, PREFIXES, TABLES, check_new, copy_small_files, expected_tensors


def to_official_checkpoint(source: Path, target: Path) -> None:
    """Write a model that :func:`from_official_checkpoint` made under the official names, also after further training.

    The small files of the original checkpoint, config.json and the tokenizer without this library's token for images,
    are copied. Rotary tables get the dtype of the adapter's positions.

    Args:
        source: the model's directory, with its experts or with ``expert_path`` in its config.
        target: the directory to write, which must not hold a model.

    Raises:
        FileNotFoundError: the model was not made from an official checkpoint, or lacks an expert.
        ValueError: it has a routing LoRA, for which official checkpoints have no place, or ``target`` holds a model.
    """
    kept = source / KEPT
    if not (kept / "config.json").is_file():
        raise FileNotFoundError(
            f"no {KEPT}/config.json in {source}: mova convert writes it, copy it when you save again"
        )
    has_lora = (source / ROUTING_LORA).is_dir()
    check(not has_lora, "source", "must have no routing LoRA: official checkpoints have no place for it", str(source))
    check_new(target)
    rows = json.loads((kept / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    config = MoVAConfig.from_pretrained(source)
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in read_state(source).items():
        part, _, rest = key.partition(".")
        parts.setdefault(part, {})[rest] = value[:rows].clone() if rest in (EMBEDDINGS, HEAD) else value
    adapter = config.adapter_config
    cosines, sines = (
        table.to(parts["adapter"]["pos_embed"].dtype)
        for table in rope2d_table(adapter.resolution, adapter.head_channels)
    )
    for key in expected_tensors(config)["adapter"]:
        if TABLES in key:
            parts["adapter"][key] = (cosines if key.endswith("cos") else sines).clone()
    base, sizes = config.base_expert, config.encoder_sizes
    backbone = {key.removeprefix("backbone."): value for key, value in parts.pop("base").items()}
    with tempfile.TemporaryDirectory() as directory:
        # Saved by the encoder, whose files have the same layout in all versions of transformers.
        VisionEncoder.from_state(backbone, base, sizes.get(base.name)).save(directory)
        parts[base.name] = to_official(base.name, read_state(Path(directory)))
        for expert in config.pool:
            state = read_state(Path(config.expert_path or source) / "experts" / expert.name)
            parts[expert.name] = to_official(expert.name, state, sizes.get(expert.name))
        target.mkdir(parents=True, exist_ok=True)
        state = {PREFIXES[part] + key: value for part, tensors in parts.items() for key, value in tensors.items()}
        save_torch_state_dict(state, target)
    copy_small_files(kept, target)
