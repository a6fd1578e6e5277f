"""Where launch configurations come from. No GPU: a fake clock says how long a configuration takes."""

from __future__ import annotations

import json

import pytest
import torch

from mova_kernels._triton import tuning
from mova_kernels._triton.tuning import bucket, tuned

GPU = torch.device("cuda", 0)
MILLISECONDS = {(1, 1): 3.0, (2, 1): 1.0, (4, 1): 2.0}
DEFAULT, *CANDIDATES = MILLISECONDS


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """A GPU of which nothing is known; ``machine`` is the folder of shipped configurations."""
    folder = tmp_path / "shipped"
    folder.mkdir()
    tuning._known.cache_clear()
    monkeypatch.delenv(tuning.VARIABLE, raising=False)
    monkeypatch.setattr(tuning, "SHIPPED", folder)
    monkeypatch.setattr(tuning, "device_name", lambda device: "GPU" if device.type == "cuda" else None)
    monkeypatch.setattr(tuning, "_milliseconds", lambda launch: launch())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    yield folder
    tuning._known.cache_clear()


@pytest.fixture
def launched():
    return []


@pytest.fixture
def ask(launched):
    def launch(config):
        launched.append(config)
        return MILLISECONDS[config]

    return lambda kernel="forward", device=GPU, candidates=CANDIDATES: tuned(
        "an_op", kernel, ("16-bit", 64, bucket(2304)), DEFAULT, candidates, launch, device
    )


def next_process():
    tuning._known.cache_clear()


@pytest.mark.parametrize(("size", "expected"), [(0, 1), (1, 1), (2, 2), (3, 4), (2304, 4096), (4096, 4096)])
def test_bucket(size, expected):
    assert bucket(size) == expected


@pytest.mark.parametrize("value", [None, "", "0"])
def test_nothing_is_searched_unasked(ask, launched, monkeypatch, value):
    if value is not None:
        monkeypatch.setenv(tuning.VARIABLE, value)
    assert ask() == DEFAULT
    assert not launched


def test_a_search_takes_the_fastest_once(ask, launched, monkeypatch, capsys):
    monkeypatch.setenv(tuning.VARIABLE, "1")
    assert ask() == ask() == (2, 1)
    assert launched == list(MILLISECONDS)
    assert "an_op forward 16-bit 64 4096: (2, 1), 1 ms; default (1, 1), 3 ms" in capsys.readouterr().err
    ask("backward")
    assert launched == 2 * list(MILLISECONDS)


def test_the_default_may_win(ask, monkeypatch):
    monkeypatch.setenv(tuning.VARIABLE, "1")
    monkeypatch.setitem(MILLISECONDS, DEFAULT, 0.5)
    assert ask() == DEFAULT


def test_what_does_not_run_loses_and_is_named(ask, monkeypatch, capsys):
    monkeypatch.setenv(tuning.VARIABLE, "1")
    assert ask(candidates=[(8, 1), (4, 1)]) == (4, 1)
    assert "(8, 1) does not run" in capsys.readouterr().err


def test_no_search_on_other_devices(ask, launched, monkeypatch):
    """Meta tensors in the compile gate, CPU tensors in Triton's interpreter."""
    monkeypatch.setenv(tuning.VARIABLE, "1")
    assert ask(device=torch.device("cpu")) == ask(device=torch.device("meta")) == DEFAULT
    assert not launched


def test_no_search_while_a_graph_is_captured(ask, launched, monkeypatch):
    monkeypatch.setenv(tuning.VARIABLE, "1")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert ask() == DEFAULT and not launched
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert ask() == (2, 1)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert ask() == (2, 1)  # known by now


def test_one_forgets(ask, launched, monkeypatch, machine):
    monkeypatch.setenv(tuning.VARIABLE, "1")
    ask()
    next_process()
    ask()
    assert len(launched) == 2 * len(MILLISECONDS)
    assert not list(machine.iterdir())


def test_a_directory_remembers(ask, launched, monkeypatch, tmp_path):
    monkeypatch.setenv(tuning.VARIABLE, str(tmp_path / "found"))
    ask("forward")
    next_process()
    ask("backward")
    launched.clear()
    next_process()
    assert ask("forward") == ask("backward") == (2, 1)
    assert not launched
    assert json.loads((tmp_path / "found" / "GPU.json").read_text()) == {
        "an_op backward 16-bit 64 4096": [2, 1],
        "an_op forward 16-bit 64 4096": [2, 1],
    }
    assert [f.name for f in (tmp_path / "found").iterdir()] == ["GPU.json"]


def test_what_a_search_wrote_can_be_shipped(ask, launched, monkeypatch, machine):
    monkeypatch.setenv(tuning.VARIABLE, str(machine))
    ask()
    monkeypatch.delenv(tuning.VARIABLE)
    next_process()
    launched.clear()
    assert ask() == (2, 1)
    assert ask("backward") == DEFAULT  # not in the file
    assert ask(device=torch.device("cpu")) == DEFAULT  # not this GPU
    assert not launched


