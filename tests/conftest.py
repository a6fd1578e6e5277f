"""Settings for all tests: no cached graphs, fixed seeds, and memory whose leftovers nobody takes for results."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # a cached graph would test yesterday's code

import pytest
import torch

from mova_kernels import _compiled
from mova_kernels._triton import availability


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """One thread, which small tensors are fastest with on a busy machine; ``@pytest.mark.all_threads`` for the rest."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if request.node.get_closest_marker("all_threads") else 1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fill every fresh allocation with NaN (integers: the largest one), so that an element nobody wrote shows."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture(params=() if _compiled.cpu_reason() else _compiled.cpu_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set of this processor, one after the other; skips where there is no compiled library."""
    before = _compiled.cpu_isa()
    _compiled.set_cpu_isa(request.param)
    yield request.param
    _compiled.set_cpu_isa(before)


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "run the Triton kernels of *_triton tests compiled for this GPU, on the emulator (tools/emulator)"
    parser.addoption("--gpu", choices=("sm_80", "sm_90", "sm_100"), help=text)
    parser.addoption("--gpu-report", help="with --gpu: write what passed into this file, for tools/gpu_status.py")


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    path = config.getoption("--gpu-report")
    if path and not hasattr(config, "workerinput"):
        import gpu_status

        outcomes = {
            report.nodeid: outcome
            for outcome in ("passed", "failed", "error")
            for report in terminalreporter.stats.get(outcome, ())
        }
        gpu_status.write_emulated(path, config.getoption("--gpu"), outcomes)


@pytest.fixture
def triton_kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton kernels run on CPU tensors: interpreted if TRITON_INTERPRET is 1, compiled with ``--gpu``; else it skips.

    Both are stricter than a GPU: see interpreter.py and tools/emulator.
    """
    gpu, interpreted = request.config.getoption("--gpu"), os.environ.get("TRITON_INTERPRET") == "1"
    if not gpu and not interpreted:
        pytest.skip("neither TRITON_INTERPRET=1 nor --gpu is given")
    if gpu and interpreted:
        pytest.fail("TRITON_INTERPRET=1 and --gpu exclude each other")
    pytest.importorskip("triton")
    if interpreted:
        from interpreter import strict

        monkeypatch.setattr(availability, "INTERPRETED_DTYPES", availability.DTYPES)
        with strict():
            yield
    else:
        from emulated_gpu import compiled_on_cpu_tensors

        with compiled_on_cpu_tensors(gpu):
            yield


@pytest.fixture
def compiled(request: pytest.FixtureRequest, triton_kernels: None) -> None:
    """As ``triton_kernels``, but for tests at official sizes, which would take the interpreter an hour."""
    if not request.config.getoption("--gpu"):
        pytest.skip("--gpu is not given")
