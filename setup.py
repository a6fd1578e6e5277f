"""Builds the native libraries with CMake; everything else is in pyproject.toml.

libmova_kernels.so (CPU) and, where nvcc is found, libmova_kernels_cuda.so link to neither Python nor torch, so one
build serves every Python and every torch, and torch need not be installed to build.

Environment: MOVA_CUDA=0|1|auto, MOVA_CUDA_ARCHS="80-real;90a-real;100", MOVA_NATIVE=0 (pure Python), MAX_JOBS,
MOVA_BUILD_DIR, MOVA_BUILD_TYPE; CXX, CUDACXX, CUDA_HOME, CUDAHOSTCXX and CMAKE_EXECUTABLE as usual.
"""

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools < 70.1
    from wheel.bdist_wheel import bdist_wheel

ROOT = Path(__file__).resolve().parent
LIBRARIES = Path("mova_kernels", "_lib")
OFF, ON = ("0", "off", "no", "false"), ("1", "on", "yes", "true")
NATIVE = os.environ.get("MOVA_NATIVE", "1").lower() not in OFF
MIN_CMAKE, MIN_CUDA = (3, 24), (12, 8)


def tool_version(command, pattern=r"(\d+)\.(\d+)"):
    """The (major, minor) that ``command --version`` prints, or None if it does not run."""
    try:
        output = subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    found = re.search(pattern, output)
    return (int(found[1]), int(found[2])) if found else None


def find_tool(name, directory_attribute, override=None, minimum=(0, 0)):
    """cmake or ninja: an explicit choice, the Python package (which need not be on PATH), or PATH."""
    candidates = [override]
    try:
        candidates.append(os.path.join(getattr(importlib.import_module(name), directory_attribute), name))
    except (ImportError, AttributeError):
        pass
    candidates.append(shutil.which(name))
    return next((c for c in candidates if c and (tool_version(c) or (-1, 0)) >= minimum), None)


def find_cmake():
    return find_tool("cmake", "CMAKE_BIN_DIR", os.environ.get("CMAKE_EXECUTABLE"), MIN_CMAKE)


def find_ninja():
    return find_tool("ninja", "BIN_DIR")


def find_cxx():
    names = shlex.split(os.environ.get("CXX", ""))[:1] or ["c++", "g++", "clang++"]
    if not any(shutil.which(name) for name in names):
        raise SystemExit(
            f"mova_kernels: no C++ compiler found (looked for {', '.join(names)}). Install one, or set MOVA_NATIVE=0 "
            "to install without native code: everything then runs on the pure PyTorch implementations."
        )


def find_nvcc():
    """(path of nvcc or None, why)."""
    wanted = os.environ.get("MOVA_CUDA", "auto").lower()
    if wanted not in (*OFF, *ON, "auto"):
        raise SystemExit(f"mova_kernels: MOVA_CUDA must be 0, 1 or auto, got {wanted!r}")
    if wanted in OFF:
        return None, f"switched off by MOVA_CUDA={wanted}"
    places = [("CUDACXX", os.environ.get("CUDACXX"))]
    places += [(v, os.path.join(os.environ[v], "bin", "nvcc")) for v in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(v)]
    places += [("PATH", shutil.which("nvcc")), ("default", "/usr/local/cuda/bin/nvcc")]
    rejected = []
    for place, path in places:
        version = tool_version(path, r"release (\d+)\.(\d+)") if path else None
        if version and version >= MIN_CUDA:
            return path, f"CUDA {version[0]}.{version[1]}, found through {place}"
        if path:
            rejected.append(f"{place}: {path} " + ("is CUDA {}.{}".format(*version) if version else "does not run"))
    why = "no nvcc of CUDA {}.{} or newer was found ({})".format(*MIN_CUDA, ", ".join(rejected))
    if wanted in ON:
        raise SystemExit(f"mova_kernels: MOVA_CUDA={wanted}, but {why}")
    return None, why


