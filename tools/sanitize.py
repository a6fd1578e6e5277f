"""Run the C++ tests on a library with AddressSanitizer and UBSan: ``python tools/sanitize.py [PYTEST OPTIONS]``.

It builds the CMake preset ``asan`` in a scratch folder and runs the tests named test_*_cpu.py with this library instead
of the installed one. The first error of either sanitizer ends the run with its report. Leaks are not reported, because
Python itself has some. It needs GCC, CMake and ninja.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = sorted(map(str, (ROOT / "tests").glob("**/test_*_cpu.py")))
CHILD = "--library-folder="


def main(arguments: list[str]) -> int:
    if arguments and arguments[0].startswith(CHILD):
        return run_tests(Path(arguments[0].removeprefix(CHILD)), arguments[1:])
    with tempfile.TemporaryDirectory() as scratch:
        build, libraries = Path(scratch, "build"), Path(scratch, "lib")
        quietly("cmake", "--preset", "asan", "-B", build, "-D", "CMAKE_CXX_COMPILER=g++")
        quietly("cmake", "--build", build)
        quietly("cmake", "--install", build, "--prefix", libraries, "--component", "runtime")
        # AddressSanitizer looks up the function that throws C++ exceptions at the start, and torch needs it.
        runtimes = [library_of_gcc(name) for name in ("libasan.so", "libstdc++.so")]
        environment = os.environ | {
            "LD_PRELOAD": " ".join(runtimes),
            "ASAN_OPTIONS": "detect_leaks=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        }
        command = [sys.executable, __file__, f"{CHILD}{libraries}", *arguments]
        return subprocess.run(command, cwd=ROOT, env=environment).returncode


def library_of_gcc(name: str) -> str:
    command = ["g++", f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def quietly(*command: object) -> None:
    """Run a command, and show its output if it fails."""
    ran = subprocess.run([*map(str, command)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if ran.returncode:
        sys.exit(f"{ran.stdout}{command[0]} failed")


def run_tests(libraries: Path, arguments: list[str]) -> int:
    import pytest

    from mova_kernels import _compiled

    _compiled._DIRECTORY = libraries
    _compiled._cpu = _compiled._load_cpu()
    if _compiled.cpu_reason() is not None:
        sys.exit(_compiled.cpu_reason())
    # If pytest captured file descriptors, the reports of the sanitizers would be lost.
    return pytest.main(["-q", "--capture=sys", "-p", "no:cacheprovider", *TESTS, *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
