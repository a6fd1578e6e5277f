"""The tools find what they should: baselines, limits, tables and reports."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time

import gpu_check
import gpu_status
import instruction_counts
import pytest
import torch
from sass import loop_instructions


def listing(*instructions: str) -> str:
    """As cuobjdump prints it; 16 bytes per instruction, an encoding behind and below each."""
    return "\t\tFunction : _kernel\n" + "".join(
        f"        /*{16 * i:04x}*/     {text} ;      /* 0x0000000000007918 */\n          /* 0x000fe20000000000 */\n"
        for i, text in enumerate(instructions)
    )


SASS = {
    "straight code, and the branch to itself that ends every kernel": (0, ["FFMA R0, R1, R2, R3", "EXIT", "BRA 0x20"]),
    "a loop": (3, ["NOP", "FFMA R0, R1, R2, R3", "NOP", "@!P0 BRA 0x10", "EXIT"]),
    "a branch on a uniform predicate falls through": (2, ["NOP", "NOP", "BRA.U !UP0, 0x10", "EXIT"]),
    "a branch without condition does not": (2, ["BRA 0x20", "NOP", "FADD R0, R1, R2", "BRA 0x20", "NOP", "BRA 0x10"]),
    "the loop with the matrix instructions, not the longest": (
        2,
        ["NOP", "NOP", "NOP", "@P0 BRA 0x0", "HMMA.16816.F32 R0, R1, R2, R0", "@!P0 BRA 0x40", "EXIT"],
    ),
    "of nested loops the inner one, which computes more": (
        3,
        ["FADD R0, R1, R2", "FFMA R0, R1, R2, R0", "FFMA R0, R1, R2, R0", "@P0 BRA 0x10", "@P1 BRA 0x0", "EXIT"],
    ),
    "a wait behind the end belongs to the loop, its own repetition does not": (
        5,  # 0x10 to 0x40, and the jump back
        [
            "NOP", "SYNCS.PHASECHK P0", "@!P0 BRA 0x60", "UTCHMMA gdesc[UR4], tmem[UR10]", "@P1 BRA 0x10", "EXIT",
            "SYNCS.PHASECHK P0", "@!P0 BRA 0x60", "BRA 0x30",
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SASS)
def test_loop_instructions(name):
    expected, instructions = SASS[name]
    assert loop_instructions(listing(*instructions)) == expected


@pytest.fixture
def gate():
    pytest.importorskip("triton")
    import compile_gate

    return compile_gate


DOT = "%2 = tt.dot %a, %b, %c{} : tensor<64x32x{}> * tensor<32x64x{}> -> tensor<64x64xf32> loc(#loc)\n"


@pytest.mark.parametrize(
    ("ttir", "ptx", "expected"),
    [
        ("%0 = arith.addf %a, %b : tensor<64xf32>", "add.f32 %f1, %f2, %f3;", ("-", "-")),
        (DOT.format("", "f32", "f32"), "fma.rn.f32 %f1, %f2, %f3, %f1;", ("fma", "fma")),
        (DOT.format("", "bf16", "bf16"), "wgmma.mma_async.sync.aligned.m64n64k16.f32", ("wgmma", "matrix")),
        (DOT.format("", "f32", "f32"), "tcgen05.mma.cta_group::1.kind::tf32", ("tcgen05", "fma")),
        (DOT.format(", inputPrecision = tf32", "f32", "f32"), "mma.sync.aligned.m16n8k8", ("mma", "matrix")),
        (DOT.format("", "f32", "f32") + DOT.format("", "f16", "f16"), "mma.sync.aligned", ("mma", "matrix")),
    ],
    ids=["no dot", "fp32", "bf16", "TF32 in spite of fp32", "TF32", "fp32 and fp16"],
)
def test_matrix_instructions_are_recognised(gate, ttir, ptx, expected):
    assert tuple(gate.matrix(ttir, ptx).values()) == expected


GOOD = {
    "op": "o", "case": "c", "kernel": "k", "sm": 90,
    "registers": 99, "local": 0, "shared": 1 << 10, "loop": 7, "fused": True, "fenced": True,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, None),
        ({"local": 8}, "spills"),
        ({"local": 8, "sm": 100}, None),
        ({"local": 80, "sm": 100}, "spills"),
        ({"shared": 228 << 10}, "too much shared memory"),
        ({"shared": 200 << 10, "sm": 80}, "too much shared memory"),
        ({"matrix": "mma"}, "no wgmma"),
        ({"matrix": "mma", "sm": 80}, None),
        ({"matrix": "fma", "sm": 100}, "no matrix instruction"),
        ({"matrix": "fma", "asked": "fma"}, None),
        ({"matrix": "tcgen05", "asked": "fma", "sm": 100}, "not fp32"),
        ({"matrix": "-", "asked": "-"}, None),
        ({"fenced": False}, "no fence"),
        ({"op": "swiglu_norm"}, "fuses products"),
        ({"op": "swiglu_norm", "fused": False}, None),
        ({"op": "expert_attention", "kernel": "wide_grad_q"}, "fuses products"),
        ({"op": "expert_attention", "kernel": "grad_q"}, None),
    ],
)
def test_complaints(gate, changed, expected):
    assert gate.complaint({**GOOD, "matrix": "wgmma", "asked": "matrix", **changed}) == expected


COPY, FENCE = "cp.async.cg.shared.global [%r1], [%rd1], 16;", "fence.proxy.async.shared::cta;"
WGMMA, TCGEN05 = "wgmma.mma_async.sync.aligned", "tcgen05.mma.cta_group::1"


@pytest.mark.parametrize(
    ("version", "ptx", "expected"),
    [
        ("3.9", WGMMA, False),
        ("3.9", FENCE + WGMMA, True),
        ("3.9", COPY + FENCE + WGMMA, True),
        ("3.6", FENCE + WGMMA, True),
        ("3.6", COPY + FENCE + WGMMA, False),
        ("3.6", COPY + FENCE + TCGEN05, False),
        ("3.6", COPY + "mma.sync.aligned", True),
    ],
)
def test_fences_are_recognised(gate, monkeypatch, version, ptx, expected):
    monkeypatch.setattr(gate, "VERSION", version)
    assert gate.fenced(ptx) is expected


def test_an_allowed_complaint_is_none(gate, monkeypatch):
    row = {**GOOD, "matrix": "fma", "asked": "matrix", "sm": 80}
    monkeypatch.setattr(gate, "ALLOWED", {("^o .* sm_80$", "no matrix instruction"): "for this test"})
    assert gate.complaint(row) is None
    assert gate.complaint({**row, "local": 8}) == "spills"


def test_changes(gate):
    before = [{**GOOD, "matrix": "mma", "kernel": kernel} for kernel in ("same", "better", "worse", "dropped")]
    after = [
        before[0],
        {**before[1], "registers": 98},
        {**before[2], "registers": 98, "matrix": "wgmma"},
        {**before[0], "kernel": "added"},
    ]
    assert gate.changes(before, after) == (
        ["o c dropped sm_90: gone", "o c worse sm_90: registers 99 -> 98, matrix mma -> wgmma"],
        ["o c added sm_90: new", "o c better sm_90: registers 99 -> 98"],
    )
    assert gate.changes(before, before) == ([], [])


@pytest.mark.parametrize(
    ("figures", "expected"),
    [
        ({}, False),
        ({"registers": 107}, False),
        ({"registers": 108}, True),
        ({"local": 8}, True),
        ({"shared": 1075}, False),
        ({"shared": 1076}, True),
        ({"loop": 105}, False),
        ({"loop": 106}, True),
        ({"registers": 8, "shared": 0, "loop": 0}, False),
        ({"matrix": "mma"}, True),
    ],
)
def test_what_is_worse(gate, figures, expected):
    was = {**GOOD, "matrix": "wgmma", "loop": 100}
    assert gate.is_worse(was, {**was, **figures}) == expected


def counted_calls() -> dict[str, list[tuple[str, str]]]:
    """For each compiler, instruction set and dtype of the baseline: (function, variant)."""
    found: dict[str, list[tuple[str, str]]] = {}
    for row in json.loads(instruction_counts.BASELINE.read_text()):
        name = f"{row['compiler']} {row['isa']} {row['dtype']}"
        found.setdefault(name, []).append((row["function"], row["variant"]))
    return found


def headers() -> str:
    return "".join(path.read_text() for path in sorted((instruction_counts.ROOT / "csrc").glob("*/*.h")))


@pytest.mark.parametrize("name", counted_calls())
def test_instructions_of_every_function_are_counted(name):
    declared = re.findall(r"^MK_API int (mk_\w+)\(const void\* args,", headers(), re.MULTILINE)
    assert {function for function, _ in counted_calls()[name]} == set(declared)


def test_comparison_of_instruction_counts():
    row = {"compiler": "c", "isa": "i", "variant": "-", "dtype": "d", "instructions": 1000}
    before = {"same": 1000, "within": 1000, "worse": 1000, "better": 1000, "gone": 1000}
    after = {"same": 1000, "within": 1020, "worse": 1021, "better": 979, "new": 1000}
    rows = ([{**row, "function": f, "instructions": n} for f, n in counts.items()] for counts in (before, after))
    assert instruction_counts.compare(*rows) == (
        [["i", "gone", "-", "d", "1000", "-", "gone"], ["i", "worse", "-", "d", "1000", "1021", "+2.1%"]],
        [["i", "better", "-", "d", "1000", "979", "-2.1%"], ["i", "new", "-", "d", "-", "1000", "new"]],
    )


def test_instruction_counts_without_valgrind(monkeypatch, capsys):
    monkeypatch.setattr(instruction_counts.shutil, "which", lambda name: None)
    assert instruction_counts.main([]) == 0
    assert "skipped: valgrind is not installed" in capsys.readouterr().out
    assert instruction_counts.main(["--require"]) != 0


def gpu_tests() -> list[str]:
    source = (gpu_status.ROOT / "tests" / "test_gpu.py").read_text()
    return re.findall(r"^def (test_\w+)", source, re.MULTILINE)


def test_every_gpu_test_says_which_kernel_it_is_about():
    for name in gpu_tests():
        assert gpu_status.kernel_of(name) or name.startswith("test_adapter_"), name


@pytest.mark.parametrize("kernel", gpu_status.kernels())
def test_every_kernel_has_a_gpu_test(kernel):
    assert kernel in map(gpu_status.kernel_of, gpu_tests())


def test_an_op_with_two_kinds_of_kernels(monkeypatch):
    monkeypatch.setattr(gpu_status, "kernels", lambda: ["a/*.cu", "a/triton_impl.py", "a_b/triton_impl.py"])
    names = ["test_a_of_rows", "test_a_in_triton_of_rows", "test_a_b_of_rows", "test_adapter_in_a_graph"]
    assert [gpu_status.kernel_of(n) for n in names] == [*gpu_status.kernels(), None]


def test_gpu_status_is_what_the_results_say():
    text = gpu_status.DOCUMENT.read_text()
    assert gpu_status.document(text) == text, "run tools/gpu_status.py"


TEST = "test_rope2d_in_triton_and_its_gradient[float32]"
KERNEL = "rope2d/triton_impl.py"


def report(outcome: str, **passed: dict) -> dict:
    return {
        "commit": "abc1234",
        "device": "NVIDIA-H200",
        "date": "2030-01-02",
        "tests": {TEST: {"outcome": outcome}},
        "benchmarks": [
            {"suite": "rope2d", "variant": variant, "direction": "forward", "rate": rate}
            for variant, rate in (("official", "1 TB/s"), ("triton", "3.1 TB/s"))
        ],
        "passed": {KERNEL: passed} if passed else {},
    }


EARLIER = {"commit": "0000000", "date": "2029-12-31", "rate": "forward 3 TB/s"}


@pytest.mark.parametrize(
    ("given", "row"),
    [
        ([], "| **never run** |  |"),
        ([report("skipped")], "| **never run** |  |"),
        ([report("passed", **EARLIER)], "| `0000000`, NVIDIA-H200, 2029-12-31 | forward 3 TB/s |"),
        ([report("failed")], "| **1 of 1 tests failed**: `abc1234`, NVIDIA-H200, 2030-01-02 |  |"),
        (
            [report("failed", **EARLIER)],
            "| `0000000`, NVIDIA-H200, 2029-12-31; **1 of 1 tests failed**: `abc1234`, NVIDIA-H200, 2030-01-02 "
            "| forward 3 TB/s |",
        ),
    ],
    ids=["no report", "skipped", "passed", "failed", "failed after it had passed"],
)
def test_table_of_gpu_status(given, row):
    (line,) = (line for line in gpu_status.table(given).splitlines() if f"`{KERNEL}`" in line)
    assert line.endswith(row)


def test_table_of_gpu_status_says_what_passed_on_the_emulator(monkeypatch, tmp_path):
    pytest.importorskip("triton")
    op, kernel = "tests/ops/test_rope2d_triton.py", "rope2d/triton_impl.py"
    outcomes = {f"{op}::test_a": "passed", f"{op}::test_b": "failed", "tests/test_emulated_cuda.py::test_c": "passed"}
    names = gpu_status.kernels()
    monkeypatch.setattr(gpu_status, "kernels", lambda: names)
    monkeypatch.setattr(gpu_status, "ROOT", tmp_path)
    gpu_status.write_emulated(str(tmp_path / "benchmarks/results/emulator/sm_90-triton-3.9.json"), "sm_90", outcomes)
    assert re.fullmatch(r"1 \([\d.]+\), \*\*1 failed\*\*", gpu_status.emulated_tests(kernel, "sm_90"))
    assert re.fullmatch(r"1 \([\d.]+\)", gpu_status.emulated_tests("feature_resample/*.cu", "sm_90"))
    assert gpu_status.emulated_tests(kernel, "sm_80") == "**no**"
    assert gpu_status.emulated_tests("swiglu_norm/triton_impl.py", "sm_90") == "**no**"


def test_gpu_check_names_missing_packages_at_once(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_check, "output_of", lambda *command: "NVIDIA H200")
    monkeypatch.setattr(gpu_check, "REQUIRED", ("torch", "no_such_package", "nor_this_one"))
    monkeypatch.setattr(gpu_check.sys, "argv", ["gpu_check.py", str(tmp_path / "results")])
    with pytest.raises(SystemExit, match="not installed: no_such_package, nor_this_one"):
        gpu_check.main()
    assert not (tmp_path / "results").exists()


def test_gpu_check_reads_outcomes(tmp_path):
    (tmp_path / "xml").write_text(
        '<testsuites><testsuite><testcase name="test_a" time="1.5"/>'
        '<testcase name="test_b" time="0"><skipped message="no GPU"/></testcase>'
        '<testcase name="test_c" time="2"><failure message="wrong">trace</failure></testcase>'
        '<testcase name="test_d" time="2"><error message="died">trace</error></testcase></testsuite></testsuites>'
    )
    assert gpu_check.outcomes(tmp_path / "xml") == {
        "test_a": {"outcome": "passed", "seconds": 1.5, "message": ""},
        "test_b": {"outcome": "skipped", "seconds": 0, "message": "no GPU"},
        "test_c": {"outcome": "failed", "seconds": 2, "message": "wrong"},
        "test_d": {"outcome": "failed", "seconds": 2, "message": "died"},
    }


def test_gpu_check_stops_what_takes_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "LIMITS", {"slow": 2})
    monkeypatch.setattr(gpu_check, "GRACE", 0.5)
    stubborn = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    start = time.monotonic()
    found = gpu_check.run("slow", tmp_path, "-c", stubborn)
    assert time.monotonic() - start < 30
    assert found["status"] == "failed" and found["output"].startswith("stopped at its limit")


def test_gpu_check_reports_what_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "LIMITS", {"part": 30})
    found = gpu_check.run("part", tmp_path, "-c", "import sys; print('out'); sys.exit('err')")
    assert found == {"status": "failed", "output": "exit 1\nout\nerr\n"}
    assert gpu_check.run("part", tmp_path, "-c", "print('out')") == {"status": "passed"}
    assert (tmp_path / "stdout").read_text() == "out\n"


def test_all_limits_of_gpu_check_are_under_nine_minutes():
    assert sum(gpu_check.LIMITS.values()) + 2 * gpu_check.GRACE * len(gpu_check.LIMITS) < 540


@pytest.mark.parametrize(
    ("info", "seconds", "expected"),
    [
        ({"flop": 4e12}, 0.01, "400 TFLOP/s"),
        ({"flop": None, "bytes": 4e9}, 0.001, "4 TB/s"),
        ({"bytes": 400}, 3e-5, "30 us"),
        ({}, 3e-5, "30 us"),
    ],
)
def test_rates(info, seconds, expected):
    assert gpu_check.rate(info, seconds) == expected


@pytest.mark.skipif(torch.backends.cuda.is_built(), reason="this torch is built with CUDA")
def test_dry_run_asks_for_a_torch_with_cuda():
    script = instruction_counts.ROOT / "tools" / "dry_run"
    found = subprocess.run([sys.executable, script, "-c", "pass"], capture_output=True, text=True)
    assert found.returncode == 1 and "is built without CUDA" in found.stderr
