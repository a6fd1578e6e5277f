"""Golden numbers of the official MoV-Adapter: outputs and gradients in fp32, with the weights and inputs behind them.

The files in ``data`` hold only results. Weights and inputs are generated: the SHA-256 of ``"<seed>/<name>"`` keys a
Philox generator whose bits become uniform numbers with mean 0 and variance 1, and a parameter's role sets its scale.
The bits are those from which the official results were computed, so a changed operation here makes every test fail.
"""

from __future__ import annotations

import hashlib
import json
import math
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mova_kernels import MoVAdapterConfig

DATA = Path(__file__).parent / "data"
TEXT_CHANNELS = 1024
FORWARD_TOLERANCE = 2e-5
GRADIENT_TOLERANCE = 1e-4
# A gradient below this is a residue of cancellation in fp32. It is compared absolutely.
SMALL_GRADIENT = 0.05
SMALL_GRADIENT_TOLERANCE = 5e-6


class AdapterInputs(NamedTuple):
    """Inputs in the order in which the adapter takes them."""

    base: Tensor  # (B, L, C) fp32
    experts: list[Tensor]  # N times (B, T_j, C_j) fp32
    routing: Tensor  # (B, N) bool
    text: Tensor  # (B, TEXT_CHANNELS) fp32


class Golden:
    """One golden file, by its name without suffix."""

    def __init__(self, name: str) -> None:
        with np.load(DATA / f"{name}.npz") as archive:
            self.arrays = {key: archive[key] for key in archive.files}
        self._meta = json.loads(self.arrays.pop("meta").tobytes())
        self.name = name
        self.seed: int = self._meta["seed"]
        self.batch: int = self._meta["batch"]
        self.grids: list[tuple[int, int]] = [(side, side) for side in self._meta["expert_grids"]]

    @cached_property
    def config(self) -> MoVAdapterConfig:
        from mova_kernels import MoVAdapterConfig

        return MoVAdapterConfig(
            in_channels=self._meta["in_channels"],
            out_channels=self._meta["hidden_size"],
            num_heads=self._meta["num_heads"],
            num_layers=self._meta["num_layers"],
            topk=self._meta["topk"],
            resolution=self._meta["resolution"],
            text_channels=TEXT_CHANNELS,
            expert_channels=tuple(self._meta["expert_channels"]),
        )

    def parameters(self) -> dict[str, Tensor]:
        """Every parameter, fp32, by its official name."""
        return {name: parameter(name, shape, self.seed) for name, shape in parameter_shapes(self.config).items()}

    def inputs(self) -> AdapterInputs:
        config = self.config
        channels_and_grids = zip(config.expert_channels, self.grids, strict=True)
        return AdapterInputs(
            base=uniform("base", (self.batch, config.resolution**2, config.in_channels), self.seed),
            experts=[
                uniform(f"expert.{j}", (self.batch, height * width, channels), self.seed)
                for j, (channels, (height, width)) in enumerate(channels_and_grids)
            ],
            routing=torch.from_numpy(self.arrays["routing"]).bool(),
            text=uniform("text", (self.batch, config.text_channels), self.seed),
        )

    def cotangent(self) -> Tensor:
        """The gradient of the loss with respect to the output, (B, (R//2)**2, out_channels) fp32."""
        shape = (self.batch, (self.config.resolution // 2) ** 2, self.config.out_channels)
        return uniform("cotangent", shape, self.seed)

    def strided(self, tensor: Tensor) -> Tensor:
        """The entries of a (..., tokens, channels) tensor that the file keeps."""
        return tensor[..., :: self._meta["token_stride"], :: self._meta["channel_stride"]]

    def check(self, name: str, tensor: Tensor | None) -> None:
        """Compare a whole tensor with the array ``name`` of the file; per-block arrays come stacked.

        A gradient that is None counts as zeros, since an implementation need not touch experts that no sample selected.
        """
        expected = self.arrays[name]
        if tensor is None:
            assert name.startswith("grad."), f"{self.name}: {name} is missing"
            assert np.abs(expected).max() <= _tolerance(name, expected), f"{self.name}: {name} has no gradient"
            return
        actual = self._kept(name, tensor.detach()).double().cpu().numpy()
        assert actual.shape == expected.shape, (
            f"{self.name}: {name}: shape {actual.shape} where the official one is {expected.shape}"
        )
        allowed = _tolerance(name, expected)
        error = np.abs(actual - expected.astype(np.float64))
        index = np.unravel_index(np.argmax(np.where(np.isnan(error), np.inf, error)), error.shape)
        assert error[index] <= allowed, (
            f"{self.name}: {name} at {tuple(map(int, index))}: expected {expected[index]:.9g}, got "
            f"{actual[index]:.9g}; off by {error[index]:.3g}, allowed {allowed:.3g}"
        )

    def check_gradients(self, gradients: Mapping[str, Tensor | None]) -> None:
        """Compare the gradients of all parameters, by official name."""
        names = parameter_shapes(self.config).keys()
        assert gradients.keys() == names, f"{self.name}: {sorted(gradients.keys() ^ names)} missing or unknown"
        for name, gradient in gradients.items():
            if f"grad.{name}" in self.arrays:
                self.check(f"grad.{name}", gradient)
            else:
                assert gradient is None or not gradient.any(), f"{self.name}: {name} has no gradient officially"

    def _kept(self, name: str, tensor: Tensor) -> Tensor:
        if name in ("gate_logits", "grad.text"):
            return tensor
        if name.removeprefix("grad.") in parameter_shapes(self.config):
            return tensor.flatten()[:: max(1, tensor.numel() // 64)][:64]
        return self.strided(tensor)


class ExpertGolden:
    """The golden file of a vision expert: its tokens for one image, (1, 3, 1024, 1024)."""

    def __init__(self, name: str) -> None:
        with np.load(DATA / f"expert_{name}.npz") as archive:
            self.meta = json.loads(archive["meta"].tobytes())
            self.output = torch.from_numpy(archive["output"])

    def parameters(self) -> dict[str, Tensor]:
        """Every parameter, fp32, by its official name."""
        return {name: parameter(name, shape, self.meta["seed"]) for name, shape in self.meta["parameters"].items()}

    def image(self) -> Tensor:
        return uniform("image", (1, 3, 1024, 1024), self.meta["seed"])

    def strided(self, tokens: Tensor) -> Tensor:
        """The entries of (1, T, C) tokens that the file keeps."""
        return tokens[:, :: self.meta["token_stride"], :: self.meta["channel_stride"]]


def parameter_shapes(config: MoVAdapterConfig) -> dict[str, tuple[int, ...]]:
    """Official names and shapes of all parameters, in the official order, without the text encoder's."""
    channels, out_channels, num_experts = config.in_channels, config.out_channels, len(config.expert_channels)
    shapes: dict[str, tuple[int, ...]] = {"pos_embed": (1, config.resolution**2, channels)}

    def norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    def linear(name: str, fan_in: int, fan_out: int, kernel: tuple[int, ...] = ()) -> None:
        shapes[f"{name}.weight"] = (fan_out, fan_in, *kernel)
        shapes[f"{name}.bias"] = (fan_out,)

    def attention(name: str, context_channels: int) -> None:
        for projection, fan_in in (("q", channels), ("k", context_channels), ("v", context_channels)):
            shapes[f"{name}.{projection}_proj.weight"] = (channels, fan_in)
        norm(f"{name}.inner_attn_ln", channels)
        linear(f"{name}.proj", channels, channels)

    for i in range(config.num_layers):
        block = f"blocks.{i}"
        for j, expert_channels in enumerate(config.expert_channels):
            attention(f"{block}.cross_attn.{j}", expert_channels)
        for j in range(num_experts):
            norm(f"{block}.norm1.{j}", channels)
        for j, expert_channels in enumerate(config.expert_channels):
            norm(f"{block}.norm2.{j}", expert_channels)
        hidden = int(channels * 8 / 3)
        linear(f"{block}.mlp.w1", channels, hidden)
        linear(f"{block}.mlp.w2", channels, hidden)
        norm(f"{block}.mlp.ffn_ln", hidden)
        linear(f"{block}.mlp.w3", hidden, channels)
        attention(f"{block}.self_attn", channels)
        norm(f"{block}.norm3", channels)
        norm(f"{block}.norm4", channels)
        linear(f"{block}.gate.0", config.text_channels + channels, channels)
        linear(f"{block}.gate.2", channels, num_experts)

    linear("mlp.0", channels, out_channels)
    linear("mlp.2", out_channels, out_channels)

    squeezed = round(channels * 0.25)
    for stage in ("downsample.0.b1", "downsample.2.b1"):
        for conv, shape in (("conv1", (channels, 1, 1)), ("conv2", (1, 3, 3)), ("conv3", (channels, 1, 1))):
            shapes[f"{stage}.{conv}.conv.weight"] = (channels, *shape)
            norm(f"{stage}.{conv}.bn", channels)
            if conv == "conv2":
                linear(f"{stage}.se.fc1", channels, squeezed, kernel=(1, 1))
                linear(f"{stage}.se.fc2", squeezed, channels, kernel=(1, 1))
    return shapes


def uniform(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """fp32 numbers of mean 0 and variance 1 that depend on the name and the seed alone."""
    key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:16], "little")
    bits = np.random.Philox(key=key).random_raw(math.prod(shape))
    bits >>= np.uint64(11)
    values = bits.astype(np.float64)
    values *= 2.0**-53
    values *= 2
    values -= 1
    values *= 3**0.5
    return torch.from_numpy(values.astype(np.float32).reshape(shape))


def parameter(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """A plausible trained value of an adapter parameter, fp32. The weights of a gate are large: it prefers experts."""
    values = uniform(name, shape, seed).numpy()
    leaf = name.rpartition(".")[2]
    if leaf == "pos_embed":
        values *= 0.2
    elif leaf == "bias":
        values *= 0.1
    elif len(shape) == 1:
        values *= 0.1
        values += 1
    else:
        if ".gate." in name:
            values *= 3.0
        values /= np.float32(math.prod(shape[1:]) ** 0.5)
    return torch.from_numpy(values)


def _tolerance(name: str, expected: np.ndarray) -> float:
    """The largest error allowed in an entry of the array."""
    largest = float(np.abs(expected).max())
    if not name.startswith("grad."):
        return FORWARD_TOLERANCE * largest
    return SMALL_GRADIENT_TOLERANCE if largest < SMALL_GRADIENT else GRADIENT_TOLERANCE * largest
