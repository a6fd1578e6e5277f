"""The MoV-Adapter of MoVA (arXiv 2404.13046) as ordinary modules under the official parameter names."""

# No "from __future__ import annotations" here: the hub mixin reads the annotation of __init__'s config at run time.
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from ._checks import check
from ._files import read_config, read_weights
from ._inputs import aligned, checked
from ._sharding import gathered, has_gradient_buckets, joins_idle
from ._tail import Bottleneck
from .block import AdapterBlock
from .config import MoVAdapterConfig
from .modules import Attention, Downsample, OutputMLP, RopeTable


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
        with gathered(self.parameters()):
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
        inputs = checked(self.config, self.pos_embed, base, experts, routing, text, grids)
        join_idle = joins_idle(self, self.pos_embed, self.idle_expert_gradients)
        text = inputs.text
        if join_idle and text is None:
            text = base.new_zeros(base.shape[0], self.config.text_channels)
        blocks = cast(list[AdapterBlock], list(self.blocks))
        called = self._module_to_call(blocks, join_idle)
        resolution = self.config.resolution
        features, pairs = aligned(inputs, (resolution, resolution), base.device, normalise=called is None)
        cos, sin = self.rope.tables(base)

        x = base + self.pos_embed
        for block in blocks:
            x = block(x, text, features, pairs, cos, sin, called, join_idle)
        return self.mlp(self.downsample((x + base) / 2))

    def _module_to_call(self, blocks: Sequence[AdapterBlock], join_idle: bool) -> str | None:
        """The name of a part because of which the experts' modules must be called one by one; None: there is none."""
        for i, block in enumerate(blocks):
            if not hasattr(block, "modules_to_call"):  # a wrapper, such as FSDP's
                return f"blocks.{i}"
            for name in block.modules_to_call(self.pos_embed):
                return name
        return "the adapter (by DeepSpeed)" if join_idle and has_gradient_buckets(self) else None

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
            dtypes = sorted({str(tensor.dtype) for name, tensor in state.items() if ".rope." not in name})
            check(len(dtypes) == 1, "dtype", f"must be given for the weights in {source}, which have several", dtypes)
            dtype = next(tensor.dtype for name, tensor in state.items() if ".rope." not in name)
        adapter.to(map_location, dtype).load_state_dict(state, strict=strict)
        return adapter.eval()
