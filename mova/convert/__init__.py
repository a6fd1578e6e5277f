"""Conversion between this library's layout and other checkpoints: the official MoVA's, and those of single experts."""

from .expert_files import add_experts, convert_expert, to_public_checkpoint
from .from_official import from_official_checkpoint
from .official_code import official_system_prompt, official_template
from .to_official import to_official_checkpoint

__all__ = [
    "add_experts",
    "convert_expert",
    "from_official_checkpoint",
    "official_system_prompt",
    "official_template",
    "to_official_checkpoint",
    "to_public_checkpoint",
]
