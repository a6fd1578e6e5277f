"""The benchmarks measure what they say: right baselines only, nothing silently absent, FLOPs as torch counts them."""

from __future__ import annotations

import ast
import functools
import graphlib
import importlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import baselines, machine, runner
from benchmarks import race as racing
from benchmarks.cases import BOTH, FORWARD, TINY
from benchmarks.race import race
from benchmarks.runner import LocalRunner, RemoteRunner, launches_and_syncs, relative_error, worst_error
from benchmarks.suite import Draw, Inputs, Suite, Variant, Work, find, listed
from mova_kernels import backends

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
MODULES = sorted(".".join(p.relative_to(ROOT).with_suffix("").parts) for p in (ROOT / "benchmarks").rglob("bench_*.py"))
SUITES = [importlib.import_module(module).SUITE for module in MODULES]
each_suite = pytest.mark.parametrize("suite", SUITES, ids=lambda s: s.name)
SMALL = replace(TINY, dtype="fp32")


@each_suite
def test_another_process_finds_the_suite_itself(suite) -> None:
    assert find(suite.module) is suite


def test_modules_import_each_other_in_one_direction() -> None:
    """Imports for type checkers count."""
    paths = {p.stem: p for p in (ROOT / "benchmarks").glob("*.py")}
    graph = {}
    for name, path in paths.items():
        nodes = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom) and n.level == 1]
        graph[name] = {n.module or alias.name for n in nodes for alias in n.names} & set(paths)
    assert graph["bench_adapter"] >= {"baselines", "cases", "suite"}
    graphlib.TopologicalSorter(graph).prepare()


def test_every_op_has_a_suite() -> None:
    assert set(backends.ops()) <= {s.name for s in SUITES}


@each_suite
def test_every_backend_is_a_variant_and_case_names_are_unique(suite) -> None:
    names = [str(case) for case in suite.cases]
    assert len(names) == len(set(names))
    for backend in backends.explain().get(suite.name, ()):
        assert suite.variants[backend].ours


@pytest.mark.parametrize(
    ("suite", "name"),
    [(s, n) for s in SUITES for n, v in s.variants.items() if not v.ours and v.in_fp32],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_baselines_are_right(suite, name) -> None:
    suite.verify(suite.variants[name], CPU)


def test_flex_attention_visits_the_blocks_of_a_pair_and_no_others() -> None:
    """Compiled, it skips what is not listed and does not ask the mask about the rest; uncompiled it ignores blocks."""
    found = baselines.pair_mask(3, 2 * baselines.FLEX_BLOCK["cpu"], CPU).to_dense()[0, 0]
    assert torch.equal(found.bool(), torch.block_diag(*[torch.ones(2, 2)] * 3).bool())


@each_suite
def test_every_variant_on_a_small_case_in_both_directions(suite) -> None:
    """The inputs of every suite fit all its variants, and the truth judges them to be right."""
    for direction in (FORWARD, BOTH):
        case = replace(SMALL, direction=direction)
        expected = LocalRunner(suite.module, case, None, CPU).values(suite.truth, wide=True)
        for name, variant in suite.variants.items():
            graphed = variant.prepare.__name__ == "graphed"  # captured on a GPU alone, but computed anywhere
            if (variant.declines(case, CPU) and not graphed) or variant.prepare.__name__ == "compiled":
                continue
            found = LocalRunner(suite.module, case, name, CPU).values(variant.run)
            for what in found:
                for f, e in zip(found[what], expected[what], strict=True):
                    assert f.shape == e.shape and f.dtype == torch.float32, (name, what)
            assert relative_error(found["outputs"], expected["outputs"]) < 1e-5, name
            assert (worst_error(found["gradients"], expected["gradients"]) or 0) < 1e-4, name


def test_no_launches_are_reported_where_the_profiler_sees_none() -> None:
    assert launches_and_syncs(lambda: torch.ones(2) + 1) == (None, None)


@pytest.mark.parametrize(("said", "clock"), [("1980\n", 1980.0), ("[N/A]\n", None), (None, None)])
def test_clock_of_a_gpu_is_asked_of_nvidia_smi(monkeypatch, said, clock) -> None:
    def run(command, **options):
        if said is None:
            raise FileNotFoundError(command[0])
        assert command[:3] == ["nvidia-smi", "-i", "GPU-12ab"]
        return subprocess.CompletedProcess(command, 0, said, "")

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: SimpleNamespace(uuid="12ab"))
    monkeypatch.setattr(machine.subprocess, "run", run)
    assert machine.clock_mhz("cuda") == clock


