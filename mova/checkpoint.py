"""The weight files of a checkpoint, whoever wrote them, as tensors by name."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ._checks import check


def read_state(source: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, mapped into memory: a file, or the weight files of a directory.

    Args:
        source: a file, or a directory with safetensors or else pytorch_model*.bin: those of its index, or all.

    Raises:
        FileNotFoundError: there is none, or the index names one that is not there.
        ValueError: a file holds other than tensors by name (code in a pickle is not run), is damaged, or two files hold
            the same name.
    """
    state: dict[str, Tensor] = {}
    for file in _weight_files(source):
        found = _read_file(file)
        tensors = isinstance(found, dict) and found and all(isinstance(value, Tensor) for value in found.values())
        check(tensors, "source", "must hold tensors by name", str(file))
        twice = sorted(state.keys() & found.keys())
        check(not twice, "source", "must have each name in one file", twice[:5])
        state |= found
    return state


def _weight_files(source: Path) -> list[Path]:
    files = [source]
    if source.is_dir():
        for pattern in ("*.safetensors", "pytorch_model*.bin"):
            for index in source.glob(f"{pattern}.index.json"):
                names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
                files = [source / Path(name).name for name in sorted(set(names))]
                break
            else:
                files = sorted(source.glob(pattern))
            if files:
                break
    absent = [file.name for file in files if not file.is_file()]
    if absent or not files:
        what = ", ".join(absent) or "weights (*.safetensors, pytorch_model*.bin, or a file)"
        raise FileNotFoundError(f"no {what} in {source}")
    return files


def _read_file(file: Path) -> Any:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"source must be safetensors or a pickle of plain tensors, got {str(file)!r} ({reason})"
        ) from error
    for wrapper in ("state_dict", "model", "module"):
        if isinstance(found, dict) and isinstance(found.get(wrapper), dict):
            found = found[wrapper]
    return found
