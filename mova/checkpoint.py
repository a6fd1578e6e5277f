"""The files of a checkpoint of any origin: weights are read as tensors by name, damaged files are named."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import GenerationConfig

from ._checks import check
from .generating import check_values


def read_state(source: Path, variant: str | None = None) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint, a file or the weight files of a directory; they are mapped into memory.

    Args:
        source: a file; or a directory, in which :func:`weight_files` finds the files.
        variant: see :func:`weight_files`.

    Raises:
        FileNotFoundError: there is no weight file, or the index names a file that does not exist.
        ValueError: a file is damaged or does not hold tensors by name (code in a pickle is not run), or two files hold
            the same name.
    """
    state: dict[str, Tensor] = {}
    for file in weight_files(source, variant):
        found = _read_file(file)
        twice = sorted(state.keys() & found.keys())
        check(not twice, "source", "must have each name in one file", twice[:5])
        state |= found
    return state


def weight_files(source: Path, variant: str | None = None) -> list[Path]:
    """List the weight files of a checkpoint: the file itself; or those of a directory, by its index if it has one.

    In a directory, safetensors come before pytorch_model*.bin.

    Args:
        source: a file or a directory.
        variant: the name before the suffix of the files (``model.fp16.safetensors``), as in transformers; None: files
            without a variant, if the directory has both.

    Raises:
        FileNotFoundError: there is no weight file, or the index names a file that does not exist.
        ValueError: the index is damaged.
    """
    files = [source]
    if source.is_dir():
        files = []
        mark = "" if variant is None else f".{variant}"
        for stem, suffix in (("*", "safetensors"), ("pytorch_model*", "bin")):
            indices = sorted(source.glob(f"{stem}.{suffix}.index{mark}.json"))
            if indices:
                files = [source / name for name in _shards(indices[0])]
            else:
                files = sorted(source.glob(f"{stem}{mark}.{suffix}"))
                names = {file.name for file in files}
                if variant is None:
                    files = [file for file in files if not _is_variant(file.name, names)]
            if files:
                break
    absent = [file.name for file in files if not file.is_file()]
    if absent or not files:
        of = "" if variant is None else f" of the variant {variant}"
        what = ", ".join(absent) or f"weights{of} (*.safetensors, pytorch_model*.bin, or a file)"
        raise FileNotFoundError(f"no {what} in {source}")
    return files


def check_files(files: Iterable[Path]) -> None:
    """Raise a ValueError that names the first damaged or truncated file; of safetensors only the header is read."""
    for file in files:
        if file.suffix != ".safetensors":
            _read_file(file)
            continue
        try:
            with safe_open(file, "pt"):
                pass
        except SafetensorError as error:
            raise _damaged(file, error) from error


def read_json(file: Path) -> dict[str, Any]:
    """Read the object in a JSON file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged or holds no object; the message names it.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} must be JSON, got {error}") from error
    check(isinstance(found, dict), str(file), "must hold a JSON object", type(found).__name__)
    return found


def check_model_directory(directory: Path, variant: str | None) -> None:
    """Raise an error that names a damaged or truncated file of a model's directory; transformers does not always."""
    if not (directory / "config.json").is_file():
        return  # a hub repository, or no model: transformers reports it
    read_json(directory / "config.json")
    if (directory / "generation_config.json").exists():
        _check_generation(directory / "generation_config.json")
    for index in directory.glob("*.index*.json"):
        check(isinstance(read_json(index).get("metadata"), dict), f"metadata in {index}", "must be an object", None)
    check_files(weight_files(directory, variant))


def _shards(index: Path) -> list[str]:
    """Return the names of the files in an index, which lie beside it."""
    names = read_json(index).get("weight_map")
    fits = isinstance(names, dict) and names and all(isinstance(name, str) and name for name in names.values())
    check(fits, str(index), "must have a weight_map from tensors to files", names if not fits else None)
    return sorted({Path(name).name for name in names.values()})  # type: ignore[union-attr]


def _is_variant(name: str, names: Collection[str]) -> bool:
    """Whether the file is a variant of another one, as model.fp16.safetensors is of model.safetensors."""
    stem, *middle, suffix = name.split(".")
    return bool(middle) and f"{stem}.{suffix}" in names


def _damaged(file: Path, error: Exception) -> ValueError:
    # The message of an unpickler is about its own options.
    reason = f" ({error})" if isinstance(error, SafetensorError) else ""
    return ValueError(f"source must be safetensors or a pickle of plain tensors, got {str(file)!r}{reason}")


def _read_file(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except OSError:
        raise
    except Exception as error:  # an unpickler raises errors of any kind for bytes that are no pickle
        raise _damaged(file, error) from error
    for wrapper in ("state_dict", "model", "module"):
        if isinstance(found, dict) and isinstance(found.get(wrapper), dict):
            found = found[wrapper]
    is_state = isinstance(found, dict) and bool(found)
    is_state = is_state and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in found.items())
    check(is_state, "source", "must hold tensors by name", str(file))
    return found


def _check_generation(file: Path) -> None:
    """Raise if a generation config has a value of a wrong type.

    transformers reports some of these values, but later, when it generates, and without the name of the file.
    """
    fields = read_json(file)
    try:
        check_values(fields)
        GenerationConfig.from_dict(fields)
    except Exception as error:  # a comparison with a value of a wrong type can raise anything
        raise ValueError(f"{file} cannot be used: {error}") from error
    for name, value in fields.items():
        if name.endswith("_token_id") and value is not None:
            numbers = value if isinstance(value, list) else [value]
            fits = all(isinstance(number, int) and not isinstance(number, bool) for number in numbers)
            check(fits, f"{name} in {file}", "must be an int or ints", value)
