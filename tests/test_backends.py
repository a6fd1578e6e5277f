"""Which backend runs: the order of the sources, requests that cannot be met, and the explanation."""

from __future__ import annotations

import warnings
from contextlib import nullcontext

import pytest
import torch

from mova_kernels import BackendError, _compiled, backends, ops, use_backend
from mova_kernels._triton import availability
from mova_kernels.backends import ENVIRONMENT_VARIABLE, Backend, choose, explain

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
F32, F64 = torch.float32, torch.float64
OP = "feature_resample"  # has all kinds of backends


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ops whose backends do not depend on what was built; nobody's environment."""
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(backends, "_TABLE", dict(backends._TABLE))
    for op in ("toy", "other_toy"):
        backends.register(
            op,
            Backend("cpu", lambda device, dtype: None if dtype == F32 else f"it takes float32, not {dtype}"),
            Backend("triton", lambda device, dtype: None if device.type == "cuda" else "it needs a GPU"),
            Backend("cuda", lambda device, dtype: None, only_when_asked=lambda device: "it is shy"),
        )


def test_auto_takes_the_first_that_accepts() -> None:
    assert choose("toy", None, CUDA, F32) == "triton"
    assert choose("toy", None, CPU, F32) == "cpu"
    assert choose("toy", None, CPU, F64) == "reference"


def test_auto_gives_every_reason_where_nothing_is_fit() -> None:
    unfit = {"cpu": "it is too wide", "reference": "it takes no such thing"}
    with pytest.raises(BackendError, match=r"no backend can run toy on cpu torch.float32: .*cpu: it is too wide; ref"):
        choose("toy", None, CPU, F32, unfit=unfit)


