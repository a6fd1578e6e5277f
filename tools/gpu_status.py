"""Writes the table of docs/gpu-status.md from what tools/gpu_check.sh has left in benchmarks/results/.

python tools/gpu_status.py
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "gpu-status.md"
BEGIN, END = "<!-- written by tools/gpu_status.py: -->\n", "<!-- end -->\n"
COMPILED = {
    "triton_impl.py": "sm_80, sm_90, sm_100 (`tools/compile_gate.py`)",
    "cuda": "sm_80, sm_90a, sm_100 (with PTX)",
}


def kernels() -> list[str]:
    """Every file with kernels: "expert_attention/triton_impl.py", "feature_resample/feature_resample.cu"."""
    found = [*ROOT.glob("mova_kernels/ops/*/triton_impl.py"), *ROOT.glob("csrc/*/*.cu")]
    return sorted(f"{file.parent.name}/{file.name}" for file in found if file.parent.name != "common")


def kernel_of(test: str) -> str | None:
    """The file that a test of tests/test_gpu.py is about: test_<op>_...; "_in_triton_" decides if an op has both."""
    op = max((k.split("/")[0] for k in kernels() if test.startswith(f"test_{k.split('/')[0]}_")), key=len, default="")
    files = [k for k in kernels() if k.startswith(f"{op}/")]
    preferred = [k for k in files if k.endswith(".py") == ("_in_triton_" in test)]
    return next(iter(preferred or files), None)


def verdict(kernel: str, report: dict) -> str | None:
    """ "passed", or what failed; None if nothing about this kernel has run."""
    outcomes = {name: t["outcome"] for name, t in report["tests"].items() if kernel_of(name) == kernel}
    failed = [name for name, outcome in outcomes.items() if outcome == "failed"]
    if failed:
        return f"{len(failed)} of {len(outcomes)} tests failed"
    return "passed" if "passed" in outcomes.values() else None


def rate(kernel: str, report: dict) -> str:
    op, variant = kernel.split("/")[0], "triton" if kernel.endswith(".py") else "cuda"
    found = [b for b in report["benchmarks"] if (b["suite"], b["variant"]) == (op, variant)]
    return ", ".join(f"{b['direction']} {b['rate']}" for b in found)


def table(reports: Iterable[dict]) -> str:
    lines = ["| kernels, forward and backward | compiled for | passed on a GPU | rate |", "|---|---|---|---|"]
    reports = list(reports)
    for kernel in kernels():
        passed, rates = [], []
        for report in reports:
            if last := report["passed"].get(kernel):
                passed.append(f"`{last['commit']}`, {report['device']}, {last['date']}")
                rates += [last["rate"]] * bool(last["rate"])
            now = verdict(kernel, report)
            if now not in ("passed", None):
                passed.append(f"**{now}**: `{report['commit']}`, {report['device']}, {report['date']}")
        compiled = COMPILED["triton_impl.py" if kernel.endswith(".py") else "cuda"]
        lines.append(f"| `{kernel}` | {compiled} | {'; '.join(passed) or '**never run**'} | {'; '.join(rates)} |")
    return "\n".join(lines) + "\n"


def reports() -> list[dict]:
    return [json.loads(f.read_text()) for f in sorted(ROOT.glob("benchmarks/results/*/gpu_check.json"))]


def document(text: str) -> str:
    """``text`` of docs/gpu-status.md with the table of today."""
    head, rest = text.split(BEGIN)
    return head + BEGIN + table(reports()) + END + rest.split(END)[1]


if __name__ == "__main__":
    DOCUMENT.write_text(document(DOCUMENT.read_text()))
    print(table(reports()), end="")
