"""Alternatives to this library: the official computation with better parts, and ragged computations.

``compute`` is the adapter, or its blocks alone, as a careful user of PyTorch would write it. Its variants differ in how
the experts are fused (:func:`fuse_dense`, :func:`fuse_ragged`, :func:`fuse_packed`) and in the attention
(:func:`stored_scores`, :func:`sdpa`, :func:`flash_varlen`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from mova_kernels.dense_reference import NORM_EPS, dense_adapter, dense_block, dense_tail, feature_align

from .cases import FORWARD, Case
from .suite import Inputs, Variant

Tables = tuple[Tensor, Tensor]
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # (P, H, L, D) each, rotated
SDPA_BACKENDS = [  # the best first
    SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH,
]  # fmt: skip
SDPA_NOTE = (
    "SDPA: cuDNN where it can, else flash, else memory-efficient" if torch.cuda.is_available() else "SDPA: flash"
)


def rotate(x: Tensor, tables: Tables) -> Tensor:
    """The official rotation, of adjacent pairs of (..., D)."""
    cos, sin = tables
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack((-b, a), dim=-1).flatten(-2) * sin


def stored_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The official attention."""
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1) @ v


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Torch's fused attention. cuDNN does not take fp64 and fp32."""
    with sdpa_kernel(SDPA_BACKENDS, set_priority=True):
        return F.scaled_dot_product_attention(q, k, v)


def attend(q: Tensor, k: Tensor, v: Tensor, num_heads: int, tables: Tables, attention: Attention) -> Tensor:
    """(P, L, H*D) x 3 -> (P, L, H*D): rotation and attention."""
    q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    return attention(rotate(q, tables), rotate(k, tables), v).transpose(1, 2).flatten(2)


