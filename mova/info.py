"""What ``mova info`` prints: versions, the known experts, the parts of a model and which of them are on disk."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from . import experts
from .configuration_mova import MoVAConfig
from .routing_lora import ROUTING_LORA


def print_versions() -> None:
    """Print the versions of the packages that matter."""
    for package in ("mova-kernels", "torch", "transformers", "peft", "triton"):
        try:
            print(f"{package:14} {version(package)}")
        except PackageNotFoundError:
            print(f"{package:14} not installed")
    print("which kernels run here and why: python -m mova_kernels\n")


def print_known_experts() -> None:
    """Print the base encoder and every registered expert."""
    _print_experts([(expert, "") for expert in (experts.BASE, *map(experts.get, experts.names()))])


def print_model(model: str, config: MoVAConfig) -> None:
    """Print the parts of a model.

    Args:
        model: a directory or a hub repository.
        config: the model's.
    """
    adapter, text, source = config.adapter_config, config.text_config, Path(config.expert_path or model)
    print(f"model          {model}: {_on_disk(Path(model))}")
    print(f"language model {text.model_type}, {text.num_hidden_layers} layers, width {text.hidden_size}")
    print(f"adapter        {adapter.num_layers} blocks, width {adapter.in_channels}, top {adapter.topk}, ", end="")
    print(f"{config.num_image_tokens} image tokens, {config.num_routing_tokens} for the router")
    print(f"routing LoRA   {'yes' if (Path(model) / ROUTING_LORA).is_dir() else 'no'}")
    print(f"experts        in {source / 'experts'}\n")
    weights = [(expert, _on_disk(source, f"experts/{expert.name}")) for expert in config.pool]
    _print_experts([(config.base_expert, "in model"), *weights])


def _on_disk(root: Path, part: str = "") -> str:
    if not root.is_dir():
        return "not on disk"
    files = list((root / part).glob("*.safetensors"))
    return f"{sum(file.stat().st_size for file in files) / 1e6:.1f} MB" if files else "missing"


def _print_experts(rows: Sequence[tuple[experts.VisionExpert, str]]) -> None:
    """Print a table of encoders, each with the place of its weights; the place may be empty in all rows."""
    column = max(len(weights) for _, weights in rows)
    heading = f"{'weights'[:column]:{column}}"
    print(f"{'encoder':12} {'image':>5} {'seen':>5} {'grid':>8} {'width':>6}  {heading}  what it is for")
    for expert, weights in rows:
        grid = "{} x {}".format(*expert.grid)
        sizes = f"{expert.image_size:>5} {expert.input_size:>5} {grid:>8} {expert.channels:>6}"
        print(f"{expert.name:12} {sizes}  {weights:{column}}  {expert.description}")
