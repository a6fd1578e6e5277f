"""What the build promises about its binaries: self-contained, few symbols, and one instruction set per object."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from mova_kernels import _compiled

ROOT = Path(__file__).resolve().parents[1]
OBJECTS = ROOT / "build" / "cmake" / "CMakeFiles"
SYSTEM_LIBRARIES = r"(libstdc\+\+|libgcc_s|libm|libc|ld-linux[^.]*|libdl|libpthread|librt)\.so\.\d+"
# The newest versions of the system's symbols that the libraries may need. Static cudart needs a newer glibc.
CEILINGS = {"GLIBC": "2.29", "GLIBCXX": "3.4", "CXXABI": "1.3.9"}
CUDA_GLIBC = "2.34"
# What the objects must not use.
ISAS = {"base": r"%[yz]mm", "avx2": r"%zmm", "avx512": r"dpbf16|cvtne\w*bf16", "avx512_bf16": None}


def run(tool: str, *arguments: object) -> str:
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")
    return subprocess.run([tool, *map(str, arguments)], capture_output=True, text=True, check=True).stdout


@pytest.fixture(params=["libmova_kernels.so", "libmova_kernels_cuda.so"])
def library(request: pytest.FixtureRequest) -> Path:
    path = ROOT / "mova_kernels" / "_lib" / request.param
    if not path.exists():
        pytest.skip(f"{path.name} was not built")
    return path


def objects(isa: str) -> list[Path]:
    found = list((OBJECTS / f"mova_cpu_{isa}.dir").rglob("*.o"))
    if not found:
        pytest.skip(f"no objects under {OBJECTS}")
    return found


def test_abi_version_is_the_same_on_both_sides():
    header = (ROOT / "csrc" / "common" / "mova_kernels.h").read_text()
    assert re.findall(r"#define MK_ABI_VERSION (\d+)", header) == [str(_compiled.ABI_VERSION)]


def test_dtypes_are_the_same_on_both_sides():
    header = (ROOT / "csrc" / "common" / "mova_kernels.h").read_text()
    enumeration = re.search(r"enum mk_dtype \{(.*?)\}", header)[1]
    names = {"torch.float32": "MK_F32", "torch.bfloat16": "MK_BF16", "torch.float16": "MK_F16"}
    assert dict(re.findall(r"(MK_\w+) = (\d+)", enumeration)) == {
        names[str(dtype)]: str(value) for dtype, value in _compiled.DTYPES.items()
    }


def test_build_info():
    info = _compiled.build_info()
    if not info:
        pytest.skip("nothing was built")
    assert {"version", "native", "cuda", "cuda_archs", "cuda_why"} <= info.keys()
    assert info["cuda_why"]


def test_only_the_c_api_is_exported(library):
    symbols = [line.split()[-1] for line in run("nm", "-D", "--defined-only", library).splitlines()]
    assert symbols and all(name.startswith("mk_") for name in symbols), symbols


def test_needs_only_system_libraries(library):
    needed = re.findall(r"NEEDED.*\[(.*)\]", run("readelf", "-d", library))
    assert needed and all(re.fullmatch(SYSTEM_LIBRARIES, name) for name in needed), needed


def test_runs_on_old_systems(library):
    needed = set(re.findall(r"Name: (GLIBC|GLIBCXX|CXXABI)_([\d.]+)", run("readelf", "-V", library)))
    ceilings = CEILINGS | ({"GLIBC": CUDA_GLIBC} if "cuda" in library.name else {})
    newer = [f"{name}_{version}" for name, version in needed if numbers(version) > numbers(ceilings[name])]
    assert needed and not newer, newer


def numbers(version: str) -> list[int]:
    return [int(n) for n in version.split(".")]


@pytest.mark.parametrize("isa", ISAS)
def test_objects_keep_to_their_instruction_set(isa):
    """Loops that leak, through wide registers or through a weak symbol the linker may prefer, crash older machines."""
    for path in objects(isa):
        if ISAS[isa]:
            assert not re.search(ISAS[isa], run("objdump", "-d", "--no-show-raw-insn", path)), path
        weak = [line for line in run("nm", path).splitlines() if re.search(r" [WwVu] ", line)]
        assert not weak, (path, weak)
