"""The MoV-Adapter of MoVA (arXiv 2404.13046) as ordinary modules under the official parameter names."""

# No "from __future__ import annotations" here: the hub mixin reads the annotation of __init__'s config at run time.
import contextlib
import functools
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, distributed, nn

from . import backends, ops
from ._checks import check, check_floats, check_like, check_tensor
from ._files import read_config, read_weights
from ._gradients import layer_norm
from ._readable import describe, is_readable, normalised, refuse_meta, unreadable
from ._tail import EPS, Bottleneck, affine
from .config import MoVAdapterConfig
from .modules import Attention, Downsample, OutputMLP, RopeTable, SwiGLU
from .ragged import RaggedPairs, host_sees_values, validated_routing


class MoVAdapter(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="mova_kernels",
    tags=["mova", "mov-adapter", "vision-encoders"],
    license="apache-2.0",
):
    """Fuses the features of the experts which each image selected into its base tokens.

    An ordinary module. Parameters have the official names (``blocks.0.cross_attn.3.q_proj.weight``), so that
    ``load_state_dict`` takes the adapter's part of an official checkpoint; the text encoder is not part of the module.
    In its initial state every branch ends in a layer of zeros: the result is the output MLP of the pooled base tokens,
    whatever the experts say. Save and load with ``save_pretrained``, ``from_pretrained`` and ``push_to_hub``.

    Args:
        config: the dimensions.

    Attributes:
        idle_expert_gradients: whether the parameters of experts which no sample of a batch selected get gradients of
            zero instead of None. DistributedDataParallel without ``find_unused_parameters`` and FSDP need that where
            processes use different experts. True: always; False: never; None, the default: where torch.distributed has
            more than one process, or DeepSpeed's ZeRO has the parameters. There, modules that are called one by one
            (wrapped by FSDP, for example) are also called for idle experts, with no rows, since all processes must call
            them in the same order.
    """

    def __init__(self, config: MoVAdapterConfig) -> None:
        super().__init__()
        check(isinstance(config, MoVAdapterConfig), "config", "must be a MoVAdapterConfig", config, TypeError)
        self.config = config
        self.idle_expert_gradients: bool | None = None
        width = config.in_channels
        self.pos_embed = nn.Parameter(torch.empty(1, config.num_tokens, width))
        self.rope = RopeTable(config.resolution, config.head_channels)
        self.blocks = nn.ModuleList(AdapterBlock(config) for _ in range(config.num_layers))
        self.downsample = Downsample(width, config.resolution)
        self.mlp = OutputMLP(
            nn.Linear(width, config.out_channels), nn.GELU(), nn.Linear(config.out_channels, config.out_channels)
        )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The official initial state: PyTorch's defaults, and zeros at the end of every branch.

        Call it again if something has re-initialised the adapter as a part of a larger model. transformers'
        ``post_init`` does not: the parts are marked as initialised.
        """
        with _whole(self.parameters()):
            self._reset_whole_parameters()

    def _reset_whole_parameters(self) -> None:
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.LayerNorm, nn.Conv2d)):
                module.reset_parameters()
            module._is_hf_initialized = True  # type: ignore[assignment]
        ends: list[nn.Module] = []
        for module in self.modules():
            if isinstance(module, Attention):
                ends.append(module.proj)
            elif isinstance(module, AdapterBlock):
                ends += [module.mlp.w3, module.gate[2]]
            elif isinstance(module, Bottleneck):
                ends.append(module.conv3.bn)
        for parameter in (self.pos_embed, *(p for end in ends for p in end.parameters())):
            parameter.zero_()

    def forward(
        self,
        base: Tensor,
        experts: Sequence[Tensor | None],
        routing: Tensor | None = None,
        text: Tensor | None = None,
        *,
        grids: Sequence[tuple[int, int] | None] | None = None,
    ) -> Tensor:
        """Fuse.

        Only the experts that a sample selected are computed for it, and nothing is read from the others: NaN there
        changes nothing. Each block keeps the ``topk`` best of a sample's selected experts. A sample that selected none
        passes through the blocks without fusion.

        Device synchronisation: none for a routing on the host (or None); one per forward for a routing on the device;
        one more per block if a sample selected more than ``topk`` experts on a device. Under torch.compile,
        torch.export, CUDA graph capture and :func:`device_routing`: none. One graph then serves every routing of the
        same batch size, memory is reserved as if all samples had selected every expert whose dense features are given,
        and the checks of values run on the device. Warm up inside :func:`device_routing` before a capture.

        Args:
            base: (B, R*R, in_channels) row-major tokens of the base encoder, in the parameters' dtype (any float
                dtype under autocast) and on their device. Any strides, like all inputs.
            experts: one entry per expert: (B, T_e, C_e) with the tokens of every sample; or (B_e, T_e, C_e) with those
                of the B_e samples which selected this expert, in sample order; or None if no sample did.
            routing: (B, num_experts), bool or 0/1 of any dtype, on the host or the device. None: all experts.
            text: (B, text_channels), or (1, text_channels) for all samples: the feature of the question, which
                conditions the gates. May be None if no sample selected an expert.
            grids: per expert (h, w) with h * w = T_e, or None for a square. Default: all square.

        Returns:
            (B, (R // 2)**2, out_channels), in the dtype of the parameters (under autocast: the autocast dtype).

        Raises:
            TypeError, ValueError: before anything is computed; the message names the argument, the rule and the value.
            ValueError: ``idle_expert_gradients`` is False where FSDP shards the adapter over several processes, or
                DeepSpeed's ZeRO does.
        """
        self._check_base(base)
        selected = self._selected(base, experts, routing)
        sizes = self._check_experts(base, experts, selected, grids)
        text = self._check_text(base, text, selected)
        join_idle = self._joins_idle()
        if join_idle and text is None:
            text = base.new_zeros(base.shape[0], self.config.text_channels)
        blocks = cast(list[AdapterBlock], list(self.blocks))
        unusual = self._unusual(blocks, join_idle)
        features, packed = self._align(experts, selected, sizes, normalise=unusual is None)
        pairs = RaggedPairs.from_routing(selected, packed, base.device)
        cos, sin = self.rope.tables(base)

        x = base + self.pos_embed
        for block in blocks:
            x = block(x, text, features, pairs, cos, sin, unusual, join_idle)
        return self.mlp(self.downsample((x + base) / 2))

    def _unusual(self, blocks: Sequence["AdapterBlock"], join_idle: bool) -> str | None:
        """The part because of which the experts' modules must be called one by one; None: there is none."""
        for i, block in enumerate(blocks):
            if not hasattr(block, "unusual_modules"):  # somebody's wrapper
                return f"blocks.{i}"
            for name in block.unusual_modules(self.pos_embed):
                return name
        return "the adapter (by DeepSpeed)" if join_idle and self._has_buckets() else None

    def official_state_dict(self) -> dict[str, Tensor]:
        """The state under the official names, with the rotary tables that official checkpoints repeat per attention."""
        state = dict(self.state_dict())
        cos, sin = self.rope.tables(self.pos_embed)
        for name, module in self.named_modules():
            if isinstance(module, Attention):
                state[f"{name}.rope.freqs_cos"] = cos.clone()
                state[f"{name}.rope.freqs_sin"] = sin.clone()
        return state

    @classmethod
    def from_pretrained(  # type: ignore[override]  # the mixin's takes any keyword
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        dtype: torch.dtype | None = None,
        config: MoVAdapterConfig | None = None,
        strict: bool = True,
        map_location: str | torch.device = "cpu",
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> "MoVAdapter":
        """Load what :meth:`save_pretrained` or :meth:`push_to_hub` wrote; the adapter is in eval mode.

        Args:
            pretrained_model_name_or_path: a folder, or the name of a repository on the hub, with config.json and with
                model.safetensors or, where there is none, pytorch_model.bin, of which no code is run.
            dtype: what the parameters are converted to. Default: they keep the dtype that they have in the file.
            config: the dimensions; default: those of config.json.
            strict: if False, weights may be missing or unknown.
            map_location: the device.
            revision, token, cache_dir, local_files_only, force_download: those of ``huggingface_hub``.

        Raises:
            TypeError: an unknown argument, or ``dtype`` is no floating point dtype.
            FileNotFoundError: config or weights are missing.
            ValueError: a file is damaged or not that of an adapter; or its weights have several dtypes, and ``dtype``
                does not say which to take.
            RuntimeError: weights are missing, unknown or of another shape.
        """
        is_float = isinstance(dtype, torch.dtype) and dtype.is_floating_point
        check(dtype is None or is_float, "dtype", "must be a floating point torch.dtype", dtype, TypeError)
        hub = {"revision": revision, "token": token, "cache_dir": cache_dir}
        hub |= {"local_files_only": local_files_only, "force_download": force_download}
        source = pretrained_model_name_or_path
        adapter = cls(read_config(source, hub) if config is None else config)
        state = read_weights(source, map_location, hub)
        if dtype is None:
            found = sorted({str(tensor.dtype) for name, tensor in state.items() if ".rope." not in name})
            check(len(found) == 1, "dtype", f"must be given for the weights in {source}, which have several", found)
            dtype = next(tensor.dtype for name, tensor in state.items() if ".rope." not in name)
        adapter.to(map_location, dtype).load_state_dict(state, strict=strict)
        return adapter.eval()

    def _joins_idle(self) -> bool:
        """Whether experts that no sample selected take part, for the sake of other processes."""
        wanted = self.idle_expert_gradients
        check(wanted in (None, True, False), "idle_expert_gradients", "must be None, True or False", wanted)
        several = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
        # DeepSpeed needs all gradients with one process, too: ZeRO-2 fails without, ZeRO-3 steps with an older one.
        deepspeed = hasattr(self.pos_embed, "ds_id") or self._has_buckets()
        if wanted is False and (several or deepspeed):  # FSDP marks every module whose parameters it shards
            sharded = any(getattr(module, "_is_fsdp_managed_module", False) for module in self.modules())
            rule = "must be None or True where FSDP or DeepSpeed's ZeRO shards the adapter"
            check(not (sharded or deepspeed), "idle_expert_gradients", rule, wanted)
        return several or deepspeed if wanted is None else bool(wanted)

    def _has_buckets(self) -> bool:
        """Whether DeepSpeed's ZeRO-1 or ZeRO-2 has the parameters.

        ZeRO-2 adds up the processes' gradients in the order in which they arrive. The ops compute those of all experts
        in an order that depends on the routing; the modules, called one by one, do not.
        """
        return "deepspeed" in sys.modules and any(hasattr(p, "param_idx_in_group") for p in self.parameters())

    def _check_base(self, base: Tensor) -> None:
        config = self.config
        check_floats("base", base, ("B", config.num_tokens, config.in_channels))
        check_like("base", base, "the adapter", self.pos_embed)

    def _selected(self, base: Tensor, experts: Sequence[Tensor | None], routing: Tensor | None) -> Tensor:
        """The routing as a (B, N) mask, on the host where the host may see it."""
        num_experts, num_samples = self.config.num_experts, base.shape[0]
        check(isinstance(experts, Sequence), "experts", "must be a sequence", type(experts).__name__, TypeError)
        check(len(experts) == num_experts, "experts", f"must have {num_experts} entries", len(experts))
        if routing is None:
            device = "cpu" if host_sees_values(base.device) else base.device
            return torch.ones(num_samples, num_experts, dtype=torch.bool, device=device)
        check_tensor("routing", routing, (num_samples, num_experts))
        if routing.device.type != "cpu":
            check(routing.device == base.device, "routing", f"must be on the host or {base.device}", routing.device)
            check(not routing.is_meta, "routing", "must hold data", "a tensor on the meta device")
        return validated_routing(routing, base.device)

    def _check_experts(
        self,
        base: Tensor,
        experts: Sequence[Tensor | None],
        selected: Tensor,
        grids: Sequence[tuple[int, int] | None] | None,
    ) -> list[tuple[int, int] | None]:
        """The token grid of each expert."""
        num_samples, num_experts = selected.shape
        if grids is not None:
            check(len(grids) == num_experts, "grids", f"must have {num_experts} entries", len(grids))
        on_host = host_sees_values(base.device)
        counts = selected.sum(0).tolist() if on_host else None
        sizes: list[tuple[int, int] | None] = []
        for e, feature in enumerate(experts):
            name = f"experts[{e}]"
            if feature is None:
                if counts is not None:
                    check(counts[e] == 0, name, f"must be given: {counts[e]} samples selected it", None)
                else:
                    torch._assert_async(~selected[:, e].any(), f"{name} must be given: a sample selected it")
                sizes.append(None)
                continue
            check_tensor(name, feature, ("B or B_e", "T_e", self.config.expert_channels[e]))
            check_like(name, feature, "base", base)
            rows, tokens = feature.shape[:2]
            if rows != num_samples:
                rule = "rows, or one for each sample that selected it"
                if counts is not None:
                    check(rows == counts[e], name, f"must have {num_samples} {rule} ({counts[e]})", rows)
                else:  # no sizes in the message: they would become constants of the graph
                    torch._assert_async(selected[:, e].sum() == rows, f"{name} must have B {rule}")
            grid = None if grids is None else grids[e]
            if grid is None:
                side = round(tokens**0.5)
                check(side * side == tokens, name, "must have a square number of tokens, or a grid in grids", tokens)
                grid = (side, side)
            check(grid[0] * grid[1] == tokens, f"grids[{e}]", f"must hold {name}'s {tokens} tokens", grid)
            sizes.append((grid[0], grid[1]))
        return sizes

    def _check_text(self, base: Tensor, text: Tensor | None, selected: Tensor) -> Tensor | None:
        """The text feature, (B, text_channels); None if there is none."""
        num_samples = base.shape[0]
        if text is None:
            if host_sees_values(base.device):
                check(not selected.any(), "text", "must be given when a sample selected an expert", None)
            else:
                torch._assert_async(~selected.any(), "text must be given when a sample selected an expert")
            return None
        check_tensor("text", text, ("B", self.config.text_channels))
        if text.shape[0] != 1 and text.shape[0] != num_samples:
            raise ValueError(f"text must have 1 or {num_samples} rows, got {text.shape[0]}")
        check_like("text", text, "base", base)
        return text.expand(num_samples, -1)

    def _align(
        self,
        experts: Sequence[Tensor | None],
        selected: Tensor,
        sizes: Sequence[tuple[int, int] | None],
        normalise: bool,
    ) -> tuple[list[Any], list[bool]]:
        """Each expert's tokens on the base grid, (B or B_e, R*R, C_e), and whether these are only the selected rows.

        Or CentredFeatures, which get there behind the projection to keys and values.

        Where the host does not know the routing, what the unselected rows of an expert hold means nothing.
        """
        target = (self.config.resolution, self.config.resolution)
        num_samples = selected.shape[0]
        given: list[Tensor] = []
        rows: list[Tensor | None] = []
        packed = []
        for e, feature in enumerate(experts):
            row, is_packed = None, False
            if feature is None:
                feature = self.pos_embed.new_empty(0, self.config.num_tokens, self.config.expert_channels[e])
            if feature.shape[0] != num_samples:
                is_packed = True
            elif host_sees_values(feature.device):
                row = selected[:, e].nonzero().squeeze(1).to(feature.device, non_blocking=True)
                is_packed = True
            else:
                row = torch.where(selected[:, e], torch.arange(num_samples, device=feature.device), -1)
            given.append(feature)
            rows.append(row)
            packed.append(is_packed)
        grids = [target if size is None else size for size in sizes]
        if normalise:  # once, for all blocks: their LayerNorms differ in the affine part alone
            dtype = functools.reduce(torch.promote_types, [f.dtype for f in given])  # autocast lets them differ
            return _normalised([f.to(dtype) for f in given], grids, target, rows), packed
        return [ops.feature_resample(f, s, target, r) for f, s, r in zip(given, grids, rows, strict=True)], packed


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
        unusual: str | None = None,
        join_idle: bool = False,
    ) -> Tensor:
        """(B, L, C) tokens, (B, text_channels), the experts' features on the base grid -> (B, L, C).

        The features are normalised (feature_norm) for the ops; they are as they came for the modules, which are called
        one by one if ``unusual`` names one that the ops must not bypass. With ``join_idle``, experts and gate take part
        even if no sample needs them: all their parameters get a gradient, and all experts' modules are called.
        """
        if text is not None and (pairs.num_pairs > 0 or join_idle):
            weights, kept = self._gate(x, text, pairs.selected)
            pairs = pairs.topk(kept, self.topk)
            gate = weights[pairs.sample, pairs.expert]
            if unusual is None:
                gate = self._joined(gate, pairs) if join_idle else gate
                x = self._fuse(x, features, pairs, gate, cos, sin)
            else:
                x = self._fuse_by_module(x, features, pairs, gate, cos, sin, unusual, join_idle)
        normed = normalised(self.norm3, x)
        x = x + self.self_attn(normed, normed, cos, sin)
        return x + self.mlp(normalised(self.norm4, x))

    def unusual_modules(self, like: Tensor | None = None) -> list[str]:
        """The experts' modules whose weights an op must not read behind their back.

        With ``like``, a parameter of another dtype (outside autocast) or device is unusual, too.
        """
        if all(is_readable(getattr(self, name), built, like) for name, built in self._built.items()):
            return []
        parts = (part for name, built in self._built.items() for part in unreadable(self, name, built, like))
        return list(dict.fromkeys(parts))

    def _joined(self, gate: Tensor, pairs: RaggedPairs) -> Tensor:
        """``gate``, through which the parameters of experts without pairs get gradients of zero."""
        if pairs.bounds is None or not torch.is_grad_enabled():  # without bounds, the ops give zeros themselves
            return gate
        idle = [e for e in range(pairs.num_experts) if pairs.bounds[e] == pairs.bounds[e + 1]]
        return _ZeroGradients.apply(gate, *self.expert_parameters(idle))

    def expert_parameters(self, experts: Sequence[int]) -> list[nn.Parameter]:
        """The parameters which only these experts use."""
        modules = [m[e] for e in experts for m in (self.cross_attn, self.norm1, self.norm2)]
        return [p for module in modules for p in module.parameters()]

    def _gate(self, x: Tensor, text: Tensor, selected: Tensor) -> tuple[Tensor, Tensor]:
        # Samples without experts get zeros: 0 * NaN of a text nobody vouches for would reach the gate's gradients.
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
        count = pairs.expert_offsets[-1:] if pairs.bounds is None else None
        attended = ops.expert_attention(q, k, v, cos, sin, cross[0].num_heads, count=count)
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
        unusual: str,
        join_idle: bool,
    ) -> Tensor:
        """The same, calling the modules: for hooks, LoRA, parametrisations, DTensor and quantised layers."""
        if pairs.bounds is None:
            raise RuntimeError(
                f"{unusual} is hooked, wrapped or replaced, so the experts' modules must be called one by one, which "
                "needs the routing on the host: not inside torch.compile, torch.export, a CUDA graph or device_routing"
            )
        fused = x
        for e, attention in enumerate(self.cross_attn):
            pair = slice(pairs.bounds[e], pairs.bounds[e + 1])
            if pair.start < pair.stop or join_idle:
                sample, row = pairs.sample[pair], pairs.row[pair]
                queries, context = normalised(self.norm1[e], x[sample]), normalised(self.norm2[e], features[e][row])
                out = attention(queries, context, cos, sin)
                fused = fused.index_add(0, sample, (gate[pair, None, None].to(out.dtype) * out).to(x.dtype))
        return fused


class _ZeroGradients(torch.autograd.Function):
    """The identity on x which gives every parameter a gradient of zeros."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, *parameters):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx, grad):
        return grad, *(torch.zeros_like(p) for p in ctx.saved_tensors)

    @staticmethod
    def jvp(ctx, tangent, *_):
        return tangent.clone()


def _whole(parameters: Iterable[nn.Parameter]) -> Any:
    """A context in which DeepSpeed's ZeRO-3 lends the parameters that it has partitioned; rank 0's values count."""
    partitioned = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not partitioned:
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0)


def split_concatenated(x: Tensor, config: MoVAdapterConfig) -> tuple[Tensor, list[Tensor]]:
    """Take the official concatenation of base and expert tokens apart, without copying.

    Args:
        x: (B, R*R, in_channels + sum of expert_channels).
        config: the dimensions.

    Returns:
        base (B, R*R, in_channels) and per expert (B, R*R, C_e): views of ``x``.

    Raises:
        TypeError, ValueError: ``x`` is no tensor of that shape.
    """
    check_tensor("x", x, ("B", config.num_tokens, config.in_channels + sum(config.expert_channels)))
    base, *experts = x.split([config.in_channels, *config.expert_channels], dim=-1)
    return base, experts


def _normalised(
    features: Sequence[Tensor],
    sizes: Sequence[tuple[int, int]],
    target: tuple[int, int],
    rows: Sequence[Tensor | None],
) -> list[Any]:
    """Per expert (M_e, R*R, C_e), or CentredFeatures where it is faster to resample behind the projections."""
    found: list[Any] = [None] * len(features)
    rest = []
    for e, (x, size, r) in enumerate(zip(features, sizes, rows, strict=True)):
        may_wait = host_sees_values(x.device) and ops.resamples_later(x, size, target)
        if may_wait and backends.choose("ragged_linear", None, x.device, x.dtype) == "cpu":
            found[e] = ops.centred_features(x, size, target, r, EPS)
        else:
            rest.append(e)
    if rest:
        arguments = [features[e] for e in rest], [sizes[e] for e in rest], target, [rows[e] for e in rest]
        for e, normed in zip(rest, ops.feature_norm(*arguments, EPS), strict=True):
            found[e] = normed
    return found
