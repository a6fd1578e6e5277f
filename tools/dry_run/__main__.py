"""Run Python against a GPU that computes nothing: python tools/dry_run -m pytest -p no_numbers tests/test_gpu.py

For machines without a GPU. Everything around the kernels is real, with PyTorch built for CUDA and Triton: compilation,
launches, memory, streams, events, graphs. Numbers are not real: kernels do nothing, so tensors keep the former content
of their memory. The pytest plugin ``no_numbers`` beside this file accepts every number. With the plugin ``emulated``
the numbers are right. driver.cpp lists the calls that are refused.
The time of a call is the host's. ``ctypes.CDLL(None).dry_run_report()`` prints the number of launches of each kernel.

It needs g++, nm, and a torch with CUDA (pip's choice for Linux; two gigabytes). cuDNN is switched off by the plugin; a
library that brings its own copy of the CUDA runtime, such as libmova_kernels_cuda.so, sees no device.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
IMPORTED = re.compile(r"^(__cuda|cuda|cublas|cudnn|cu[A-Z])")
LEFT_ALONE = re.compile(r"^cuFile")


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        library = build(Path(folder))
        paths = {"PYTHONPATH": [HERE, ROOT], "LD_LIBRARY_PATH": [folder]}  # Triton looks for libcuda.so.1
        joined = {
            name: os.pathsep.join(filter(None, (*map(str, new), os.environ.get(name)))) for name, new in paths.items()
        }
        command = [sys.executable, *sys.argv[1:]]
        sys.exit(subprocess.call(command, env={**os.environ, **joined, "LD_PRELOAD": str(library)}))


def build(folder: Path) -> Path:
    """Build libcuda.so.1 from driver.cpp. All other functions that PyTorch and Triton import from it return 0."""
    torch, triton = package("torch"), package("triton")
    if not (torch / "lib" / "libtorch_cuda.so").exists():
        sys.exit(f"{torch} is built without CUDA: pip install torch, without naming a CPU build")
    # Structures must be those of torch's own CUDA version, whose headers come with it; a few small ones Triton has.
    headers = next(torch.parent.glob("nvidia/*/include/cuda_runtime_api.h")).parent
    more = triton / "backends" / "nvidia" / "include"
    source = HERE / "driver.cpp"
    here = set(re.findall(r"\b(\w+)\(", "".join(re.findall(r"^API .*$", source.read_text(), re.MULTILINE))))
    names = {name for library in (torch / "lib").glob("lib*.so") for name in undefined(library)}
    for launcher in (triton / "backends" / "nvidia").glob("driver.*"):
        names |= set(re.findall(r"\b(cu[A-Z]\w+)\(", launcher.read_text()))
    stubs = folder / "stubs.c"
    stubs.write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in sorted(names - here)))
    library = folder / "libcuda.so.1"
    options = ["-shared", "-fPIC", "-O1", "-w", "-isystem", str(headers), "-isystem", str(more)]
    subprocess.run(["gcc", "-c", "-fPIC", "-w", str(stubs), "-o", str(folder / "stubs.o")], check=True)
    files = [str(source), str(folder / "stubs.o")]
    subprocess.run(["g++", "-std=c++17", *options, *files, "-o", str(library), "-ldl"], check=True)
    return library


def package(name: str) -> Path:
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        sys.exit(f"{name} is not installed")
    return Path(found.origin).parent


def undefined(library: Path) -> list[str]:
    """The names of the CUDA functions that a library imports."""
    table = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True).stdout
    names = [line.split()[-1].partition("@")[0] for line in table.splitlines()]
    return [name for name in names if IMPORTED.match(name) and not LEFT_ALONE.match(name)]


if __name__ == "__main__":
    main()