class Block:
    """The parameters of one block by their names in it, and the steps that all fusions share."""

    def __init__(self, t: Inputs, i: int, attention: Attention) -> None:
        self.t, self.prefix, self.attention = t, f"blocks.{i}.", attention
        self.p: Mapping[str, Tensor] = t.parameters

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.p[f"{self.prefix}{name}.weight"], self.p.get(f"{self.prefix}{name}.bias"))

    def norm(self, name: str, x: Tensor) -> Tensor:
        weight, bias = (self.p[f"{self.prefix}{name}.{part}"] for part in ("weight", "bias"))
        return F.layer_norm(x, weight.shape, weight, bias, NORM_EPS)

    def keys_and_values(self, name: str, context: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(f"{name}.k_proj", context), self.linear(f"{name}.v_proj", context)

    def attend(self, name: str, x: Tensor, context: Tensor) -> Tensor:
        q, (k, v) = self.linear(f"{name}.q_proj", x), self.keys_and_values(name, context)
        out = attend(q, k, v, self.t.config.num_heads, self.t.rope, self.attention)
        return self.linear(f"{name}.proj", self.norm(f"{name}.inner_attn_ln", out))

    def weights(self, x: Tensor) -> Tensor:
        """The weights of the experts (B, N). The cases select at most top-k."""
        text = torch.cat([self.t.text, x.mean(1)], -1)
        logits = self.linear("gate.2", F.gelu(self.linear("gate.0", text)))
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return wide.masked_fill(~self.t.mask, -torch.inf).softmax(-1).nan_to_num(0).to(x.dtype)

    def rest(self, x: Tensor) -> Tensor:
        """Self-attention and feed-forward."""
        normed = self.norm("norm3", x)
        x = x + self.attend("self_attn", normed, normed)
        normed = self.norm("norm4", x)
        hidden = F.silu(self.linear("mlp.w1", normed)) * self.linear("mlp.w2", normed)
        return x + self.linear("mlp.w3", self.norm("mlp.ffn_ln", hidden))


Fuse = Callable[[Block, Tensor, list[Tensor]], Tensor]  # block, tokens, features on the base grid


def fuse_dense(block: Block, x: Tensor, features: list[Tensor]) -> Tensor:
    """Every expert for every sample, as officially."""
    outs = [
        block.attend(f"cross_attn.{e}", block.norm(f"norm1.{e}", x), block.norm(f"norm2.{e}", feature))
        for e, feature in enumerate(features)
    ]
    return x + (torch.stack(outs, 1) * block.weights(x)[:, :, None, None]).sum(1)


def fuse_ragged(block: Block, x: Tensor, features: list[Tensor]) -> Tensor:
    """Per expert a gather of its samples and an addition to their tokens."""
    weights, fused = block.weights(x), x
    for e, rows in block.t.rows.items():
        out = block.attend(f"cross_attn.{e}", block.norm(f"norm1.{e}", x[rows]), block.norm(f"norm2.{e}", features[e]))
        fused = fused.index_add(0, rows, weights[rows, e, None, None] * out)
    return fused


Project = Callable[[Block, str, list[Tensor]], Tensor]  # block, layer, each used expert's rows (P_e, L, C)


def per_expert(block: Block, layer: str, parts: list[Tensor]) -> Tensor:
    """(P, L, C) of all pairs: one product per expert."""
    experts = zip(block.t.rows, parts, strict=True)
    return torch.cat([block.linear(f"cross_attn.{e}.{layer}", part) for e, part in experts])


def grouped(block: Block, layer: str, parts: list[Tensor]) -> Tensor:
    """The same as :func:`per_expert`, in one grouped product."""
    x, counts = torch.cat(parts), torch.tensor([len(part) for part in parts], device=parts[0].device)
    names = [f"{block.prefix}cross_attn.{e}.{layer}" for e in block.t.rows]
    weights = torch.stack([block.p[f"{name}.weight"] for name in names]).transpose(1, 2)
    out = torch._grouped_mm(x.flatten(0, 1), weights, (counts.cumsum(0) * x.shape[1]).int()).unflatten(0, x.shape[:2])
    if f"{names[0]}.bias" not in block.p:
        return out
    biases = torch.stack([block.p[f"{name}.bias"] for name in names])
    return out + biases.repeat_interleave(counts, 0, output_size=len(x))[:, None]


FLEX_BLOCK = {"cpu": 64, "cuda": 128}  # tokens: a multiple of the tiles that its kernels take by themselves


def pair_mask(pairs: int, tokens: int, device: torch.device) -> BlockMask:
    """Each token attends to all tokens of its own pair, so the mask cuts no block."""
    size = FLEX_BLOCK[device.type] if tokens % FLEX_BLOCK[device.type] == 0 else tokens
    n, total = tokens // size, pairs * (tokens // size)
    blocks = torch.arange(total, device=device)
    full = (blocks[:, None] // n * n + blocks).int()[None, None] % max(total, 1)  # the first n of a row count
    count = torch.full((1, 1, total), n, dtype=torch.int32, device=device)

    def same_pair(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return i // tokens == j // tokens

    none = (torch.zeros_like(count), torch.zeros_like(full))
    return BlockMask.from_kv_blocks(*none, count, full, size, same_pair, (pairs * tokens, pairs * tokens))


def flex(q: Tensor, k: Tensor, v: Tensor, block: Block) -> Tensor:
    """FlexAttention over all pairs in one sequence; a mask keeps the pairs apart."""
    packed = (t.transpose(0, 1).flatten(1, 2)[None] for t in (q, k, v))
    out = flex_attention(*packed, block_mask=block.t.block_mask)
    return out[0].unflatten(1, (len(q), -1)).transpose(0, 1)


def fuse_packed(
    block: Block, x: Tensor, features: list[Tensor], project: Project = per_expert, attention: Any = None
) -> Tensor:
    """Ragged, with all pairs in one attention.

    Keys and values are projected expert by expert in any case: a grouped product cannot take their various widths.
    """
    rows, heads = block.t.rows, block.t.config.num_heads
    if not rows:
        return x
    context = [block.norm(f"norm2.{e}", features[e]) for e in rows]
    q = project(block, "q_proj", [block.norm(f"norm1.{e}", x[r]) for e, r in rows.items()])
    k, v = (per_expert(block, layer, context) for layer in ("k_proj", "v_proj"))
    attention = functools.partial(attention, block=block) if attention else block.attention
    parts = attend(q, k, v, heads, block.t.rope, attention).split([len(r) for r in rows.values()])
    normed = [block.norm(f"cross_attn.{e}.inner_attn_ln", part) for e, part in zip(rows, parts, strict=True)]
    sample, expert = torch.cat(list(rows.values())), torch.cat([torch.full_like(r, e) for e, r in rows.items()])
    weights = block.weights(x)[sample, expert, None, None]
    return x.index_add(0, sample, weights * project(block, "proj", normed))


def compute(t: Inputs, fuse: Fuse, attention: Attention = sdpa) -> Tensor:
    """The adapter; only its blocks if ``t.aligned`` holds the features on the base grid.

    ``t`` has: parameters, config, base, experts (dense (B, T_e, C_e)), grids, mask (B, N), rows (the samples of each
    selected expert), text, rope (rounded tables), and, or None, aligned: dense (B, L, C_e) features.
    """
    dense = fuse is fuse_dense
    features = []
    for e, feature in enumerate(t.aligned or t.experts):
        if not dense and e not in t.rows:
            features.append(feature[:0])
            continue
        feature = feature if dense else feature[t.rows[e]]
        features.append(feature if t.aligned else feature_align(feature, t.grids[e], t.config.resolution))
    x = t.base if t.aligned else t.base + t.parameters["pos_embed"]
    for i in range(t.config.num_layers):
        block = Block(t, i, attention)
        x = block.rest(fuse(block, x, features))
    return x if t.aligned else dense_tail(t.parameters, t.config, x, t.base)


def official(t: Inputs, skips: bool | None = None) -> Tensor:
    """The official computation; of one sample without gradients it skips the experts that were not selected."""
    if skips is None:
        skips = len(t.base) == 1 and not torch.is_grad_enabled()
    if not t.aligned:
        rest = {"grids": t.grids, "rope": t.rope, "skip_unselected": skips}
        return dense_adapter(t.parameters, t.config, t.base, t.experts, t.mask, t.text, **rest)
    x = t.base
    for i in range(t.config.num_layers):
        rest = (t.aligned, t.mask, t.text, t.rope, skips)
        x, _ = dense_block(t.parameters, f"blocks.{i}", t.config, x, *rest)
    return x


def one_by_one(t: Inputs) -> list[Inputs]:
    """The inputs of each sample."""
    inputs = []
    for b in range(len(t.base)):
        features = {name: [f[b : b + 1] for f in getattr(t, name) or ()] for name in ("aligned", "experts")}
        rest = {name: getattr(t, name)[b : b + 1] for name in ("base", "mask", "text")}
        inputs.append(Inputs(**{**vars(t), **features, **rest}))
    return inputs


def sample_by_sample(t: Inputs) -> Tensor:
    """The official computation in a loop over samples: with a batch of 1 it skips experts."""
    return torch.cat([official(one) for one in one_by_one(t)])


def compiled(run: Callable[[Inputs], object]) -> Callable[[Inputs], object]:
    """By torch.compile, for the shapes of the case."""
    return torch.compile(run, dynamic=False)


def graphed(run: Callable[[Inputs], object]) -> Callable[[Inputs], object]:
    """As a CUDA graph that is captured at the first call. The next call overwrites the results."""
    captured: list[Any] = []

    def replay(t: Inputs) -> object:
        if not captured:
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                for _ in range(3):
                    run(t)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = run(t)
            captured.extend((graph, out))
        captured[0].replay()
        return captured[1]

    return replay


def _forward_only(why: str) -> Callable[[Case, torch.device], str | None]:
    return lambda case, device: None if case.direction == FORWARD else why


def graph_declines(case: Case, device: torch.device) -> str | None:
    """Why :func:`graphed` cannot run a case."""
    if device.type != "cuda":
        return "CUDA graphs need a GPU"
    return _forward_only("the backward pass of a captured graph is not wired up")(case, device)


def _varlen_declines(case: Case, device: torch.device) -> str | None:
    if find_spec("flash_attn") is None:
        return "the package flash-attn is not installed"
    if device.type != "cuda" or case.dtype == "fp32":
        return f"flash-attn runs bf16 and fp16 on GPUs, not {case.dtype} on {device.type}"
    return None


def flash_varlen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The flash-attn package's attention of sequences laid end to end."""
    from flash_attn import flash_attn_varlen_func

    pairs, _, tokens, _ = q.shape
    ends = torch.arange(pairs + 1, device=q.device, dtype=torch.int32) * tokens
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))
    return flash_attn_varlen_func(q, k, v, ends, ends, tokens, tokens).unflatten(0, (pairs, tokens)).transpose(1, 2)


def _flex_declines(case: Case, device: torch.device) -> str | None:
    block = FLEX_BLOCK[device.type]
    if case.side**2 % block:
        return f"it works in blocks of {block}, of which {case.side**2} tokens are no multiple"
    if not case.picks:
        return "there is no pair"
    if device.type == "cpu" and case.direction != FORWARD:
        return "FlexAttention has no backward pass on CPUs"
    return None


ragged = functools.partial(compute, fuse=fuse_ragged)
ADAPTER = (
    Variant("official", official),
    Variant("official, sample by sample", sample_by_sample, declines=_forward_only("it skips in inference only")),
    Variant("official + SDPA", functools.partial(compute, fuse=fuse_dense), note=SDPA_NOTE),
    Variant("official + SDPA, compiled", functools.partial(compute, fuse=fuse_dense), prepare=compiled),
    Variant("ragged + SDPA", ragged, note=SDPA_NOTE),
    Variant("ragged + SDPA, compiled", ragged, prepare=compiled),
    Variant("ragged + SDPA, CUDA graph", ragged, prepare=graphed, declines=graph_declines),
    Variant(
        "ragged + FlexAttention, compiled",
        functools.partial(compute, fuse=functools.partial(fuse_packed, attention=flex)),
        prepare=compiled,
        declines=_flex_declines,
    ),
    Variant("ragged + grouped_mm", functools.partial(compute, fuse=functools.partial(fuse_packed, project=grouped))),
    Variant("ragged + flash-attn", functools.partial(compute, fuse=fuse_packed, attention=flash_varlen),
            declines=_varlen_declines, in_fp32=False),
)  # fmt: skip
