"""A pytest plugin for tools/dry_run: shapes and devices are compared as usual, all numbers are accepted."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))

torch.backends.cudnn.enabled = False
torch.backends.cuda.enable_cudnn_sdp(False)


def alike(actual: torch.Tensor, expected: torch.Tensor) -> None:
    found, right = ((t.shape, t.device.type) for t in (actual, expected))
    assert found == right, f"{found} where {right} is expected"


def pytest_configure() -> None:
    import helpers

    import benchmarks.baselines
    import benchmarks.runner
    import benchmarks.suite
    from testing.golden import Golden

    def check_budget(name: str, actual: torch.Tensor, truth: torch.Tensor, plain: torch.Tensor, *_: object) -> None:
        alike(actual, truth)
        alike(plain, truth)

    def relative(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
        for f, e in zip(found, expected, strict=True):
            alike(f, e)
        return 0.0

    helpers.check_budget = check_budget
    Golden.check = lambda *_: None
    # Tests call x.any() on a whole tensor to ask whether anything changed.
    some, yes = torch.Tensor.any, torch.tensor(True)
    torch.Tensor.any = lambda self, *args, **options: (
        some(self, *args, **options) if args or options or not self.is_cuda else yes
    )
    torch.equal = lambda *_: True
    torch.testing.assert_close = lambda actual, expected, **_: alike(actual, expected)
    benchmarks.runner.relative_error = benchmarks.runner.worst_error = relative
    benchmarks.suite.Suite.verify_in_fp64 = lambda *_: None
    benchmarks.baselines.sdpa_kernel = lambda *_, **__: contextlib.nullcontext()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "whole_model" in item.name:
            item.add_marker(pytest.mark.skip(reason="generating text reads on the host what the GPU has computed"))
