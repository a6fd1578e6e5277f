"""The tools judge kernels; here they are judged."""

from __future__ import annotations

import pytest
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


GOOD = {"op": "o", "case": "c", "kernel": "k", "sm": 90, "registers": 99, "local": 0, "shared": 1 << 10, "loop": 7}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, None),
        ({"local": 8}, "spills"),
        ({"shared": 228 << 10}, "too much shared memory"),
        ({"shared": 200 << 10, "sm": 80}, "too much shared memory"),
        ({"matrix": "mma"}, "no wgmma"),
        ({"matrix": "mma", "sm": 80}, None),
        ({"matrix": "fma", "sm": 100}, "no matrix instruction"),
        ({"matrix": "fma", "asked": "fma"}, None),
        ({"matrix": "tcgen05", "asked": "fma", "sm": 100}, "not fp32"),
        ({"matrix": "-", "asked": "-"}, None),
    ],
)
def test_complaints(gate, changed, expected):
    assert gate.complaint({**GOOD, "matrix": "wgmma", "asked": "matrix", **changed}) == expected


def test_an_allowed_complaint_is_none(gate, monkeypatch):
    row = {**GOOD, "matrix": "fma", "asked": "matrix", "sm": 80}
    monkeypatch.setattr(gate, "ALLOWED", {("^o .* sm_80$", "no matrix instruction"): "for this test"})
    assert gate.complaint(row) is None
    assert gate.complaint({**row, "local": 8}) == "spills"


def test_changes(gate):
    before = [{**GOOD, "matrix": "mma", "kernel": kernel} for kernel in ("same", "other", "dropped")]
    after = [before[0], {**before[1], "registers": 98, "matrix": "wgmma"}, {**before[0], "kernel": "added"}]
    assert gate.changes(before, after) == [
        "o c added sm_90: new",
        "o c dropped sm_90: gone",
        "o c other sm_90: registers 99 -> 98, matrix mma -> wgmma",
    ]
    assert gate.changes(before, before) == ["nothing"]