class CMakeBuild(build_ext):
    """Configures, builds and installs into mova_kernels/_lib: of the tree if editable, else of the wheel."""

    def run(self):
        output = self.output()
        if NATIVE:
            self.build(output)
        else:
            shutil.rmtree(output, ignore_errors=True)
            output.mkdir(parents=True)
            why = "switched off by MOVA_NATIVE=" + os.environ["MOVA_NATIVE"]
            info = {"version": self.distribution.get_version(), "native": False, "native_why": why}
            info |= {"cuda": None, "cuda_archs": None, "cuda_why": why}
            (output / "build_info.json").write_text(json.dumps(info, indent=2) + "\n")

    def build(self, output):
        cmake, ninja = find_cmake(), find_ninja()
        if not cmake:
            raise SystemExit("mova_kernels: CMake >= {}.{} is needed (pip install cmake ninja)".format(*MIN_CMAKE))
        find_cxx()
        nvcc, why = find_nvcc()
        options = {
            "CMAKE_BUILD_TYPE": os.environ.get("MOVA_BUILD_TYPE", "Release"),
            "CMAKE_INSTALL_PREFIX": output,
            "MOVA_CUDA": "ON" if nvcc else "OFF",
            "MOVA_CUDA_WHY": why,
            # Passed every time, because the cache may hold a tool of a build environment that is gone.
            "CMAKE_CXX_COMPILER_LAUNCHER": shutil.which("ccache") or "",
            "CMAKE_CUDA_COMPILER_LAUNCHER": shutil.which("ccache") or "",
        }
        if ninja:
            options["CMAKE_MAKE_PROGRAM"] = ninja
        if nvcc:
            options["CMAKE_CUDA_COMPILER"] = nvcc
        if os.environ.get("MOVA_CUDA_ARCHS"):
            options["MOVA_CUDA_ARCHS"] = os.environ["MOVA_CUDA_ARCHS"].replace(",", ";")
        generator = "Ninja" if ninja else "Unix Makefiles"
        directory = Path(os.environ.get("MOVA_BUILD_DIR", ROOT / "build" / "cmake")).resolve()
        if self.must_start_over(directory / "CMakeCache.txt", generator, nvcc):
            shutil.rmtree(directory)
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        print(f"mova_kernels: CPU{' and CUDA' if nvcc else ', no CUDA'}: {why}; {cmake}, {generator}", flush=True)
        try:
            subprocess.run(
                [cmake, "-S", ROOT, "-B", directory, "-G", generator, *(f"-D{k}={v}" for k, v in options.items())],
                check=True,
            )
            subprocess.run([cmake, "--build", directory, "--parallel", jobs], check=True)
        except subprocess.CalledProcessError as error:
            hint = "; MOVA_CUDA=0 builds without CUDA" if nvcc else ""
            raise SystemExit(f"mova_kernels: the build failed, see above{hint}") from error
        shutil.rmtree(output, ignore_errors=True)
        subprocess.run([cmake, "--install", directory, "--component", "runtime"], check=True)

    @staticmethod
    def must_start_over(cache, generator, nvcc):
        """CMake refuses to change these in an existing build directory."""
        if not cache.exists():
            return False
        text = cache.read_text()
        same_nvcc = not nvcc or "CMAKE_CUDA_COMPILER:" not in text or f"={nvcc}\n" in text
        return not (
            f"CMAKE_GENERATOR:INTERNAL={generator}\n" in text
            and f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT}\n" in text
            and same_nvcc
        )

    def output(self):
        return (ROOT if self.inplace else Path(self.build_lib).resolve()) / LIBRARIES

    def get_outputs(self):
        return [str(path) for path in self.output().glob("*")]

    def get_output_mapping(self):
        wheel = Path(self.build_lib).resolve() / LIBRARIES
        return {str(wheel / path.name): str(path) for path in self.output().glob("*")} if self.inplace else {}


class Wheel(bdist_wheel):
    """Any Python 3 will do; the platform matters if there is native code."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2] if NATIVE else "any"


version = re.search(r'__version__ = "(.+)"', (ROOT / "mova_kernels" / "_version.py").read_text())[1]
missing = [] if find_cmake() else ["cmake>=3.28,<5"]
missing += [] if find_ninja() else ["ninja"]
setup(
    version=version,
    ext_modules=[Extension("mova_kernels._lib", [])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Wheel},
    setup_requires=missing if NATIVE else [],
)
