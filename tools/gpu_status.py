"""Writes the table of docs/gpu-status.md from the results on GPUs and on the emulator in benchmarks/results/.

    python tools/gpu_status.py

tools/gpu_check.sh writes the results of a GPU there. Those of the emulator (tools/emulator), one file for each
architecture and version of Triton, come from

    pytest tests -k "triton or cuda" --gpu sm_90 --gpu-report benchmarks/results/emulator/sm_90-triton-3.9.json
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "gpu-status.md"
BEGIN, END = "<!-- written by tools/gpu_status.py: -->\n", "<!-- end -->\n"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")


def kernels() -> list[str]:
    """The kernels of each op, by their files: "expert_attention/triton_impl.py", "expert_attention/*.cu"."""
    triton = {f"{file.parent.name}/triton_impl.py" for file in ROOT.glob("mova_kernels/ops/*/triton_impl.py")}
    cuda = {f"{file.parent.name}/*.cu" for file in ROOT.glob("csrc/*/*.cu") if file.parent.name != "common"}
    return sorted(triton | cuda)


def kernel_of(test: str) -> str | None:
    """The kernels that a test of tests/test_gpu.py (test_<op>_...) runs; "_in_triton_" if an op has two kinds."""
    op = max((k.split("/")[0] for k in kernels() if test.startswith(f"test_{k.split('/')[0]}_")), key=len, default="")
    files = [k for k in kernels() if k.startswith(f"{op}/")]
    preferred = [k for k in files if k.endswith(".py") == ("_in_triton_" in test)]
    return next(iter(preferred or files), None)


def verdict(kernel: str, report: dict) -> str | None:
    """The verdict, which is "passed" or the tests that failed; None if no test of this kernel has run."""
    outcomes = {name: t["outcome"] for name, t in report["tests"].items() if kernel_of(name) == kernel}
    failed = [name for name, outcome in outcomes.items() if outcome == "failed"]
    if failed:
        return f"{len(failed)} of {len(outcomes)} tests failed"
    return "passed" if "passed" in outcomes.values() else None


def rate(kernel: str, report: dict) -> str:
    op, variant = kernel.split("/")[0], "triton" if kernel.endswith(".py") else "cuda"
    found = [b for b in report["benchmarks"] if (b["suite"], b["variant"]) == (op, variant)]
    return ", ".join(f"{b['direction']} {b['rate']}" for b in found)


def write_emulated(path: str, gpu: str, outcomes: dict[str, str]) -> None:
    """Write the number of tests that passed, and the names of those that failed, for each file of kernels."""
    import triton

    found: dict[str, dict] = {}
    for name, outcome in outcomes.items():
        test = name.split("::")[0].rsplit("/", 1)[-1].removesuffix(".py")  # test_<op>_triton
        kernel = kernel_of(test.replace("_triton", "_in_triton_"))
        if test.startswith("test_emulated_cuda"):
            kernel = "feature_resample/*.cu"
        if kernel is not None:
            result = found.setdefault(kernel, {"passed": 0, "failed": []})
            if outcome == "passed":
                result["passed"] += 1
            else:
                result["failed"].append(name)
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    triton_version = ".".join(triton.__version__.split(".")[:2])
    report = {"gpu": gpu, "triton": triton_version, "commit": commit, "kernels": dict(sorted(found.items()))}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(report, indent=1) + "\n")


def emulated() -> list[dict]:
    """The reports of the emulator, by architecture and by version of Triton."""
    found = [json.loads(file.read_text()) for file in ROOT.glob("benchmarks/results/emulator/*.json")]
    return sorted(found, key=lambda report: (int(report["gpu"][3:]), report["triton"]))


def emulated_tests(kernel: str, gpu: str) -> str:
    """ "40 (3.9)": how many tests passed compiled for this architecture, with which Triton; and how many failed."""
    cells = []
    for report in emulated():
        result = report["kernels"].get(kernel)
        if report["gpu"] == gpu and result is not None:
            failed = f", **{len(result['failed'])} failed**" if result["failed"] else ""
            cells.append(f"{result['passed']} ({report['triton']}){failed}")
    return ", ".join(cells) or "**no**"


def table(reports: Iterable[dict]) -> str:
    heads = ("kernels, forward and backward", *ARCHITECTURES, "passed on a GPU", "rate")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
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
        ran = "; ".join(passed) or "**never run**"
        cells = " | ".join(emulated_tests(kernel, gpu) for gpu in ARCHITECTURES)
        lines.append(f"| `{kernel}` | {cells} | {ran} | {'; '.join(rates)} |")
    sources = (f"{report['gpu']} with Triton {report['triton']} at `{report['commit']}`" for report in emulated())
    return "\n".join(lines) + f"\n\nCommits of the emulator's results: {', '.join(sources)}.\n"


def reports() -> list[dict]:
    return [json.loads(f.read_text()) for f in sorted(ROOT.glob("benchmarks/results/*/gpu_check.json"))]


def document(text: str) -> str:
    """``text`` of docs/gpu-status.md with the table of today."""
    head, rest = text.split(BEGIN)
    return head + BEGIN + table(reports()) + END + rest.split(END)[1]


if __name__ == "__main__":
    DOCUMENT.write_text(document(DOCUMENT.read_text()))
    print(table(reports()), end="")
