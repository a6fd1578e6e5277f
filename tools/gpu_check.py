"""Build, test and measure on a machine with a GPU: run it as ``tools/gpu_check.sh [DIRECTORY]``.

It needs no network. It writes gpu_check.json into DIRECTORY (default: benchmarks/results/<device>), and prints it as
tables. ``tools/gpu_status.py`` then writes docs/gpu-status.md. A part that fails does not stop the others; the exit
status is then 1. A part that takes longer than its limit is stopped. All limits together are under nine minutes.

Where there is no git, the environment variable MOVA_COMMIT names the commit.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from xml.etree import ElementTree

import gpu_status

ROOT = gpu_status.ROOT
REQUIRED = (
    "torch",
    "triton",
    "huggingface_hub",
    "safetensors",
    "numpy",
    "pytest",
)  # the parts cannot run without
LIMITS = {"build": 50, "environment": 15, "tests": 170, "sanitizer": 60, "demo": 40, "benchmarks": 140}  # seconds
GRACE = 5  # seconds for an interrupted part to write its results, and for a killed one to end


def main() -> int:
    device = output_of("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").split("\n")[0]
    if not device:
        sys.exit("no CUDA device: nvidia-smi names none")
    missing = [name for name in REQUIRED if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"not installed: {', '.join(missing)}; docs/gpu-status.md says how to bring packages along")
    device = "-".join(device.replace("/", " ").split())
    file = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "benchmarks" / "results" / device) / "gpu_check.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(file.read_text()) if file.exists() else {}
    report = {
        "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%F"),
        "device": device,
        "parts": {},
        "environment": {},
        "tests": {},
        "benchmarks": [],
        "passed": before.get("passed", {}),
    }
    for part in (build, environment, tests, sanitizer, demo, benchmarks):
        start = time.monotonic()
        try:
            with tempfile.TemporaryDirectory() as folder:
                outcome = part(report, Path(folder))
        except Exception as error:
            outcome = {"status": "failed", "output": f"{type(error).__name__}: {error}"}
        report["parts"][part.__name__] = {**outcome, "seconds": round(time.monotonic() - start, 1)}
        print(f"{part.__name__}: {outcome['status']}", flush=True)
        file.write_text(json.dumps(report, indent=1) + "\n")
    for kernel in gpu_status.kernels():
        if gpu_status.verdict(kernel, report) == "passed":
            found = {"commit": report["commit"], "date": report["date"], "rate": gpu_status.rate(kernel, report)}
            report["passed"][kernel] = found
    file.write_text(json.dumps(report, indent=1) + "\n")
    print(*text(report), sep="\n")
    print(f"\n{file}: now run tools/gpu_status.py")
    return any(outcome["status"] == "failed" for outcome in report["parts"].values())


def build(report: dict, folder: Path) -> dict:
    return run("build", folder, "-m", "pip", "install", "-e", ".", "--no-build-isolation", "--no-deps")


def environment(report: dict, folder: Path) -> dict:
    query = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,memory.total"
    report["environment"]["nvidia-smi"] = output_of("nvidia-smi", f"--query-gpu={query}", "--format=csv")
    outcome = run("environment", folder, "-m", "mova_kernels", "--json")
    if outcome["status"] == "passed":
        report["environment"].update(json.loads((folder / "stdout").read_text()))
    return outcome


def tests(report: dict, folder: Path) -> dict:
    """Run tests/test_gpu.py, each op in a process of its own, since a process cannot go on after an error on the GPU.

    The processes run at the same time, because they compile more than they compute.
    """
    names = re.findall(r"^def (test_\w+)", (ROOT / "tests" / "test_gpu.py").read_text(), re.MULTILINE)
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault((gpu_status.kernel_of(name) or "adapter/").split("/")[0], []).append(name)

    def run_group(group: str) -> dict:
        place = folder / group
        place.mkdir()
        ids = [f"tests/test_gpu.py::{name}" for name in groups[group]]
        outcome = run("tests", place, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={place / 'xml'}", *ids)
        found = outcomes(place / "xml") if (place / "xml").exists() else {}
        if outcome["status"] == "failed" and not any(test["outcome"] == "failed" for test in found.values()):
            message = "the process was stopped or died: see the part's output"
            found[f"{groups[group][0]} and the others"] = {"outcome": "failed", "seconds": 0, "message": message}
        report["tests"].update(found)
        return outcome

    with ThreadPoolExecutor(len(groups)) as pool:
        results = dict(zip(groups, pool.map(run_group, groups), strict=True))
    complaints = [
        f"{group}: {outcome['output']}" for group, outcome in results.items() if outcome["status"] == "failed"
    ]
    if not any(test["outcome"] == "passed" for test in report["tests"].values()):
        complaints.append("not one test has passed")
    return {"status": "failed" if complaints else "passed", "output": "\n".join(complaints)}


def sanitizer(report: dict, folder: Path) -> dict:
    """The CUDA kernels under compute-sanitizer, at the sizes of one tile and two: memory, then races."""
    if shutil.which("compute-sanitizer") is None:
        return {"status": "skipped", "output": "compute-sanitizer is not installed"}
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_gpu.py"]
    for tool in ("memcheck", "racecheck"):
        command = ["compute-sanitizer", f"--tool={tool}", "--error-exitcode=3", "--target-processes=all", *pytest]
        outcome = run_command("sanitizer", folder, *command, "-k", "in_cuda and gradients and 10-64 and bfloat16")
        if outcome["status"] == "failed":
            return {**outcome, "output": f"{tool}: {outcome['output']}"}
    return outcome


def demo(report: dict, folder: Path) -> dict:
    outcome = run("demo", folder, "-m", "mova_kernels", "demo", "--device", "cuda", "--output", str(folder))
    if outcome["status"] == "passed":
        outcome["output"] = re.sub(r"^chart: .*\n?", "", (folder / "stdout").read_text(), flags=re.MULTILINE).rstrip()
    return outcome


def benchmarks(report: dict, folder: Path) -> dict:
    """Measure the ops, and the adapter without the variants that must be compiled first."""
    if importlib.util.find_spec("pytest_benchmark") is None:
        return {"status": "skipped", "output": "pytest-benchmark is not installed"}
    options = ("--device=cuda", "--full", "--benchmark-only", f"--benchmark-json={folder / 'json'}")
    adapter = "bench_adapter and 48x48-bf16 and (B1- or B8- or B32-)"
    cases = f"({adapter} or B4-K3-N7-48x48-bf16) and not compiled and not reference"
    outcome = run("benchmarks", folder, "-m", "pytest", "benchmarks", "-k", cases, *options)
    measured = json.loads((folder / "json").read_text())["benchmarks"] if (folder / "json").exists() else []
    for found in measured:
        seconds, info = found["stats"]["median"], found["extra_info"]
        entry = {"group": found["group"], "name": info["variant"], "ms": round(seconds * 1e3, 4), **info}
        report["benchmarks"].append({**entry, "rate": rate(info, seconds)})
    return outcome


def rate(info: dict, seconds: float) -> str:
    if info.get("flop"):
        return f"{info['flop'] / seconds / 1e12:.3g} TFLOP/s"
    terabytes = info.get("bytes", 0) / seconds / 1e12
    return f"{terabytes:.3g} TB/s" if terabytes > 0.01 else f"{seconds * 1e6:.0f} us"  # too little work


def run(part: str, folder: Path, *arguments: str) -> dict:
    """Run python3 with these arguments, and stop it at the part's limit; stdout goes to folder/stdout."""
    return run_command(part, folder, sys.executable, *arguments)


