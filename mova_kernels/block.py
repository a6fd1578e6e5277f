"""One block of the MoV-Adapter (MoVA, arXiv 2404.13046), under the official parameter names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from . import ops
from ._gradients import layer_norm, with_zero_gradients
from ._readable import describe, is_readable, normalised, refuse_meta, unreadable
from ._tail import EPS, affine
from .config import MoVAdapterConfig
from .modules import Attention, SwiGLU
from .routing import RaggedPairs


class AdapterBlock(nn.Module):
    """Gated cross-attention to the selected experts, then self-attention and a SwiGLU feed-forward."""

    def __init__(self, config: MoVAdapterConfig) -> None:
        super().__init__()
        width, heads = config.in_channels, config.num_heads
        self.topk = config.topk
        self.cross_attn = nn.ModuleList(Attention(width, context, heads) for context in config.expert_channels)
        self.norm1 = nn.ModuleList(nn.LayerNorm(width, EPS) for _ in config.expert_channels)
        self.norm2 = nn.ModuleList(nn.LayerNorm(context, EPS) for context in config.expert_channels)
        self.mlp = SwiGLU(width)
        self.self_attn = Attention(width, width, heads)
        self.norm3 = nn.LayerNorm(width, EPS)
        self.norm4 = nn.LayerNorm(width, EPS)
        self.gate = nn.Sequential(
            nn.Linear(config.text_channels + width, width), nn.GELU(), nn.Linear(width, config.num_experts)
        )
        self._built = {name: describe(getattr(self, name)) for name in ("cross_attn", "norm1", "norm2")}

    def forward(
        self,
        x: Tensor,
        text: Tensor | None,
        features: Sequence[Tensor],
        pairs: RaggedPairs,
        cos: Tensor,
        sin: Tensor,
        called: str | None = None,
        join_idle: bool = False,
    ) -> Tensor:
        """Fuse the experts' features into the tokens.

        Args:
            x: (B, L, C) tokens.
            text: (B, text_channels), or None if no sample selected an expert.
            features: per expert (B or B_e, L, C_e) on the base grid; for the ops normalised by feature_norm, for the
                modules as they came.
            pairs: the pairs, whose ``row`` is a row of the features.
            cos, sin: the tables of rope2d.
            called: a module that the ops must not bypass, because of which the experts' modules are called one by one;
                None: the ops compute with the modules' weights.
            join_idle: experts and gate take part even if no sample needs them: all their parameters get a gradient, and
                all experts' modules are called.

        Returns:
            (B, L, C).
        """
        if text is not None and (pairs.num_pairs > 0 or join_idle):
            weights, kept = self._gate(x, text, pairs.selected)
            pairs = pairs.topk(kept, self.topk)
            gate = weights[pairs.sample, pairs.expert]
            if called is None:
                gate = self._joined(gate, pairs) if join_idle else gate
                x = self._fuse(x, features, pairs, gate, cos, sin)
            else:
                x = self._fuse_by_module(x, features, pairs, gate, cos, sin, called, join_idle)
        normed = normalised(self.norm3, x)
        x = x + self.self_attn(normed, normed, cos, sin)
        return x + self.mlp(normalised(self.norm4, x))

    def modules_to_call(self, like: Tensor | None = None) -> list[str]:
        """The experts' modules that have to be called, since an op with their weights would compute something else.

        With ``like``, a parameter of another dtype (outside autocast) or device is a reason, too.
        """
        if all(is_readable(getattr(self, name), built, like) for name, built in self._built.items()):
            return []
        parts = (part for name, built in self._built.items() for part in unreadable(self, name, built, like))
        return list(dict.fromkeys(parts))

    def _joined(self, gate: Tensor, pairs: RaggedPairs) -> Tensor:
        """``gate``, through which the parameters of experts without pairs get gradients of zero."""
        if pairs.host_offsets is None or not torch.is_grad_enabled():  # without offsets, the ops return zeros
            return gate
        idle = [e for e in range(pairs.num_experts) if pairs.host_offsets[e] == pairs.host_offsets[e + 1]]
        return with_zero_gradients(gate, self.expert_parameters(idle))

    def expert_parameters(self, experts: Sequence[int]) -> list[nn.Parameter]:
        """The parameters which only these experts use."""
        modules = [m[e] for e in experts for m in (self.cross_attn, self.norm1, self.norm2)]
        return [p for module in modules for p in module.parameters()]

    def _gate(self, x: Tensor, text: Tensor, selected: Tensor) -> tuple[Tensor, Tensor]:
        # The text of a sample without experts may hold anything. Zeros replace it: 0 * NaN would reach the gradients.
        some = selected.any(1, keepdim=True)
        text = torch.where(some, text.to(x.dtype), 0)
        pooled = torch.where(some, x.mean(1), 0)
        refuse_meta(self.gate, x, "gate")
        return ops.expert_gate(self.gate(torch.cat([text, pooled], 1)), selected, self.topk)

    def _fuse(
        self, x: Tensor, features: Sequence[Tensor], pairs: RaggedPairs, gate: Tensor, cos: Tensor, sin: Tensor
    ) -> Tensor:
        cross = cast(list[Attention], list(self.cross_attn))
        queries = [a.q_proj.weight for a in cross]
        keys, values = [a.k_proj.weight for a in cross], [a.v_proj.weight for a in cross]
        (q,) = ops.ragged_linear(layer_norm(x, eps=EPS), pairs, affine(self.norm1), [queries])
        k, v = ops.ragged_linear(features, pairs, affine(self.norm2), [keys, values])
        num_valid = pairs.tables.num_valid if pairs.host_offsets is None else None
        attended = ops.expert_attention(q, k, v, cos, sin, cross[0].num_heads, num_valid=num_valid)
        inner, proj = affine(a.inner_attn_ln for a in cross), affine(a.proj for a in cross)
        return ops.gated_combine(x, attended, gate, pairs, inner, [p[0] for p in proj], [p[1] for p in proj])

    def _fuse_by_module(
        self,
        x: Tensor,
        features: Sequence[Tensor],
        pairs: RaggedPairs,
        gate: Tensor,
        cos: Tensor,
        sin: Tensor,
        called: str,
        join_idle: bool,
    ) -> Tensor:
        """The same, calling the modules: for hooks, LoRA, parametrisations, DTensor and quantised layers."""
        if pairs.host_offsets is None:
            raise RuntimeError(
                f"{called} is hooked, wrapped or replaced, so the experts' modules must be called one by one, which "
                "needs the routing on the host: not inside torch.compile, torch.export, a CUDA graph or device_routing"
            )
        fused = x
        for e, attention in enumerate(self.cross_attn):
            pair = slice(pairs.host_offsets[e], pairs.host_offsets[e + 1])
            if pair.start < pair.stop or join_idle:
                sample, row = pairs.sample[pair], pairs.row[pair]
                queries, context = normalised(self.norm1[e], x[sample]), normalised(self.norm2[e], features[e][row])
                out = attention(queries, context, cos, sin)
                fused = fused.index_add(0, sample, (gate[pair, None, None].to(out.dtype) * out).to(x.dtype))
        return fused