def test_ones_own_directory_goes_before_what_was_shipped(ask, monkeypatch, machine, tmp_path):
    for folder, config in ((machine, (2, 1)), (tmp_path, (4, 1))):
        (folder / "GPU.json").write_text(json.dumps({"an_op forward 16-bit 64 4096": config}))
    assert ask() == (2, 1)
    monkeypatch.setenv(tuning.VARIABLE, str(tmp_path))
    assert ask() == (4, 1)


def test_expert_attention_launches_what_was_shipped(monkeypatch, machine):
    triton = pytest.importorskip("triton")
    from mova_kernels.ops.expert_attention import triton_impl

    if not isinstance(triton_impl._forward_kernel, triton.JITFunction):
        pytest.skip("TRITON_INTERPRET=1: nothing is launched")
    found = []
    monkeypatch.setattr(
        triton.JITFunction, "run", lambda self, *_, grid, warmup, **options: found.append((self.__name__, options))
    )
    monkeypatch.setattr(tuning, "device_name", lambda device: "GPU")
    monkeypatch.setattr(triton_impl, "stages_with_fences", lambda num_stages, kind: num_stages)  # asks for the driver

    def launches(length):
        q = torch.empty(2, length, 128, dtype=torch.bfloat16, device="meta")
        table = torch.empty(length, 64, device="meta")
        found.clear()
        triton_impl.forward(q, q, q, table, table, 2, None)
        return [
            [o["TILE"], o["STEP"], o["num_warps"], o["num_stages"]] for name, o in found if name == "_forward_kernel"
        ]

    (default,) = launches(2304)
    assert default == list(triton_impl.CONFIGS["16-bit", 64]["forward"])
    (machine / "GPU.json").write_text(json.dumps({"expert_attention forward 16-bit 64 4096": [64, 32, 4, 1]}))
    next_process()
    assert launches(2304) == launches(4096) == [[64, 32, 4, 1]]
    assert launches(2048) == [default]


def launches(version: tuple[int, int], length: int, dtype: torch.dtype, monkeypatch) -> list[tuple[str, dict]]:
    """What attention, forward and backward, would launch on sm_100 with a version of Triton: names and options."""
    triton = pytest.importorskip("triton")
    from mova_kernels.ops.expert_attention import triton_impl

    if not isinstance(triton_impl._forward_kernel, triton.JITFunction):
        pytest.skip("TRITON_INTERPRET=1: nothing is launched")
    found = []
    monkeypatch.setattr(
        triton.JITFunction, "run", lambda self, *_, grid, warmup, **options: found.append((self.__name__, options))
    )
    monkeypatch.setattr(triton_impl, "VERSION", version)
    monkeypatch.setattr(triton_impl, "target", lambda: 100)
    monkeypatch.setattr(triton_impl, "stages_with_fences", lambda num_stages, kind: num_stages)  # asks for the driver
    q, table = torch.empty(2, length, 128, dtype=dtype, device="meta"), torch.empty(length, 64, device="meta")
    lse = torch.empty(2, 2, length, device="meta")
    triton_impl.forward(q, q, q, table, table, 2, None)
    triton_impl.backward(q, q, q, q, q, lse, table, table, 2, None)
    return found


@pytest.mark.parametrize(("version", "tile"), [((3, 6), 32), ((3, 9), 64)], ids=["Triton 3.6", "Triton 3.9"])
def test_old_triton_gets_small_tiles_of_fp32_on_sm_100(version, tile, monkeypatch) -> None:
    found = launches(version, 200, torch.float32, monkeypatch)
    assert [options["TILE"] for name, options in found if name == "_forward_kernel"] == [tile]


def test_candidates_of_expert_attention_keep_to_the_rules():
    pytest.importorskip("triton")
    from mova_kernels.ops.expert_attention.triton_impl import CANDIDATES

    for (kind, width), kernels in CANDIDATES.items():
        for name, candidates in kernels.items():
            assert len(set(candidates)) == len(candidates) > 10
            for tile, step, _, stages in candidates:
                assert tile >= 64 or kind == "ieee"
                assert not (width == 32 and name != "forward" and {tile, step} == {64, 128} and stages == 2)


@pytest.mark.parametrize(("asked", "expected"), [("tf32", "tf32"), ("ieee", "ieee"), ("none", "ieee")])
def test_fp32_products_follow_torchs_switch(asked, expected) -> None:
    pytest.importorskip("triton")
    from mova_kernels._triton.device import dot_precision

    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = asked
    try:
        assert dot_precision() == expected
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize(("version", "length", "warps"), [((3, 6), 60, {4}), ((3, 9), 60, {8}), ((3, 6), 2304, {8})])
def test_old_triton_gets_four_warps_on_sm_100_where_the_loop_goes_round_once(
    version, length, warps, monkeypatch
) -> None:
    found = launches(version, length, torch.bfloat16, monkeypatch)
    main = ("_forward_kernel", "_grad_kv_kernel", "_grad_q_kernel")
    assert {options["num_warps"] for name, options in found if name in main} == warps