def run_command(part: str, folder: Path, *command: str) -> dict:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    variables = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INDEX": "1", "PYTHONPATH": path}
    with (folder / "stdout").open("w") as out, (folder / "stderr").open("w") as err:
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **variables},
            stdout=out, stderr=err, start_new_session=True,
        )  # fmt: skip
    code = finish(process, LIMITS[part])
    if code == 0:
        return {"status": "passed"}
    tail = "".join((folder / name).read_text(errors="replace")[-4000:] for name in ("stdout", "stderr"))
    return {"status": "failed", "output": f"{'stopped at its limit' if code is None else f'exit {code}'}\n{tail}"}


def finish(process: subprocess.Popen, limit: float) -> int | None:
    """Wait for a process. Returns its exit code, or None if it had to be stopped."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(limit)
    for stop in (signal.SIGINT, signal.SIGKILL):  # pytest still reports after an interrupt
        with contextlib.suppress(subprocess.TimeoutExpired, ProcessLookupError):
            os.killpg(process.pid, stop)
            process.wait(GRACE)
            break
    return None


def outcomes(junit: Path) -> dict[str, dict]:
    """For each test: whether it passed, failed or was skipped, the seconds, and the reason."""
    found = {}
    for case in ElementTree.parse(junit).iter("testcase"):
        bad = [e for e in case if e.tag in ("failure", "error")]
        skipped = [e for e in case if e.tag == "skipped"]
        message = next((e.get("message", "") for e in bad + skipped), "")
        outcome = "failed" if bad else "skipped" if skipped else "passed"
        found[case.get("name")] = {"outcome": outcome, "seconds": float(case.get("time", 0)), "message": message[:1000]}
    return found


def text(report: dict) -> list[str]:
    """The report as text. Failures come last, where a terminal shows them."""
    lines = [f"{report['device']}, {report['commit']}, {report['date']}", ""]
    lines += [f"{name:12} {part['status']:8} {part['seconds']:6.1f} s" for name, part in report["parts"].items()]
    demonstration = report["parts"].get("demo", {})
    lines += ["", demonstration.get("output", "").rstrip()] if demonstration.get("status") == "passed" else []
    for group in dict.fromkeys(b["group"] for b in report["benchmarks"]):
        lines += ["", group]
        entries = [b for b in report["benchmarks"] if b["group"] == group]
        lines += [f"  {b['name']:60} {b['ms']:9.3f} ms  {b['rate']}" for b in entries]
    lines += ["", *(f"{k:45} {gpu_status.verdict(k, report) or 'not run'}" for k in gpu_status.kernels())]
    for name, test in report["tests"].items():
        if test["outcome"] == "failed":
            lines += ["", f"FAILED {name}: {test['message']}"]
    for name, part in report["parts"].items():
        if part["status"] != "passed":
            lines += ["", f"{name} {part['status']}: {part['output']}"]
    failed = [name for name, part in report["parts"].items() if part["status"] == "failed"]
    return [*lines, "", f"failed: {', '.join(failed)}" if failed else "nothing failed"]


def commit() -> str:
    changed = output_of("git", "status", "--porcelain", "--", ":!benchmarks/results")
    found = os.environ.get("MOVA_COMMIT") or output_of("git", "rev-parse", "--short", "HEAD")
    return (found or "unknown") + (" and changes" if changed else "")


def output_of(*command: str) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


if __name__ == "__main__":
    sys.exit(main())
