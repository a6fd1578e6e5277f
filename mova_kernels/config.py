"""The dimensions of a MoV-Adapter, named once and validated once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ._checks import check

MAX_EXPERTS = 64


@dataclass(frozen=True)
class MoVAdapterConfig:
    """Dimensions of a :class:`MoVAdapter`. The defaults are those of the released MoVA models.

    Args:
        in_channels: width C of the base tokens and of every block.
        out_channels: width of the result (the language model's hidden size).
        num_heads: attention heads H; the head width C / H must be a multiple of 4 (two axes of rotary pairs).
        num_layers: number of adapter blocks.
        topk: at most this many of a sample's selected experts are fused in each block.
        resolution: side R of the square base grid, L = R * R tokens.
        text_channels: width of the text feature which conditions the gate.
        expert_channels: width C_e of each expert, in the order of the ``experts`` argument; 1 to 64 experts.

    Raises:
        TypeError: a field is not an integer (or a sequence of integers).
        ValueError: a field is out of its range; the message names the field, the rule and the value.
    """

    in_channels: int = 1024
    out_channels: int = 4096
    num_heads: int = 16
    num_layers: int = 3
    topk: int = 3
    resolution: int = 48
    text_channels: int = 1024
    expert_channels: Sequence[int] = (1536, 512, 256, 1536, 768, 768, 256)

    def __post_init__(self) -> None:
        # A list (from JSON) becomes a tuple, so that the config stays hashable.
        widths = self.expert_channels
        is_list = isinstance(widths, Iterable) and not isinstance(widths, str)
        check(is_list, "expert_channels", "must be a sequence of integers", widths, TypeError)
        object.__setattr__(self, "expert_channels", tuple(widths))
        for name in ("in_channels", "out_channels", "num_heads", "num_layers", "topk", "resolution", "text_channels"):
            _check_int(name, getattr(self, name), 2 if name == "resolution" else 1)
        check(
            1 <= len(self.expert_channels) <= MAX_EXPERTS,
            "expert_channels",
            f"must name 1 to {MAX_EXPERTS} experts",
            self.expert_channels,
        )
        for i, width in enumerate(self.expert_channels):
            _check_int(f"expert_channels[{i}]", width, 1)
        check(
            self.in_channels % (4 * self.num_heads) == 0,
            "in_channels",
            f"must be num_heads * (a multiple of 4), with num_heads {self.num_heads}",
            self.in_channels,
        )

    @property
    def num_experts(self) -> int:
        """N, the number of experts."""
        return len(self.expert_channels)

    @property
    def head_channels(self) -> int:
        """D, the width of one attention head."""
        return self.in_channels // self.num_heads

    @property
    def num_tokens(self) -> int:
        """L = R * R, the number of base tokens."""
        return self.resolution * self.resolution

    @property
    def num_output_tokens(self) -> int:
        """(R // 2)**2, the number of tokens handed to the language model."""
        return (self.resolution // 2) ** 2


def _check_int(name: str, value: object, smallest: int) -> None:
    check(isinstance(value, int) and not isinstance(value, bool), name, "must be an int", value, TypeError)
    check(value >= smallest, name, f"must be at least {smallest}", value)  # type: ignore[operator]
