"""The parts of the adapter's blocks and its tail, under the official names."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from . import ops
from ._linear import linear
from ._plain import functorch_active
from ._readable import describe, is_plain_linear, is_readable, normalised, reads, refuse_meta
from ._tail import EPS, RegStage


@reads("num_heads")
class Attention(nn.Module):
    """Attention to a context, with rotary positions and a LayerNorm before the output projection."""

    def __init__(self, width: int, context: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(context, width, bias=False)
        self.v_proj = nn.Linear(context, width, bias=False)
        self.inner_attn_ln = nn.LayerNorm(width, EPS)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(P, L, C), (P, L, C_e), tables of rope2d -> (P, L, C)."""
        q, k, v = _linear(self.q_proj, x), _linear(self.k_proj, context), _linear(self.v_proj, context)
        attended = ops.expert_attention(q, k, v, cos, sin, self.num_heads)
        return _linear(self.proj, normalised(self.inner_attn_ln, attended))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for table in ("freqs_cos", "freqs_sin"):  # official checkpoints carry them; ours come from the config
            state_dict.pop(f"{prefix}rope.{table}", None)
        super()._load_from_state_dict(state_dict, prefix, *args)


class SwiGLU(nn.Module):
    """w3 LayerNorm(SiLU(w1 x) * w2 x), with int(8/3 C) hidden channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = int(width * 8 / 3)
        self.w1 = nn.Linear(width, hidden)
        self.w2 = nn.Linear(width, hidden)
        self.ffn_ln = nn.LayerNorm(hidden, EPS)
        self.w3 = nn.Linear(hidden, width)
        self._built = {name: describe(child) for name, child in self.named_children()}

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C)."""
        if x.is_cuda and self.w1.out_features % 64 and all(self._may_read(name, x) for name in self._built):
            return self._aligned(x)
        gate, up = _linear(self.w1, x), _linear(self.w2, x)
        if gate.shape == up.shape and gate.dtype == up.dtype and self._may_read("ffn_ln", x):
            normed = ops.swiglu_norm(gate, up, self.ffn_ln.weight, self.ffn_ln.bias, self.ffn_ln.eps)
        else:
            normed = normalised(self.ffn_ln, F.silu(gate) * up)
        return _linear(self.w3, normed)

    def _may_read(self, name: str, x: Tensor) -> bool:
        return is_readable(getattr(self, name), self._built[name], x)

    def _aligned(self, x: Tensor) -> Tensor:
        """The same with hidden rows padded to a multiple of 64 channels.

        A GPU loads 16 bytes at a time only where rows begin at multiples of that, which the official 2730 channels do
        not. Padding the weights costs one copy of them per call. By prediction; not measured.
        """
        hidden = self.w1.out_features
        padding = -hidden % 64
        zeros = self.w1.weight.new_zeros(padding, self.w1.in_features)
        weight = torch.cat([self.w1.weight, zeros, self.w2.weight, zeros])
        bias = torch.cat([self.w1.bias, zeros[:, 0], self.w2.bias, zeros[:, 0]])
        gate, up = F.linear(x, weight, bias).chunk(2, dim=-1)
        scale, shift = (F.pad(t, (0, padding)) for t in (self.ffn_ln.weight, self.ffn_ln.bias))
        normed = ops.swiglu_norm(gate, up, scale, shift, self.ffn_ln.eps, channels=hidden)
        return F.linear(normed, F.pad(self.w3.weight, (0, padding)), self.w3.bias)


class OutputMLP(nn.Sequential):
    """Linear, GELU, Linear."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, (R // 2)**2, C) -> (B, (R // 2)**2, out_channels)."""
        for module in self:
            x = _linear(module, x) if isinstance(module, nn.Linear) else module(x)
        return x


class Downsample(nn.Sequential):
    """Bottleneck stage, average pooling to half the side, bottleneck stage: (B, R*R, C) -> (B, (R // 2)**2, C)."""

    def __init__(self, width: int, resolution: int) -> None:
        super().__init__(RegStage(width), nn.AdaptiveAvgPool2d(resolution // 2), RegStage(width))
        self.resolution = resolution
        self._built = {name: describe(child) for name, child in self.named_children()}

    def forward(self, x: Tensor) -> Tensor:
        """(B, R*R, C) -> (B, (R // 2)**2, C)."""
        if self._may_read(x):
            first, _, second = cast(list[RegStage], list(self))
            return ops.token_downsample(x, self.resolution, (first.b1.weights(), second.b1.weights()), EPS)
        refuse_meta(self, x)
        grid = super().forward(x.unflatten(1, (self.resolution, self.resolution)).permute(0, 3, 1, 2))
        return grid.permute(0, 2, 3, 1).flatten(1, 2)

    def _may_read(self, x: Tensor) -> bool:
        stages = dict(self.named_children())
        return (
            list(stages) == list(self._built)
            and x.shape[1] == self.resolution**2
            and all(is_readable(stages[name], built, x) for name, built in self._built.items())
            and bool(self[1].output_size == self.resolution // 2)
        )


class RopeTable(nn.Module):
    """The rotary tables (R*R, D): one pair for all attentions, never saved, fp32 whatever the module is cast to.

    They are not buffers, because a tool that loads, moves, casts or offloads the buffers of a model could lose or round
    them, and no checkpoint would bring them back. :meth:`tables` returns them.
    """

    def __init__(self, resolution: int, head_channels: int) -> None:
        super().__init__()
        self.size = (resolution, head_channels)
        self.cos, self.sin = self._compute(None)

    def tables(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine on the device of ``like``: those that are kept, or new ones if they are somewhere else."""
        cos, sin = self.cos, self.sin
        if cos.device == sin.device == like.device and isinstance(cos, FakeTensor) == isinstance(like, FakeTensor):
            return cos, sin
        if torch.compiler.is_compiling():
            return ops.rope2d_table(*self.size, device=like.device)
        cos, sin = self._compute(like.device)
        captured = like.is_cuda and torch.cuda.is_current_stream_capturing()  # written when the graph is replayed
        if not (captured or isinstance(cos, FakeTensor) or functorch_active() or torch.jit.is_tracing()):
            self.cos, self.sin = cos, sin
        return cos, sin

    def _compute(self, device: torch.device | None) -> tuple[Tensor, Tensor]:
        with torch.inference_mode(False):  # they may be saved for a backward later
            return ops.rope2d_table(*self.size, device=device)

    def _apply(self, fn: Any, recurse: bool = True) -> RopeTable:
        super()._apply(fn, recurse)
        source = "cpu" if self.cos.is_meta else self.cos.device  # nothing can be copied from the meta device
        device = fn(torch.empty(0, device=source)).device
        if device != self.cos.device:
            self.cos, self.sin = self._compute(device)
        return self


def _linear(module: nn.Module, x: Tensor) -> Tensor:
    """The module's result, by a faster product where the module may be bypassed."""
    if torch.compiler.is_compiling():
        return module(x)
    if not is_plain_linear(module, x):
        refuse_meta(module, x)
        return module(x)
    return linear(x, cast(Tensor, module.weight), cast("Tensor | None", module.bias))
