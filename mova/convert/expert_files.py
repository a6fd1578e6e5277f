"""Single experts: an authors' checkpoint becomes an expert of a model, and the other way round."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from .._checks import check
from ..checkpoint import read_state
from ..configuration_mova import MoVAConfig
from ..encoders import VisionEncoder
from ..experts import VisionExpert
from .expert_keys import from_public, to_public


def convert_expert(expert: VisionExpert, source: Path, target: Path, sizes: Mapping[str, Any] | None = None) -> None:
    """Convert an expert's own checkpoint into an encoder in ``target``, in the dtype of the file.

    Args:
        expert: an official one, or ``clip``.
        source: a file, or a directory of them.
        target: the directory to write; in a model it is ``experts/<name>``.
        sizes: sizes that differ from the released ones (``MoVAConfig.encoder_sizes``).

    Raises:
        FileNotFoundError: there are no weights.
        ValueError: keys are missing, unexpected or of another shape.
    """
    state = from_public(expert.name, read_state(source), sizes)
    VisionEncoder.from_state(state, expert, sizes).save(target)


def add_experts(model: Path, sources: Mapping[str, Path]) -> None:
    """Convert experts' own checkpoints into the experts of a model, which uses them from then on.

    Args:
        model: the model's directory; or one without a model, which gets experts of the released sizes.
        sources: name to the expert's own checkpoint, a file or a directory of them.

    Raises:
        FileNotFoundError: there are no weights.
        ValueError: the model has no such expert, or keeps its experts elsewhere; weights do not fit.
    """
    config = MoVAConfig.from_pretrained(model) if (model / "config.json").is_file() else MoVAConfig()
    check(config.expert_path is None, "output", "must hold its experts itself", config.expert_path)
    pool = {expert.name: expert for expert in config.pool}
    for name, source in sources.items():
        check(name in pool, "expert", f"must be one of the model's ({', '.join(pool)})", name)
        convert_expert(pool[name], source, model / "experts" / name, config.encoder_sizes.get(name))
    if config.experts_in_use is not None:
        config.experts_in_use = [name for name in pool if name in config.experts_in_use or name in sources]
        config.save_pretrained(model)


def to_public_checkpoint(source: Path, name: str, target: Path) -> None:
    """Write one expert of the model in ``source`` to the file ``target``, under the names of its authors' own file.

    Raises:
        FileNotFoundError: the model has no weights of it.
        ValueError: the model has no such expert, or ``target`` exists.
    """
    config = MoVAConfig.from_pretrained(source)
    names = [expert.name for expert in config.pool]
    check(name in names, "expert", f"must be one of the model's ({', '.join(names)})", name)
    check(not target.exists(), "output", "must not hold it yet", str(target))
    state = read_state(Path(config.expert_path or source) / "experts" / name)
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in to_public(name, state).items()}, target)
