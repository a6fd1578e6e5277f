"""An expert's encoder: its backbone, and the steps that turn a prepared image into the expert's tokens."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPVisionModel, PreTrainedConfig, PreTrainedModel
from transformers.integrations import deepspeed

from mova_kernels.ops import feature_resample

from .._checks import check, check_weights
from ..checkpoint import read_json, read_state
from ..experts import VisionExpert, builder
from .builders import config_of, is_released

_FILE = "model.safetensors"
_NOT_SIZES = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"}


class VisionEncoder(nn.Module):
    """A vision expert: prepared images in, tokens out. It starts in eval mode and with frozen weights.

    Args:
        expert: describes input and output.
        sizes: keywords for the expert's builder (``experts.builder``), which has the released sizes as defaults; for
            the official experts they are fields of the backbone's config in transformers, ``attn_implementation``
            included.

    The backbone can be any ``nn.Module`` that takes the expert's pixels or patches. It returns tokens (B, T, C), a map
    (B, C, h, w), or an output of transformers with one of them as ``last_hidden_state``; one whose expert has a
    ``layer`` also takes ``output_hidden_states=True`` and returns ``hidden_states``.

    Raises:
        TypeError: ``expert`` is not a VisionExpert, or the builder does not know a size.
        ValueError: no builder is registered for the expert.
    """

    def __init__(self, expert: VisionExpert, sizes: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        check(isinstance(expert, VisionExpert), "expert", "must be a VisionExpert", expert, TypeError)
        check(not (expert.patches and expert.resize), "expert", "must not resize patches", expert.resize)
        self.expert = expert
        self.sizes = dict(sizes or {})
        self.backbone = builder(expert.name)(**self.sizes)
        self.eval().requires_grad_(False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode prepared images into the expert's tokens.

        Args:
            pixels: (B, 3, S, S) with S = ``expert.image_size``, float; for ``expert.patches`` (B, T, 2 + 3 p p), each
                patch behind its row and column, p = S // grid. Cast to the backbone's dtype.

        Returns:
            (B, h * w, C) with (h, w) = ``expert.grid`` and C = ``expert.channels``. For B = 0 the backbone is not
            called.

        Raises:
            TypeError: ``pixels`` is not floating point.
            ValueError: ``pixels`` or the output of the backbone does not have the expert's shape.
        """
        expert = self.expert
        shape = self._pixels_shape()
        check(pixels.is_floating_point(), "pixels", "must be floating point", pixels.dtype, TypeError)
        rule = f"must have shape (B, {', '.join(map(str, shape))}) for {expert.name}"
        check(pixels.dim() == len(shape) + 1 and pixels.shape[1:] == shape, "pixels", rule, tuple(pixels.shape))
        dtype = next((p.dtype for p in self.backbone.parameters() if p.is_floating_point()), pixels.dtype)
        if pixels.shape[0] == 0:
            return pixels.new_empty((0, expert.num_tokens, expert.channels), dtype=dtype)
        if expert.resize is not None:
            size = (expert.input_size, expert.input_size)
            pixels = F.interpolate(pixels.float(), size=size, mode=expert.resize).to(pixels.dtype)
        tokens = self._tokens(pixels.to(dtype))
        return feature_resample(tokens, expert.native_grid, expert.grid)

    def blank(self) -> Tensor:
        """Make a prepared image of zeros, (1, 3, S, S) or (1, T, 2 + 3 p p)."""
        return torch.zeros(1, *self._pixels_shape())

    def unused_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of CLIP that come after the expert's hidden state: they never get a gradient."""
        if self.expert.layer is None or not isinstance(self.backbone, CLIPVisionModel):
            return []
        names = [name for name, _ in self.backbone.named_modules()]
        layers = [name for name in names if re.fullmatch(r"(.*\.)?encoder\.layers\.\d+", name)]
        used = range(len(layers) + 1)[self.expert.layer]
        behind = [*layers[used:], *(name for name in names if name.split(".")[-1] == "post_layernorm")]
        return [p for name in behind for p in self.backbone.get_submodule(name).parameters()]

    def _pixels_shape(self) -> tuple[int, ...]:
        size, (h, w) = self.expert.image_size, self.expert.grid
        if self.expert.patches:
            return h * w, 2 + 3 * (size // h) * (size // w)
        return 3, size, size

    def _tokens(self, pixels: Tensor) -> Tensor:
        """Run the backbone and check its output; returns (B, native h * w, C)."""
        expert, layer = self.expert, self.expert.layer
        result = self.backbone(pixels) if layer is None else self.backbone(pixels, output_hidden_states=True)
        if layer is not None:
            states = getattr(result, "hidden_states", None) or ()
            check(
                -len(states) <= layer < len(states),
                "layer",
                f"must index the backbone's {len(states)} hidden_states",
                layer,
            )
            result = states[layer]
        elif not isinstance(result, Tensor):
            result = result.last_hidden_state
        height, width = expert.native_grid
        maps = result.dim() == 4
        shape: tuple[int, ...] = (pixels.shape[0], expert.prefix_tokens + height * width, expert.channels)
        if maps:
            shape = (pixels.shape[0], expert.channels, height, width)
        check(result.shape == shape, "backbone", f"must return shape {shape} for {expert.name}", tuple(result.shape))
        return result.flatten(2).transpose(1, 2).contiguous() if maps else result[:, expert.prefix_tokens :]

    def save(
        self,
        directory: str | Path,
        *,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
    ) -> None:
        """Write the backbone's weights into ``directory``, and its config if it is a backbone of transformers.

        Args:
            directory: created if it does not exist.
            variant, max_shard_size: as in transformers; a backbone of the user's own is always written to one file.
        """
        directory = Path(directory)
        if isinstance(self.backbone, PreTrainedModel):
            options = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
            self.backbone.save_pretrained(directory, variant=variant, **options)
        else:
            directory.mkdir(parents=True, exist_ok=True)
            state = {name: tensor.contiguous() for name, tensor in self.backbone.state_dict().items()}
            file = _FILE if variant is None else f"model.{variant}.safetensors"
            save_file(state, directory / file, metadata={"format": "pt"})

    @classmethod
    def load(
        cls,
        directory: str | Path,
        expert: VisionExpert,
        sizes: Mapping[str, Any] | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        variant: str | None = None,
    ) -> VisionEncoder:
        """Load an encoder that :meth:`save` wrote.

        Args:
            directory, expert, sizes, variant: as they were saved.
            dtype: None: the dtype of the file.
            device: None: the CPU.

        Raises:
            OSError: the files do not exist.
            ValueError: weights are missing, unknown or of another shape, the file has other ``sizes``, or it is
                damaged.
        """
        state = read_state(Path(directory), variant)
        return cls._filled(expert, sizes, Path(directory), state, dtype, device)

    @classmethod
    def from_state(
        cls,
        state: Mapping[str, Tensor],
        expert: VisionExpert,
        sizes: Mapping[str, Any] | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> VisionEncoder:
        """Make an encoder with weights that :mod:`mova.convert` has renamed.

        Args:
            state: the weights.
            expert, sizes: as for the class.
            dtype: None: the dtype of the weights.
            device: None: the CPU.

        Raises:
            ValueError: weights are missing, unknown or of another shape.
        """
        return cls._filled(expert, sizes, None, state, dtype, device)

    @classmethod
    def _filled(
        cls,
        expert: VisionExpert,
        sizes: Mapping[str, Any] | None,
        directory: Path | None,
        state: Mapping[str, Tensor],
        dtype: torch.dtype | None,
        device: torch.device | str | None,
    ) -> VisionEncoder:
        with torch.device("meta"):
            encoder = cls(expert, sizes)
        if isinstance(encoder.backbone, PreTrainedModel):
            if directory is not None:
                _check_config(expert, encoder.backbone.config, directory)
            encoder.backbone = _from_pretrained(expert, encoder.backbone, state, dtype)
        else:
            encoder = cls(expert, sizes)  # again, since buffers have no values on the meta device
            own = encoder.backbone.state_dict()
            wrong = [key for key in own.keys() & state.keys() if own[key].shape != state[key].shape]
            check_weights(f"{expert.name} at its sizes", own.keys() - state.keys(), state.keys() - own.keys(), wrong)
            encoder.backbone.load_state_dict(state, assign=True)
        return encoder.to(device=device, dtype=dtype).eval().requires_grad_(False)


def _from_pretrained(
    expert: VisionExpert,
    skeleton: PreTrainedModel,
    state: Mapping[str, Tensor],
    dtype: torch.dtype | None,
) -> PreTrainedModel:
    """Load a model of ``skeleton``'s class and config by transformers, which knows the layouts of all its versions."""
    options: dict[str, Any] = {}
    if "add_pooling_layer" in inspect.signature(type(skeleton).__init__).parameters:
        options["add_pooling_layer"] = skeleton.pooler is not None
    with _without_zero3():
        model, info = type(skeleton).from_pretrained(
            None,
            config=skeleton.config,
            state_dict=dict(state),
            dtype=dtype or "auto",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )
    wrong = [f"{key} {tuple(found)} instead of {tuple(own)}" for key, found, own in info["mismatched_keys"]]
    check_weights(f"{expert.name} at its sizes", info["missing_keys"], info["unexpected_keys"], wrong)
    return model


@contextmanager
def _without_zero3() -> Iterator[None]:
    """Let transformers load as if DeepSpeed were not in use: no engine would gather the weights of an expert."""
    set_by_user = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = set_by_user


def check_config(expert: VisionExpert, sizes: Mapping[str, Any], directory: Path) -> None:
    """Raise if the config beside an expert's weights is damaged or has other sizes.

    The expert is not built. So the sizes are compared only for official experts; the config of any other expert must
    only be JSON.

    Raises:
        FileNotFoundError: an official expert has no config.
        ValueError: the config is damaged, or has other ``sizes``.
    """
    if (directory / "config.json").exists():
        read_json(directory / "config.json")
    if is_released(expert.name):
        _check_config(expert, config_of(expert.name, **sizes), directory)


def _check_config(expert: VisionExpert, config: PreTrainedConfig, directory: Path) -> None:
    fields = read_json(directory / "config.json")
    try:
        saved = type(config).from_dict(fields).to_dict()
    except Exception as error:  # configs raise errors of any kind for fields of a wrong type
        raise ValueError(f"{directory / 'config.json'} must be the config of {expert.name}, got {error}") from error
    ours = config.to_dict()
    differ = {
        field: ours.get(field)
        for field in sorted((ours.keys() | saved.keys()) - _NOT_SIZES)
        if ours.get(field) != saved.get(field)
    }
    saved_values = {field: saved.get(field) for field in differ}
    rule = f"must be those of {directory / 'config.json'} of {expert.name}, {saved_values}"
    check(not differ, "sizes", rule, differ)