calls = 0


def tired(y: torch.Tensor) -> torch.Tensor:
    """The third call, which is the first of those that count, fails."""
    global calls
    calls += 1
    return y if calls < 3 else y.no_such_method()


SUITE = Suite(
    __name__,
    "sums",
    [SMALL],
    lambda case, draw: (lambda x: Inputs(x=x, leaves=[x], reads=[x]))(draw(64, 64)),
    [
        Variant("official", lambda t: t.x.sum(0)),
        Variant("elsewhere", lambda t: t.x.sum(0), declines=lambda case, device: "it runs elsewhere"),
        Variant("another function", lambda t: t.x.sum(1)),
        Variant("dies", lambda t: os.kill(os.getpid(), signal.SIGKILL) if t.x.dtype == torch.float32 else t.x.sum(0)),
    ],
    lambda case: Work(),
    truth=lambda t: t.x.sum(0),
    ours=[
        Variant("right", lambda t: t.x.T.sum(1), ours=True),
        Variant("wrong", lambda t: t.x.sum(0) * 1.001, ours=True),
        Variant("broken", lambda t: t.x.no_such_method(), ours=True),
        Variant("gets tired", lambda t: tired(t.x.sum(0)), ours=True),
    ],
)


@pytest.fixture
def quick_rounds(monkeypatch) -> None:
    monkeypatch.setattr(runner, "WARM_UP_SECONDS", 0)
    monkeypatch.setattr(racing, "ROUNDS", (3, 3))


@pytest.mark.parametrize("start", [RemoteRunner, LocalRunner])
def test_only_what_is_right_gets_a_time_and_nothing_is_lost(start, monkeypatch, quick_rounds) -> None:
    """On a CPU in processes of their own, on a GPU in this one."""
    names = [n for n in SUITE.variants if start is RemoteRunner or n != "dies"]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(ROOT), str(ROOT / "tests"))))
    results = race(SUITE, SMALL, names, CPU, 0, start=start)
    assert list(results) == names
    for name in ("official", "right"):
        r = results[name]
        assert (r.outcome, len(r.seconds)) == ("measured", 3), r
        assert min(r.seconds) > 0 and r.error < 1e-6 and r.gradient_error < 1e-6 and r.moved > 64 * 64 * 4
    reasons = {name: (r.outcome, r.reason) for name, r in results.items() if r.outcome != "measured"}
    assert reasons["elsewhere"] == ("skipped", "it runs elsewhere")
    assert reasons["another function"][0] == "failed" and "computes something else" in reasons["another function"][1]
    assert reasons["wrong"][0] == "failed" and "error 0.00" in reasons["wrong"][1]
    assert reasons["gets tired"][0] == "failed" and "no_such_method" in reasons["gets tired"][1]
    assert reasons["broken"][0] == "failed" and "no_such_method" in reasons["broken"][1]
    assert start is LocalRunner or (reasons["dies"][0] == "skipped" and "killed" in reasons["dies"][1])


def test_without_a_truth_nothing_is_reported(monkeypatch, quick_rounds) -> None:
    monkeypatch.setattr(SUITE, "truth", lambda t: t.x.no_such_method())
    results = race(SUITE, SMALL, ["official", "right"], CPU, 0, start=LocalRunner)
    assert {(r.outcome, r.reason.partition(":")[0]) for r in results.values()} == {
        ("failed", "nothing to check against")
    }


