"""What tools/kernel_counts.py counts and tools/predicted_times.py makes of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("triton")

import kernel_counts
import predicted_times
from predicted_times import GPUS, seconds_of

NONE = dict.fromkeys([*kernel_counts.KINDS, "macs", "wavefronts", "instructions"], 0)
NONE |= dict.fromkeys(["read", "written", "read_by_blocks", "written_by_blocks"], 0)


@pytest.mark.parametrize(
    ("opcode", "kind"),
    [
        ("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16", "matrix"),
        ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", "matrix"),
        ("tcgen05.mma.cta_group::1.kind::f16", "matrix"),
        ("wgmma.wait_group.sync.aligned", "synchronisation"),
        ("cp.async.wait_group", "synchronisation"),
        ("cp.async.cg.shared.global", "memory"),
        ("tcgen05.ld.sync.aligned.32x32b.x64.b32", "memory"),
        ("stmatrix.sync.aligned.m8n8.x4.shared.b16", "memory"),
        ("ex2.approx.ftz.f32", "special"),
        ("sqrt.rn.f32", "special"),
        ("mov.b32", "move"),
        ("setp.lt.f32", "control"),
        ("cvt.rn.bf16x2.f32", "convert"),
        ("fma.rn.f32", "float"),
        ("max.f32", "float"),
        ("mul.bf16x2", "float"),
        ("mad.lo.s32", "integer"),
        ("and.b32", "integer"),
    ],
)
def test_kinds(opcode, kind) -> None:
    assert kernel_counts.kind_of(opcode) == kind


def row(kernel: str, **figures) -> dict:
    return {
        "triton": "3.9",
        "sm": "sm_90",
        "samples": 1,
        "experts": 1,
        "direction": "forward",
        "kernel": kernel,
    } | figures


def test_comparison() -> None:
    before = [row(k, instructions=1000, ideal_sectors=100) for k in ("same", "within", "worse", "ideal", "gone")]
    after = [
        row("same", instructions=1000, ideal_sectors=100),
        row("within", instructions=1010, ideal_sectors=100),
        row("worse", instructions=1011, ideal_sectors=100),
        row("ideal", instructions=1000, ideal_sectors=200),
        row("new", instructions=1000, ideal_sectors=100),
    ]
    worse, others = kernel_counts.changes(before, after)
    assert [line.split(" K=1 ")[1] for line in worse] == [
        "forward gone: gone",
        "forward worse: instructions 1000 -> 1011",
    ]
    assert [line.split(" K=1 ")[1] for line in others] == [
        "forward ideal: ideal_sectors 100 -> 200",
        "forward new: new",
        "forward within: instructions 1000 -> 1010",
    ]


def test_every_op_with_kernels_is_counted_on_every_gpu() -> None:
    rows = json.loads(kernel_counts.BASELINE.read_text())
    triton = {file.parent.name for file in kernel_counts.ROOT.glob("mova_kernels/ops/*/triton_impl.py")}
    hopper = {file.parent.name for file in kernel_counts.ROOT.glob("csrc/*/*_sm90a.cu")}
    cuda = {f.parent.name for f in kernel_counts.ROOT.glob("csrc/*/*.cu") if f.parent.name != "common"} - hopper
    for gpu in kernel_counts.GPUS:
        found = {r["kernel"].split("/")[0] for r in rows if r["sm"] == gpu}
        if gpu == "sm_90a":  # what there is in Triton alone, or not for Hopper, is counted on sm_90
            assert {f"{op}.cu" for op in hopper} <= found and not hopper & found
        else:
            assert found == triton | {f"{op}.cu" for op in cuda}


# The counts of attention's forward pass follow from its sizes: two products of L x L x D for each head.
def test_attention_is_counted_in_full() -> None:
    rows = json.loads(kernel_counts.BASELINE.read_text())
    kernels = ("expert_attention/forward", "expert_attention.cu/attention_forward")
    found = [r for r in rows if r["kernel"] in kernels and (r["samples"], r["experts"]) == (1, 1)]
    assert {r["macs"] for r in found} == {2 * 16 * 2304 * 2304 * 64}
    assert all(r["special"] >= 16 * 2304 * 2304 / 32 for r in found)  # an exponential for each score


def test_bounds_of_known_work() -> None:
    gpu = GPUS["H200"]
    multiprocessors = gpu.multiprocessors
    full = {**NONE, "blocks": multiprocessors}
    assert seconds_of({**full, "macs": gpu.flops / 2}, gpu)["products"] == pytest.approx(1)
    assert seconds_of({**full, "read": gpu.memory / 4, "written": gpu.memory / 4}, gpu)["memory"] == pytest.approx(0.5)
    # 16 special functions and 4 instructions a clock on each multiprocessor
    clocks = gpu.clock * multiprocessors
    assert seconds_of({**full, "special": clocks * 16 / 32}, gpu)["special"] == pytest.approx(1)
    assert seconds_of({**full, "instructions": clocks * 4 + 7, "move": 7}, gpu)["issue"] == pytest.approx(1)
    # one block more than multiprocessors takes a second round
    more = {**full, "blocks": multiprocessors + 1, "macs": gpu.flops / 2 * (1 + 1 / multiprocessors)}
    assert seconds_of(more, gpu)["products"] == pytest.approx(2)


def test_a_gpus_clock_is_near_its_data_sheets() -> None:
    boost = {"A100": 1.41e9, "H100": 1.83e9, "H200": 1.83e9, "B200": 1.86e9}  # H100 and newer reach more without load
    for name, gpu in GPUS.items():
        assert gpu.clock == pytest.approx(boost[name], rel=0.02)


def test_the_document_says_what_the_counts_say() -> None:
    """tools/predicted_times.py was run after tools/kernel_counts.py --accept: attention's rate is the same."""
    rows = json.loads(kernel_counts.BASELINE.read_text())
    rate = predicted_times.attention_rate(
        [r for r in rows if r["sm"] == "sm_90" and r["triton"] == "3.9"], GPUS["H100"]
    )
    assert f"H100 {rate / 1e12:.0f}" in Path(predicted_times.DOCUMENT).read_text()
