"""The files of a saved adapter, in a folder or in a repository on the hub: its config and its weights."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from safetensors.torch import load_file
from torch import Tensor

from ._checks import check
from .config import MoVAdapterConfig


def read_config(source: str | Path, hub: dict[str, Any]) -> MoVAdapterConfig:
    """The config of a saved adapter. ``hub`` holds arguments of hf_hub_download.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: it is not the config of an adapter.
    """
    file = _find(source, constants.CONFIG_NAME, hub)
    if file is None:
        raise FileNotFoundError(f"no {constants.CONFIG_NAME} in {source}; without one, give the config argument")
    known = {field.name for field in fields(MoVAdapterConfig)}
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        check(isinstance(values, dict) and known & values.keys(), "it", "must have an adapter's dimensions", values)
        return MoVAdapterConfig(**{name: value for name, value in values.items() if name in known})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} is not the config of an adapter: {error}") from error


def read_weights(source: str | Path, device: str | torch.device, hub: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of model.safetensors or, where there is none, of pytorch_model.bin, by name.

    Raises:
        FileNotFoundError: there is neither.
        ValueError: the file is damaged, or holds something else than tensors by name (code in a pickle is not run).
    """
    names = (constants.SAFETENSORS_SINGLE_FILE, constants.PYTORCH_WEIGHTS_NAME)
    file = next((file for file in (_find(source, name, hub) for name in names) if file is not None), None)
    if file is None:
        raise FileNotFoundError(f"no {' and no '.join(names)} in {source}")
    try:
        if file.suffix == ".safetensors":
            state = load_file(file, device=str(device))
        else:
            state = torch.load(file, map_location=device, weights_only=True)
    except OSError:
        raise
    except Exception as error:  # whatever an unpickler makes of bytes that are no pickle
        raise ValueError(f"{file} must be safetensors or a pickle of plain tensors") from error
    tensors = isinstance(state, dict) and state and all(isinstance(value, Tensor) for value in state.values())
    check(tensors, str(file), "must hold tensors by name", type(state).__name__)
    return state


def _find(source: str | Path, name: str, hub: dict[str, Any]) -> Path | None:
    if Path(source).is_dir():
        file = Path(source) / name
        return file if file.is_file() else None
    try:
        return Path(hf_hub_download(str(source), name, **hub))
    except EntryNotFoundError:
        return None
    except HFValidationError as error:
        raise FileNotFoundError(f"{source} is neither a folder nor the name of a repository") from error
