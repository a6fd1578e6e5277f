"""mova: the model around mova_kernels; so far its vision experts as data, and routing as text."""

from . import experts
from .experts import VisionExpert
from .routing import (
    RoutingPrompt,
    official_template,
    parse_routing,
    parse_routing_official,
    routing_mask,
    routing_prompt,
    selection,
)

__all__ = [
    "RoutingPrompt",
    "VisionExpert",
    "experts",
    "official_template",
    "parse_routing",
    "parse_routing_official",
    "routing_mask",
    "routing_prompt",
    "selection",
]