@pytest.mark.parametrize(
    ("case", "device", "reason"),
    [
        (replace(SMALL, on_gpu=True), CPU, "it takes a GPU"),
        pytest.param(SMALL, torch.device("cuda"), "there is no CUDA device", marks=pytest.mark.skipif(
            torch.cuda.is_available(), reason="there is one")),
    ],
)  # fmt: skip
def test_without_a_gpu_its_cases_are_skipped_with_the_reason(case, device, reason) -> None:
    (result,) = race(SUITE, case, ["right"], device, 0).values()
    assert result.outcome == "skipped" and reason in result.reason


@pytest.mark.parametrize("direction", [FORWARD, BOTH])
@pytest.mark.parametrize("name", ["block", "expert_attention", "ragged_linear", "gated_combine", "linear"])
def test_flops_are_those_that_torch_counts(name, direction) -> None:
    """Of a ragged computation, without two things: torch stores scores, which we compute again for the backward pass;
    and for the gradients of affine parts in front of K and V it computes those of the frozen features.
    """
    suite = next(s for s in SUITES if s.name == name)
    case = replace(SMALL, direction=direction, side=16, width=256)
    inputs = suite.inputs(case, Draw(case, CPU))
    affine = {"block": lambda t: t.module.blocks[0].norm2.parameters(), "ragged_linear": lambda t: sum(t.affines, ())}
    without = set(map(id, affine.get(name, lambda t: ())(inputs)))
    leaves = [leaf.requires_grad_(direction == BOTH) for leaf in inputs.leaves if id(leaf) not in without]
    stored = functools.partial(baselines.ragged, attention=baselines.stored_scores)
    run = stored if name == "block" else suite.variants["official"].run
    with FlopCounterMode(display=False) as counter:
        outs = listed(run(inputs))
        if direction == BOTH:
            torch.autograd.grad(outs, leaves, [torch.ones_like(o) for o in outs], allow_unused=True)
    expected, _ = suite.work(case).of(direction)
    attentions = {"block": int(case.selected.sum()) + case.samples, "expert_attention": int(case.selected.sum())}
    if direction == BOTH:
        expected -= 2 * attentions.get(name, 0) * case.side**4 * case.width
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.02)  # the gate does not count


INTERRUPTING = """
import os, signal

def pytest_runtest_logfinish(location):
    if "official" in location[2]:
        os.kill(os.getpid(), signal.SIGTERM)
"""


def test_a_session_that_is_stopped_keeps_what_it_measured(tmp_path) -> None:
    """With what was skipped, the machine and the versions: everything that the report needs."""
    (tmp_path / "interrupting.py").write_text(INTERRUPTING)
    results = tmp_path / "results.json"
    command = [sys.executable, "-m", "pytest", "benchmarks", "-p", "interrupting", "--benchmark-only", "--device=cpu"]
    command += ["-k", "expert_gate and fp32-forward- and (official or triton)", f"--benchmark-json={results}"]
    paths = os.pathsep.join((str(tmp_path), str(ROOT)))
    # The session is not a worker of pytest-xdist, even if this test runs in one.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_XDIST")}
    ran = subprocess.run(command, cwd=ROOT, env=environment | {"PYTHONPATH": paths}, capture_output=True, text=True)
    assert ran.returncode == pytest.ExitCode.INTERRUPTED, ran.stdout
    found = json.loads(results.read_text())
    (entry,) = found["benchmarks"]
    info = entry["extra_info"]
    assert (info["suite"], info["variant"], info["plain"], info["dtype"]) == ("expert_gate", "official", True, "fp32")
    assert entry["stats"]["rounds"] >= 3 and 0 < entry["stats"]["median"] < 1 and info["error"] < 1e-6
    assert [(m["variant"], m["outcome"]) for m in found["missing"]] == [("triton", "skipped")]
    assert "cuda tensors" in found["missing"][0]["reason"]
    assert found["machine"]["peaks"]["flops"]["fp32"] > 1e9 and found["versions"]["torch"] == torch.__version__


def test_a_limit_is_measured_however_long_a_call_takes(monkeypatch):
    monkeypatch.setattr(machine, "SECONDS", 0)
    assert 0 < machine.shortest_seconds(lambda: None, "cpu") < 1
