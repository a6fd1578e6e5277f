"""The layout of an official checkpoint: its parts, the prefixes of their weights, and its small files."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .._checks import check
from ..configuration_mova import MoVAConfig
from ..experts import BASE, OFFICIAL
from ..modeling_mova import MoVAForConditionalGeneration

TOWERS = (BASE, *OFFICIAL)  # in the official order
# Part -> the prefix of its weights in an official checkpoint; the first match counts.
PREFIXES = {
    "text_encoder": "model.mm_projector.text_encoder.bert.",
    "adapter": "model.mm_projector.",
    **{tower.name: f"model.vision_tower.vision_tower_{i}." for i, tower in enumerate(TOWERS)},
    "language_model": "",
}
TABLES = ".rope.freqs_"  # the adapter's rotary tables, which official checkpoints repeat per attention
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
KEPT = "official"  # the folder beside a converted model that holds the small files of its official checkpoint
_BUFFERS = re.compile(r"rotary_emb\.inv_freq$|text_encoder\.bert\.embeddings\.position_ids$")  # of old transformers


def split_parts(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Split a checkpoint's tensors by part and remove the parts' prefixes; buffers of old versions are dropped."""
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in PREFIXES}
    for key, value in state.items():
        if not _BUFFERS.search(key):
            part, prefix = next((part, prefix) for part, prefix in PREFIXES.items() if key.startswith(prefix))
            parts[part][key[len(prefix) :]] = value
    return parts


def expected_tensors(config: MoVAConfig) -> dict[str, dict[str, Tensor]]:
    """Return tensors without values under the official names, for the parts that are checked against them."""
    with torch.device("meta"):
        model = MoVAForConditionalGeneration(config)
    return {
        "language_model": model.language_model.state_dict(),
        "text_encoder": model.text_encoder.state_dict(),
        "adapter": model.adapter.official_state_dict(),
    }


def copy_small_files(source: Path, target: Path) -> None:
    """Copy config and tokenizer, of whatever kind it is."""
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        if file.suffix in (".json", ".jinja", ".model", ".txt") and not file.name.endswith(".index.json"):
            shutil.copyfile(file, target / file.name)


def check_new(target: Path) -> None:
    check(not (target / "config.json").exists(), "output", "must not hold a model yet", str(target))
