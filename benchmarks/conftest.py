"""Options, selection and the results file of the benchmarks."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch

from . import machine
from .cases import Case
from .race import race
from .result import Result
from .suite import Suite

SECONDS = {"quick": 1.5, "full": 8.0}  # for all rounds of a case
MISSING = pytest.StashKey[list[dict[str, str]]]()  # the variants that were requested and not measured


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("mova_kernels")
    group.addoption("--quick", dest="full", action="store_false", default=False, help="minutes on a CPU (default)")
    group.addoption("--full", dest="full", action="store_true", help="every case")
    group.addoption("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")


def pytest_configure(config: pytest.Config) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt  # pytest then still writes the results so far

    signal.signal(signal.SIGTERM, interrupt)
    config.stash[MISSING] = []


def device_of(config: pytest.Config) -> torch.device:
    """The device on which this session measures."""
    return torch.device(config.getoption("device") or ("cuda" if torch.cuda.is_available() else "cpu"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[Any]) -> None:
    if config.getoption("full"):
        return
    kept = [i for i in items if not hasattr(i, "callspec") or getattr(i.callspec.params.get("case"), "quick", True)]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


@pytest.fixture(scope="session")
def races(request: pytest.FixtureRequest) -> Callable[[Suite, Case], dict[str, Result]]:
    """(suite, case) -> the results of all variants that this session requests, measured together at the first call."""
    found: dict[tuple[str, Case], dict[str, Result]] = {}
    config = request.config
    quick = not config.getoption("full")
    seconds = SECONDS["quick" if quick else "full"]

    def of(suite: Suite, case: Case) -> dict[str, Result]:
        key = (suite.name, case)
        if key not in found:
            specs = [i.callspec.params for i in request.session.items if getattr(i.module, "SUITE", None) is suite]
            names = [spec["variant"] for spec in specs if spec["case"] == case]
            found[key] = results = race(suite, case, names, device_of(config), seconds, quick)
            for name, result in results.items():
                if result.outcome != "measured":
                    kind = "ours" if suite.variants[name].ours else "baseline"
                    entry = {"suite": suite.name, "case": str(case), "variant": name, "kind": kind}
                    config.stash[MISSING].append({**entry, "outcome": result.outcome, "reason": result.reason})
        return found[key]

    return of


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    del machine_info["node"]  # a results file may be published


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    output_json["missing"] = config.stash[MISSING]
    output_json["machine"] = machine.describe(device_of(config).type)
    output_json["versions"] = machine.versions()
    output_json["commit_info"].pop("project", None)  # the folder's name
    for entry in output_json["benchmarks"]:
        entry["params"] = None  # cases and variants are in extra_info, in JSON's types
