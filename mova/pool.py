"""The encoders of a model's experts: each is loaded when it is first used, and placed where the user wants it."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from ._checks import check
from ._lock import Lock, locked
from ._wrapped import compute_device, compute_dtype
from .checkpoint import check_files, weight_files
from .encoders import VisionEncoder
from .encoders.encoder import check_config
from .experts import VisionExpert
from .hub import file_names, folder


@dataclass(frozen=True)
class Placement:
    """The place of an expert: its ``device`` and ``dtype`` (None: those of the base tokens), and whether it returns to
    the host's memory after each use (``offload``)."""

    device: torch.device | str | None = None
    dtype: torch.dtype | None = None
    offload: bool = False


class ExpertPool:
    """The frozen encoders of a model's experts, by name.

    They are not parameters of the model, since they are never trained. So ``model.to(...)`` does not move them: when an
    expert is used, it follows the base tokens to their device and dtype, unless :meth:`place` says otherwise. Threads
    may share a pool; their calls run one after another.

    Args:
        experts: in the order of the adapter's columns.
        sizes: name to those sizes of an encoder that differ from the released ones.
        names: the experts in use, see :meth:`only`; None: all.

    Attributes:
        specs: name to the VisionExpert, in the order of the adapter's columns.
        source: a directory or hub repository with ``experts/<name>``; None: an expert gets random weights, which
            depend on its name and sizes alone.
        hub_arguments: the loading arguments of transformers for ``source`` (``revision``, ``token``, ``subfolder``,
            ...).
        variant: of the weight files, as in transformers.
    """

    def __init__(
        self,
        experts: Iterable[VisionExpert],
        sizes: Mapping[str, Mapping[str, Any]],
        names: Iterable[str] | None = None,
    ) -> None:
        self.specs = {expert.name: expert for expert in experts}
        self.source: str | None = None
        self.hub_arguments: dict[str, Any] = {}
        self.variant: str | None = None
        self._folders: dict[tuple[str, str], Path] = {}
        self._sizes = sizes
        self._loaded: dict[str, VisionEncoder] = {}
        self._placements: dict[str, Placement] = {}
        self._allowed = tuple(self.specs)
        self.lock = Lock()
        if names is not None:
            self.only(names)

    @property
    def allowed(self) -> tuple[str, ...]:
        """The experts that may be used, in the order of the adapter's columns."""
        return self._allowed

    @locked
    def only(self, names: Iterable[str]) -> None:
        """Use only these experts. Others are unloaded and not offered to the router; to select one is an error."""
        wanted = {self._known(name) for name in names}
        self._allowed = tuple(name for name in self.specs if name in wanted)
        for name in set(self._loaded) - wanted:
            self.unload(name)

    @locked
    def place(
        self,
        *names: str,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        offload: bool = False,
    ) -> None:
        """Set the :class:`Placement` of these experts, or of all if no name is given."""
        for name in names or self.specs:
            self._placements[self._known(name)] = Placement(device, dtype, offload)

    def placement(self, name: str) -> Placement:
        """Return the placement of this expert."""
        return self._placements.get(self._known(name), Placement())

    @locked
    def loaded(self) -> tuple[str, ...]:
        """Return the names of the experts in memory."""
        return tuple(self._loaded)

    @locked
    def unload(self, name: str) -> None:
        """Free the memory of an expert, which is loaded again when it is next used."""
        self._loaded.pop(self._known(name), None)

    @locked
    def __getitem__(self, name: str) -> VisionEncoder:
        """Return the encoder; it is loaded if it is not in memory, with a strict check of its keys."""
        self._known(name)
        if name not in self._loaded:
            # Tensors that are made in inference mode cannot be moved outside of it.
            with torch.inference_mode(False):
                self._loaded[name] = self._load(name)
        return self._loaded[name]

    def _load(self, name: str) -> VisionEncoder:
        expert, sizes = self.specs[name], self._sizes.get(name, {})
        if self.source is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(crc32(name.encode()))
                return VisionEncoder(expert, sizes).eval().requires_grad_(False)
        dtype = self.placement(name).dtype
        return VisionEncoder.load(self._directory(name), expert, sizes, dtype=dtype, variant=self.variant)

    @locked
    @torch.no_grad()
    def encode(self, name: str, pixels: Tensor, like: Tensor) -> Tensor:
        """Encode prepared images into tokens (B_e, T_e, C_e), on the device and in the dtype of ``like``.

        Args:
            name: the expert.
            pixels: the images that selected the expert, as ``mova.images.prepare`` makes them; of any device and dtype.
            like: usually the base tokens.

        Raises:
            ValueError: the expert is unknown or excluded by :meth:`only`, or the pixels do not fit it.
            OSError: there are no weights for it.
        """
        check(name in self._allowed, "name", f"must be one of the experts in use ({', '.join(self._allowed)})", name)
        if pixels.shape[0] == 0:
            return like.new_empty(0, self.specs[name].num_tokens, self.specs[name].channels)
        place = self.placement(name)
        device, dtype = place.device or like.device, place.dtype or like.dtype
        with torch.inference_mode(False):
            encoder = self[name]
        hooked = any(parameter.is_meta for parameter in encoder.parameters())  # accelerate has offloaded it
        if hooked:
            device, dtype = compute_device(encoder), compute_dtype(encoder)
        try:
            if not hooked:
                with torch.inference_mode(False):
                    encoder.to(device, dtype)
            return encoder(pixels.to(device, dtype)).to(like)
        finally:  # also if memory did not suffice
            if place.offload and not hooked:
                with torch.inference_mode(False):
                    encoder.to("cpu")

    def check_files(self) -> None:
        """Raise if the files of an expert in use are missing or damaged; no weights are read or fetched.

        Raises:
            FileNotFoundError: an expert has no files.
            ValueError: a file is damaged; the message names it.
        """
        if self.source is None:
            return
        is_local = Path(self.source).is_dir()
        remote = () if is_local else file_names(self.source, "experts", self.hub_arguments)
        for name in self._allowed:
            try:
                if not is_local:
                    files = [file for file in remote if file.startswith(f"{name}/")]
                    if not any(file.endswith((".safetensors", ".bin")) for file in files):
                        raise FileNotFoundError(f"no weights of the expert {name!r} in {self.source}")
                    continue
                directory = self._directory(name)
                check_files(weight_files(directory, self.variant))
            except FileNotFoundError as error:
                raise FileNotFoundError(
                    f"{error} (expert {name!r}); to load the model without it, leave it out of "
                    "experts_in_use of its config"
                ) from error
            check_config(self.specs[name], self._sizes.get(name, {}), directory)

    @locked
    def save(
        self, directory: str | Path, *, variant: str | None = None, max_shard_size: int | str | None = None
    ) -> None:
        """Write every expert to ``directory/experts/<name>``: from memory if it is loaded, else as a copy of its files.

        Args:
            directory: the directory of the model.
            variant, max_shard_size: as in transformers.

        Raises:
            FileNotFoundError: an expert in use has no files.
        """
        for name in self.specs:
            target = Path(directory) / "experts" / name
            is_loaded = name in self._loaded
            if is_loaded or self.source is None or variant != self.variant:
                try:
                    self[name].save(target, variant=variant, max_shard_size=max_shard_size)
                except FileNotFoundError:
                    if name in self._allowed:
                        raise
                if not is_loaded and self.source is not None:
                    self.unload(name)
                continue
            try:
                source = self._directory(name)
            except FileNotFoundError:
                if name in self._allowed:
                    raise
                continue
            if source.resolve() != target.resolve():
                shutil.copytree(source, target, dirs_exist_ok=True)

    def _known(self, name: str) -> str:
        check(name in self.specs, "name", f"must be one of the model's experts ({', '.join(self.specs)})", name)
        return name

    def _directory(self, name: str) -> Path:
        """Find the directory of an expert's files; a folder that was fetched from the hub once is not fetched again."""
        assert self.source is not None
        key = (self.source, name)
        if key not in self._folders or not self._folders[key].is_dir():
            try:
                self._folders[key] = folder(self.source, f"experts/{name}", self.hub_arguments)
            except FileNotFoundError as error:
                raise FileNotFoundError(f"no weights of the expert {name!r}: {error}") from error
        return self._folders[key]
