"""The interface of the emulator on top of its prototype, until the emulator is there; then this file goes.

MOVA_PTX_PROTOTYPE names a built copy of the prototype.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

FOLDER = Path(os.environ.get("MOVA_PTX_PROTOTYPE", "/tmp/ptxc"))
CHECK_BOUNDS_AND_RACES, LATE_EFFECTS = 1, 4
BYTES = {"8": 1, "16": 2, "32": 4, "64": 8}


class Fault(Exception):
    """The kernel does what a GPU would not let pass, or what must not depend on luck."""


def reason() -> str | None:
    return None if (FOLDER / "libemu.so").exists() else f"{FOLDER} has no built prototype of the PTX emulator"


class Kernel:
    def __init__(self, text: str, name: str) -> None:
        sys.path.insert(0, str(FOLDER))
        try:
            import ptxemu
        finally:
            sys.path.pop(0)
        self._ptxemu = ptxemu
        self._kernel = ptxemu.Kernel(text, name)
        self.static_shared = self._kernel.static_smem
        self.parameter_bytes = self._kernel.nparams
        head = ptxemu.kernels(text)[name][0]
        declared = re.findall(r"\.param\b[^,)]*\.[busf](8|16|32|64)\s+([\w$]+)(?:\[(\d+)\])?", head)
        sizes = {name: BYTES[bits] * int(count or 1) for bits, name, count in declared}
        self.parameters = {name: (offset, sizes[name]) for name, offset in self._kernel.params.items()}

    def launch(
        self,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        shared_bytes: int,
        parameters: bytes,
        memory: list[tuple[int, int]],
    ) -> None:
        """``shared_bytes`` is the dynamic part."""
        self._ptxemu.set_buffers(memory)
        shared_bytes += self.static_shared
        try:
            warnings = self._kernel.launch(grid, block, shared_bytes, parameters, CHECK_BOUNDS_AND_RACES | LATE_EFFECTS)
        except RuntimeError as error:
            raise Fault(str(error)) from None
        if warnings:
            raise Fault(warnings)
