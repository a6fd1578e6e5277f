"""The image encoder of Co-DETR: a ViT-L with windows and a rotary embedding. No library has it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from mova_kernels.ops import rope2d

from .._checks import check


class CoDetrConfig(PreTrainedConfig):
    """Sizes of :class:`CoDetrModel`.

    ``image_size`` fixes the grid of the stored positions, ``global_attn_indexes`` the blocks without windows, and
    ``rope_size`` the side of the pretraining grid, to which the rotary positions of every grid are scaled.
    """

    model_type = "mova_codetr"

    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    image_size: int = 1280
    patch_size: int = 16
    window_size: int = 16
    global_attn_indexes: list[int] | tuple[int, ...] = (5, 11, 17, 23)
    rope_size: int = 16
    output_channels: int = 256
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02


def rope_table(
    side: int, rope_size: int, head_channels: int, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """Make cosine and sine tables (side * side, head_channels) in fp32, in the form that rope2d takes.

    They are like those of ``rope2d_table``, but a token's row and column are scaled from ``side`` to ``rope_size``.
    """
    position = torch.arange(side, dtype=torch.float32, device=device) / side * rope_size
    half = head_channels // 2
    frequency = 1.0 / 10000.0 ** (torch.arange(0, half, 2, dtype=torch.float32, device=device) / half)
    angle = (position[:, None] * frequency).repeat_interleave(2, dim=1)
    rows, columns = angle.repeat_interleave(side, dim=0), angle.repeat(side, 1)
    angles = torch.cat([rows, columns], dim=1)
    return angles.cos(), angles.sin()


class Attention(nn.Module):
    """Self-attention with a rotary embedding; queries and values have a bias."""

    def __init__(self, config: CoDetrConfig) -> None:
        super().__init__()
        channels = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.q_proj = nn.Linear(channels, channels, bias=False)
        self.k_proj = nn.Linear(channels, channels, bias=False)
        self.v_proj = nn.Linear(channels, channels, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(channels))
        self.v_bias = nn.Parameter(torch.zeros(channels))
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Let each token of x (N, L, C) attend to all L tokens of its row; the tables are (L, C / heads)."""
        q, k, v = self.q_proj(x) + self.q_bias, self.k_proj(x), self.v_proj(x) + self.v_bias
        q, k, v = (t.unflatten(2, (self.num_heads, -1)) for t in (q, k, v))
        q, k = rope2d(q, cos, sin), rope2d(k, cos, sin)
        attended = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.proj(attended.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """A gated MLP with a norm on its hidden channels."""

    def __init__(self, config: CoDetrConfig) -> None:
        super().__init__()
        channels = config.hidden_size
        hidden = int(channels * 8 / 3)
        self.w1 = nn.Linear(channels, hidden)
        self.w2 = nn.Linear(channels, hidden)
        self.ffn_ln = nn.LayerNorm(hidden, eps=config.layer_norm_eps)
        self.w3 = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(self.ffn_ln(F.silu(self.w1(x)) * self.w2(x)))


class Block(nn.Module):
    def __init__(self, config: CoDetrConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Let each run of l tokens of x (B, L, C) attend to itself; the tables are (l, C / heads)."""
        windows = self.norm1(x).unflatten(1, (-1, cos.shape[0])).flatten(0, 1)
        x = x + self.attn(windows, cos, sin).reshape(x.shape)
        return x + self.mlp(self.norm2(x))


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, h, w)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class PatchEmbed(nn.Module):
    def __init__(self, config: CoDetrConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size)

    def forward(self, pixels: Tensor) -> Tensor:
        """Embed the patches of (B, 3, S, S) as (B, S / patch_size, S / patch_size, C)."""
        return self.proj(pixels).movedim(1, -1)


class CoDetrModel(PreTrainedModel):
    """Source: Co-DETR (arXiv 2211.12860) in MoVA's form, with EVA-02's blocks and ViTDet's windows."""

    config_class = CoDetrConfig
    main_input_name = "pixel_values"
    _supports_sdpa = True

    def __init__(self, config: CoDetrConfig) -> None:
        super().__init__(config)
        channels = config.hidden_size
        num_positions = (config.image_size // config.patch_size) ** 2 + 1  # the first, of a CLS token, is unused
        self.pos_embed = nn.Parameter(torch.zeros(1, num_positions, channels))
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.out_norm = nn.LayerNorm(channels)
        self.neck = nn.Sequential(
            nn.Conv2d(channels, config.output_channels, kernel_size=1, bias=False),
            ChannelNorm(config.output_channels, eps=1e-6),
            nn.GELU(),
            nn.Conv2d(config.output_channels, config.output_channels, kernel_size=3, padding=1, bias=False),
            ChannelNorm(config.output_channels, eps=1e-6),
        )
        self.post_init()

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Encode (B, 3, S, S) into (B, output_channels, S / patch_size, S / patch_size), in the dtype of the weights.

        The rotary tables are computed in each call. As buffers they would be rounded when the model is cast to bf16,
        and they would have no values after from_pretrained, which starts on the meta device.

        Raises:
            ValueError: the image is not square, or its patches do not fill whole windows.
        """
        window = self.config.window_size
        x = self.patch_embed(pixel_values)
        side = x.shape[1]
        rule = f"must be square, with sides that are multiples of {window * self.config.patch_size}"
        check(x.shape[1] == x.shape[2] and side % window == 0, "pixel_values", rule, tuple(pixel_values.shape))
        x = _window_order(x + self._positions(side), window)

        head_channels = self.config.hidden_size // self.config.num_attention_heads
        local = rope_table(window, self.config.rope_size, head_channels, x.device)
        # Attention to all tokens does not depend on their order: they stay in window order, and so does their table.
        whole = [
            _window_order(table.view(1, side, side, -1), window)[0]
            for table in rope_table(side, self.config.rope_size, head_channels, x.device)
        ]
        for i, block in enumerate(self.blocks):
            x = block(x, *(whole if i in self.config.global_attn_indexes else local))
        return self.neck(_raster_order(self.out_norm(x), side, window).movedim(-1, 1))

    def _positions(self, side: int) -> Tensor:
        positions = self.pos_embed[:, 1:]
        stored = round(positions.shape[1] ** 0.5)
        positions = positions.unflatten(1, (stored, stored))
        if stored == side:
            return positions
        resized = F.interpolate(positions.movedim(-1, 1).float(), size=(side, side), mode="bicubic")
        return resized.movedim(1, -1).to(positions.dtype)


def _window_order(x: Tensor, window: int) -> Tensor:
    """Reorder (B, h, w, C) into (B, h * w, C), window by window."""
    x = x.unflatten(2, (-1, window)).unflatten(1, (-1, window))
    return x.transpose(2, 3).flatten(1, 4)


def _raster_order(x: Tensor, side: int, window: int) -> Tensor:
    """Reorder (B, side * side, C), which is window by window, into (B, side, side, C)."""
    n = side // window
    return x.unflatten(1, (n, n, window, window)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