def test_a_caution_is_said_once_and_only_where_auto_takes_the_backend() -> None:
    backends.register("toy", Backend("triton", lambda device, dtype: None, caution="mind the gap"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose("toy", "triton", CUDA, F32) == "triton"
        assert choose("toy", "reference", CUDA, F32) == "reference"
    with pytest.warns(UserWarning, match="mind the gap"):
        assert choose("toy", None, CUDA, F32) == "triton"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose("toy", None, CUDA, F32) == "triton"


def test_auto_takes_triton_on_a_gpu_wherever_there_are_kernels(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    pytest.importorskip("triton")
    backends._warn.cache_clear()
    with pytest.warns(UserWarning, match="have not yet been tested on a GPU"):
        chosen = {op: choose(op, None, CUDA, torch.bfloat16) for op in backends.ops() if "toy" not in op}
    assert {op for op, name in chosen.items() if name != "triton"} == {
        "feature_resample"
    }  # the adapter has feature_norm


def test_argument_beats_use_backend_beats_environment_beats_auto(monkeypatch) -> None:
    assert choose("toy", None, CPU, F32) == "cpu"
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "reference")
    assert choose("toy", None, CPU, F32) == "reference"
    with use_backend("cuda"):
        assert choose("toy", None, CPU, F32) == "cuda"
        assert choose("toy", "cpu", CPU, F32) == "cpu"
        assert choose("toy", "auto", CPU, F32) == "cpu"
    assert choose("toy", None, CPU, F32) == "reference"


def test_asking_for_auto_overrules_the_environment(monkeypatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "reference")
    with use_backend("auto"):
        assert choose("toy", None, CPU, F32) == "cpu"


def test_environment_is_read_at_every_call_and_may_be_empty(monkeypatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "")
    assert choose("toy", None, CPU, F32) == "cpu"


@pytest.mark.parametrize("source", ["use_backend", "environment"])
def test_pairs_leave_other_ops_on_auto(source, monkeypatch) -> None:
    request = "toy=reference, other_toy=cuda"
    if source == "environment":
        monkeypatch.setenv(ENVIRONMENT_VARIABLE, request)
    with use_backend(request) if source == "use_backend" else nullcontext():
        backends.register("third_toy", Backend("cpu", lambda device, dtype: None))
        assert choose("toy", None, CPU, F32) == "reference"
        assert choose("other_toy", None, CPU, F32) == "cuda"
        assert choose("third_toy", None, CPU, F32) == "cpu"


def test_use_backend_nests_and_restores_after_an_exception() -> None:
    with use_backend("toy=reference"):
        with pytest.raises(KeyError), use_backend("toy=cuda"):
            raise KeyError
        assert choose("toy", None, CPU, F32) == "reference"
    assert choose("toy", None, CPU, F32) == "cpu"


def test_refused_request_changes_nothing() -> None:
    with pytest.raises(ValueError), use_backend("tritn"):
        raise AssertionError("never entered")
    assert choose("toy", None, CPU, F32) == "cpu"


CHOICES = "must be one of auto, triton, cuda, cpu, reference, got 'tritn'"


def test_unknown_names_are_answered_with_the_choices(monkeypatch) -> None:
    with pytest.raises(ValueError, match=f"backend {CHOICES}"):
        choose("toy", "tritn", CPU, F32)
    for request in ("tritn", "toy=tritn"):
        with pytest.raises(ValueError, match=f"request (for toy )?{CHOICES}"), use_backend(request):
            pass
    with pytest.raises(ValueError, match=r"request must name .*toy, .*got 'toi'"), use_backend("toi=cpu"):
        pass
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "tritn")
    with pytest.raises(ValueError, match=f"{ENVIRONMENT_VARIABLE} {CHOICES}"):
        choose("toy", None, CPU, F32)


def test_use_backend_refuses_a_backend_which_the_op_does_not_have() -> None:
    backends.register("third_toy")
    with pytest.raises(ValueError, match=r"third_toy.*triton"), use_backend("third_toy=triton"):
        pass


@pytest.mark.parametrize("source", ["argument", "use_backend", "environment"])
def test_explicit_request_is_never_replaced(source, monkeypatch) -> None:
    """Whoever asked: it runs, or it says why not."""
    reason = r"backend 'cpu' cannot run toy on cpu torch\.float64: it takes float32, not torch\.float64"
    with pytest.raises(BackendError, match=reason):
        if source == "argument":
            choose("toy", "cpu", CPU, F64)
        elif source == "use_backend":
            with use_backend("cpu"):
                choose("toy", None, CPU, F64)
        else:
            monkeypatch.setenv(ENVIRONMENT_VARIABLE, "cpu")
            choose("toy", None, CPU, F64)


def test_missing_implementation_is_a_reason() -> None:
    backends.register("third_toy")
    with pytest.raises(BackendError, match=r"cannot run third_toy .*no such implementation \(there are reference\)"):
        choose("third_toy", "cpu", CPU, F32)


def test_ops_obey() -> None:
    x = torch.zeros(1, 6, 4)
    for backend in ("cuda", "triton"):
        with pytest.raises(BackendError, match=f"backend '{backend}' cannot run {OP} on cpu torch.float32: it"):
            ops.feature_resample(x, (2, 3), (4, 4), backend=backend)
        with pytest.raises(BackendError), use_backend(backend):
            ops.feature_resample(x, (2, 3), (4, 4))


def test_auto_never_takes_cuda(monkeypatch) -> None:
    """Also where the library, the driver and the device are there."""
    monkeypatch.setattr(_compiled, "cuda_reason", lambda: None)
    for op in backends.ops():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert choose(op, None, CUDA, dtype) != "cuda"
    assert choose(OP, "cuda", CUDA, F32) == "cuda"
    assert explain(CUDA)[OP]["cuda"] != "runs"


def test_missing_libraries_are_the_reason(monkeypatch) -> None:
    monkeypatch.setattr(_compiled, "cpu_reason", lambda: "it was never built")
    monkeypatch.setattr(_compiled, "cuda_reason", lambda: "there is no driver")
    assert choose(OP, None, CPU, F32) == "reference"
    for backend, device, reason in (("cpu", CPU, "it was never built"), ("cuda", CUDA, "there is no driver")):
        assert explain(device)[OP][backend] == reason
        with pytest.raises(BackendError, match=reason):
            choose(OP, backend, device, F32)


@pytest.mark.parametrize("device", ["cpu", "cuda", "meta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_explanation_names_one_that_runs_and_reasons_for_the_others(device, dtype) -> None:
    answer = explain(device, dtype)
    assert tuple(answer) == backends.ops()
    for op, entries in answer.items():
        assert "reference" in entries
        running = [b for b, reason in entries.items() if reason == "runs"]
        assert running == [choose(op, None, torch.device(device), dtype)]
        assert all(entries.values())


def test_explanation_honours_requests() -> None:
    with use_backend("toy=reference"):
        answer = explain()["toy"]
        assert answer["reference"] == "runs"
        assert answer["cpu"] == "could run, but reference was chosen"
        assert answer["triton"] == "it needs a GPU"
    assert explain()["toy"] == {
        "triton": "it needs a GPU",
        "cuda": "it is shy",
        "cpu": "runs",
        "reference": "could run, but cpu was chosen",
    }


def test_explanation_of_a_request_that_cannot_be_met_has_nothing_that_runs() -> None:
    with use_backend("toy=triton"):
        assert "runs" not in explain()["toy"].values()
        assert explain()["toy"]["triton"] == "it needs a GPU"


def test_old_triton_is_refused_with_a_reason(monkeypatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(availability, "_version", lambda: (3, 5))
    assert availability.declines(CUDA, F32) == "it needs triton 3.6, not 3.5"


@pytest.mark.parametrize(
    ("version", "arch", "kind", "expected"),
    [
        ((3, 6), 80, "16-bit", 3),
        ((3, 6), 90, "16-bit", 1),
        ((3, 6), 100, "tf32", 1),
        ((3, 6), 90, "ieee", 3),
        ((3, 7), 90, "16-bit", 3),
    ],
)
def test_loops_are_not_pipelined_where_triton_forgets_fences(monkeypatch, version, arch, kind, expected) -> None:
    pytest.importorskip("triton")
    from mova_kernels._triton import device

    monkeypatch.setattr(device, "VERSION", version)
    monkeypatch.setattr(device, "target", lambda: arch)
    monkeypatch.setattr(device, "_warn_of_one_stage", lambda: None)
    assert device.stages_with_fences(3, kind) == expected
