"""The MoV-Adapter of MoVA (arXiv 2404.13046, section 3.3), computed as the official code computes it.

Every expert is attended to for every sample, attention scores are materialised, all expert outputs are stacked, and
the gate's weights, zero for unselected experts, reduce the stack. Nothing here is shared with the ops of this package,
so it can judge them; and it does neither more nor less work than the official code, so it is a fair baseline for speed.

Symbols in shapes: B samples, N experts, L = R*R tokens, C channels, H heads, D = C/H head width, T_j and C_j an
expert's tokens and channels. The working dtype is that of ``base``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from .config import MoVAdapterConfig

Parameters = Mapping[str, Tensor]
RopeTables = tuple[Tensor, Tensor]

# The downsampler asks for 1e-6 in its norms, but timm replaces them by a class with this default.
NORM_EPS = 1e-5
ROPE_THETA = 10000.0
MASKED_LOGIT = -1e6


def dense_adapter(
    parameters: Parameters,
    config: MoVAdapterConfig,
    base: Tensor,
    experts: Sequence[Tensor],
    routing: Tensor,
    text: Tensor,
    *,
    grids: Sequence[tuple[int, int]] | None = None,
    rope: RopeTables | None = None,
    skip_unselected: bool = False,
    trace: dict[str, list[Tensor]] | None = None,
) -> Tensor:
    """Run the whole adapter; returns (B, (R//2)**2, out_channels) in the dtype of ``base``.

    Args:
        parameters: tensors of the working dtype by their official names, without prefix.
        config: the adapter's dimensions.
        base: (B, L, C) tokens of the base encoder, row-major.
        experts: N tensors (B, T_j, C_j), one per expert, whether selected or not.
        routing: (B, N) bool or 0/1, true where the sample selected the expert.
        text: (B, text_channels) embedding of the question.
        grids: (height, width) of each expert's tokens; None means square grids.
        rope: what :func:`rope_tables` returns, which the official modules hold as buffers; None builds it here.
        skip_unselected: leave out the experts that the only sample did not select, which the official code does at
            inference, when B is 1 and only then.
        trace: receives lists "aligned" (N times (B, L, C_j)), "gate_logits" ((B, N) per block, fp32 or fp64) and
            "block_outputs" ((B, L, C) per block).
    """
    batch, tokens, _ = base.shape
    if skip_unselected and batch != 1:
        raise ValueError(f"skip_unselected: only a batch of 1 can skip experts, got {batch}")
    if rope is None:
        rope = rope_tables(config, base.device, base.dtype)
    if grids is None:
        grids = [(math.isqrt(expert.shape[1]),) * 2 for expert in experts]

    aligned = [
        base.new_zeros(batch, tokens, expert.shape[-1])
        if skip_unselected and not routing[0, j]
        else feature_align(expert, grid, config.resolution).to(base.dtype)
        for j, (expert, grid) in enumerate(zip(experts, grids, strict=True))
    ]
    # The official vision tower hands over one concatenated tensor, whose channel slices the adapter reads.
    widths = [feature.shape[-1] for feature in aligned]
    aligned = list(torch.cat([base, *aligned], dim=-1)[..., base.shape[-1] :].split(widths, dim=-1))

    x = base + parameters["pos_embed"]
    gate_logits, block_outputs = [], []
    for i in range(config.num_layers):
        x, logits = dense_block(
            parameters, f"blocks.{i}", config, x, aligned, routing, text.to(x.dtype), rope, skip_unselected
        )
        gate_logits.append(logits)
        block_outputs.append(x)
    if trace is not None:
        trace.update(aligned=aligned, gate_logits=gate_logits, block_outputs=block_outputs)

    return dense_tail(parameters, config, x, base)


def rope_tables(config: MoVAdapterConfig, device: torch.device | str, dtype: torch.dtype) -> RopeTables:
    """Cosines and sines, each (L, D): the first D/2 columns turn by the row of a token, the others by its column.

    Built in fp32 on the CPU in the official order of operations, where ``arange(R) / R * R`` is not an integer for
    every R, and rounded to the working dtype like the official buffers.
    """
    size, axis_dim = config.resolution, config.in_channels // config.num_heads // 2
    frequencies = 1.0 / ROPE_THETA ** (torch.arange(0, axis_dim, 2, dtype=torch.float32, device="cpu") / axis_dim)
    positions = torch.arange(size, dtype=torch.float32, device="cpu") / size * size
    angles = torch.outer(positions, frequencies).repeat_interleave(2, dim=-1)
    rows = angles[:, None, :].expand(size, size, axis_dim)
    columns = angles[None, :, :].expand(size, size, axis_dim)
    table = torch.cat([rows, columns], dim=-1).reshape(size * size, 2 * axis_dim)
    return table.cos().to(device, dtype), table.sin().to(device, dtype)


def feature_align(feature: Tensor, grid: tuple[int, int], resolution: int) -> Tensor:
    """Bilinear resampling of (B, T, C) tokens from ``grid`` to (B, L, C) in at least fp32, without antialiasing."""
    if tuple(grid) == (resolution, resolution):
        return feature
    image = feature.unflatten(1, grid).permute(0, 3, 1, 2).contiguous()
    image = F.interpolate(_widen(image), (resolution, resolution), mode="bilinear", align_corners=False)
    return image.permute(0, 2, 3, 1).contiguous().flatten(1, 2).to(feature.dtype)


def dense_block(
    p: Parameters,
    name: str,
    config: MoVAdapterConfig,
    x: Tensor,
    aligned: Sequence[Tensor],
    routing: Tensor,
    text: Tensor,
    rope: RopeTables,
    skip_unselected: bool,
) -> tuple[Tensor, Tensor]:
    """One adapter block on tokens x (B, L, C); returns them with the gate's raw logits (B, N)."""
    weights, logits = _gate(p, f"{name}.gate", config.topk, x, routing, text)
    outputs = []
    for j, feature in enumerate(aligned):
        if skip_unselected and not routing[0, j]:
            outputs.append(torch.zeros_like(x))
            continue
        query = _layer_norm(p, f"{name}.norm1.{j}", x)
        context = _layer_norm(p, f"{name}.norm2.{j}", feature)
        outputs.append(_attention(p, f"{name}.cross_attn.{j}", config.num_heads, query, context, rope))
    fused = (torch.stack(outputs, dim=1) * weights[:, :, None, None]).sum(dim=1)
    x = x + fused * routing.bool().any(dim=1).to(x.dtype)[:, None, None]

    normed = _layer_norm(p, f"{name}.norm3", x)
    x = x + _attention(p, f"{name}.self_attn", config.num_heads, normed, normed, rope)
    return x + _swiglu(p, f"{name}.mlp", _layer_norm(p, f"{name}.norm4", x)), logits


def dense_tail(p: Parameters, config: MoVAdapterConfig, x: Tensor, base: Tensor) -> Tensor:
    """The last block's tokens (B, L, C) to the result; the residual is the base without its position embedding."""
    x = dense_downsample(p, (x + base) / 2, config.resolution)
    return _linear(p, "mlp.2", F.gelu(_linear(p, "mlp.0", x)))


def _gate(p: Parameters, name: str, topk: int, x: Tensor, routing: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Expert weights (B, N) in the working dtype, summing to 1 over the kept experts, and the raw logits (B, N)."""
    pooled = torch.cat([text, x.mean(dim=1)], dim=-1)
    logits = _widen(_linear(p, f"{name}.2", F.gelu(_linear(p, f"{name}.0", pooled))))
    scores = torch.softmax(logits + (1 - routing.to(logits.dtype)) * MASKED_LOGIT, dim=-1)
    kept = scores.topk(min(topk, scores.shape[-1]), dim=-1).indices
    scores = scores * torch.zeros_like(scores).scatter(-1, kept, 1.0)
    return (scores / scores.sum(dim=-1, keepdim=True)).to(x.dtype), logits


def _attention(p: Parameters, name: str, num_heads: int, query: Tensor, context: Tensor, rope: RopeTables) -> Tensor:
    """Attention of query (B, L, C) to context (B, L, C_j), with a LayerNorm before the output projection."""
    q, k, v = (
        _linear(p, f"{name}.{projection}", source).unflatten(-1, (num_heads, -1)).permute(0, 2, 1, 3)
        for projection, source in (("q_proj", query), ("k_proj", context), ("v_proj", context))
    )
    q, k = _rotate(q, rope), _rotate(k, rope)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    merged = (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)
    return _linear(p, f"{name}.proj", _layer_norm(p, f"{name}.inner_attn_ln", merged))


def _rotate(x: Tensor, rope: RopeTables) -> Tensor:
    """Turn the adjacent pairs (a, b) of x (B, H, L, D) by the angles of the tables."""
    cos, sin = rope
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack((-b, a), dim=-1).flatten(-2) * sin


def _swiglu(p: Parameters, name: str, x: Tensor) -> Tensor:
    """(B, L, C) to (B, L, C), with a LayerNorm on the gated hidden features."""
    hidden = F.silu(_linear(p, f"{name}.w1", x)) * _linear(p, f"{name}.w2", x)
    return _linear(p, f"{name}.w3", _layer_norm(p, f"{name}.ffn_ln", hidden))


def dense_downsample(p: Parameters, x: Tensor, resolution: int) -> Tensor:
    """Tokens (B, L, C) to (B, (R//2)**2, C): average pooling between two convolutional stages."""
    image = x.transpose(1, 2).unflatten(2, (resolution, resolution))
    image = _stage(p, "downsample.0.b1", image)
    image = F.adaptive_avg_pool2d(image, resolution // 2)
    return _stage(p, "downsample.2.b1", image).flatten(2).transpose(1, 2)


def _stage(p: Parameters, name: str, x: Tensor) -> Tensor:
    """The RegNet bottleneck on (B, C, h, w): 1x1, depthwise 3x3, squeeze-excite, 1x1; no activation at the end."""
    y = F.silu(_layer_norm2d(p, f"{name}.conv1.bn", _conv2d(p, f"{name}.conv1.conv", x)))
    y = _conv2d(p, f"{name}.conv2.conv", y, padding=1, groups=y.shape[1])
    y = F.silu(_layer_norm2d(p, f"{name}.conv2.bn", y))
    squeezed = F.silu(_conv2d(p, f"{name}.se.fc1", y.mean(dim=(2, 3), keepdim=True)))
    y = y * _conv2d(p, f"{name}.se.fc2", squeezed).sigmoid()
    return _layer_norm2d(p, f"{name}.conv3.bn", _conv2d(p, f"{name}.conv3.conv", y)) + x


def _linear(p: Parameters, name: str, x: Tensor) -> Tensor:
    return F.linear(x, p[f"{name}.weight"], p.get(f"{name}.bias"))


def _conv2d(p: Parameters, name: str, x: Tensor, padding: int = 0, groups: int = 1) -> Tensor:
    weight, bias = p[f"{name}.weight"], p.get(f"{name}.bias")
    return F.conv2d(x, weight, bias, padding=padding, groups=groups)


def _layer_norm(p: Parameters, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], NORM_EPS)


def _layer_norm2d(p: Parameters, name: str, x: Tensor) -> Tensor:
    """LayerNorm over the channels of (B, C, h, w)."""
    return _layer_norm(p, name, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _widen(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
