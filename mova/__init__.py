"""mova: the model around mova_kernels; so far its vision experts as data, and routing as text."""

from . import experts
from .experts import VisionExpert
from .official import official_system_prompt, official_template
from .routing import (
    Prompts,
    RoutingPrompt,
    parse_routing,
    parse_routing_official,
    prompts,
    routing_mask,
    routing_prompt,
    selection,
)

__all__ = [
    "Prompts",
    "RoutingPrompt",
    "VisionExpert",
    "experts",
    "official_system_prompt",
    "official_template",
    "parse_routing",
    "parse_routing_official",
    "prompts",
    "routing_mask",
    "routing_prompt",
    "selection",
]
