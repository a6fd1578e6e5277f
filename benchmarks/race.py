"""Measures the variants of a case in turn, so that the machine's moods hit all alike.

On a CPU every variant lives in a process of its own: what one leaves behind in the allocator (huge pages, a grown heap)
changes the speed of the next by up to a factor of two. On a GPU all share the process and its allocator.
"""

from __future__ import annotations

import functools
import importlib
import multiprocessing
import os
import signal
import statistics
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mova_kernels._measure import measure

from .cases import BACKWARD, DTYPES, FORWARD, Case
from .suite import Draw, Suite, listed

ROUNDS = (5, 50)
SLOW_ROUNDS = 3  # at least, where a round of all variants takes more than SLOW_SECONDS
SLOW_SECONDS = 10.0
ROUND_SECONDS = 0.02  # at least, on a CPU: shorter computations are repeated within a round
WARM_UP_SECONDS = 0.3
FLUSHED_BYTES = 256 << 20  # more than a GPU's L2 cache
TINY_GRADIENT = 1e-3  # gradients whose norm is below this part of the largest one's are residues of cancellation


@dataclass
class Result:
    """What became of one variant of a case.

    Attributes:
        outcome: "measured", "skipped" or "failed"; the latter two with a reason.
        device: "cpu" or "cuda".
        seconds: of each round.
        moved: bytes of what is read and written at least.
        memory: peak bytes beyond the inputs; None where the system cannot tell.
        error: relative L2 error against fp64, of the outputs together.
        gradient_error: the same of the worst gradient.
        launches, syncs: of kernels, and of the host waiting, per call; None on a CPU.
    """

    outcome: str
    device: str
    reason: str = ""
    seconds: list[float] = field(default_factory=list)
    moved: int = 0
    memory: int | None = None
    error: float | None = None
    gradient_error: float | None = None
    threads: int | None = None
    launches: int | None = None
    syncs: int | None = None
    note: str | None = None

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)


def race(
    suite: Suite, case: Case, names: Sequence[str], device: torch.device, seconds: float, quick: bool = False
) -> dict[str, Result]:
    """Measure the named variants; all rounds together take about ``seconds``, but there are some at least.

    No speed is reported of what is wrong. The error against fp64 may be at most twice that of the official computation
    in the same dtype, which runs for that even if it is not named; where it cannot run, of the first one that can.
    """
    if case.on_gpu and device.type != "cuda":
        return {name: Result("skipped", device.type, "it takes a GPU: hours on a CPU") for name in names}
    if device.type == "cuda" and not torch.cuda.is_available():
        return {name: Result("skipped", device.type, "there is no CUDA device") for name in names}
    official = next(iter(suite.variants))
    results: dict[str, Result] = {}
    running: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        truth = Path(folder, "truth")
        try:
            running["truth"] = _enter(suite, case, None, device)
            try:
                running["truth"].write_truth(truth)
            except Exception as error:
                reason = f"nothing to check against: {type(error).__name__}: {error}"
                return {name: Result("failed", device.type, reason) for name in names}
            running.pop("truth").close()
            for name in dict.fromkeys([official, *names]):
                if quick and not suite.variants[name].quick:
                    results[name] = Result("skipped", device.type, "only with --full")
                else:
                    results[name] = _started(running, suite, case, name, device, truth)
            _judge(results, case)
            for name in list(running):
                if name not in names or results[name].outcome != "measured":
                    running.pop(name).close()
            once = sum(results[name].seconds.pop() for name in running)
            least = SLOW_ROUNDS if once > SLOW_SECONDS else ROUNDS[0]
            rounds = min(max(int(seconds / max(once, 1e-9)), least), ROUNDS[1])
            for _ in range(rounds):
                for name, contender in list(running.items()):
                    try:
                        results[name].seconds += contender.round()
                    except Exception as error:
                        results[name] = _gone_wrong(error, device)
                        running.pop(name).close()
        finally:
            for contender in running.values():
                contender.close()
    return {name: results[name] for name in names}


def _started(running: dict[str, Any], suite: Suite, case: Case, name: str, device: torch.device, truth: Path) -> Result:
    """Put a contender into ``running``; its result has the seconds of one call."""
    reason = suite.variants[name].declines(case, device)
    if reason:
        return Result("skipped", device.type, reason)
    running[name] = contender = _enter(suite, case, name, device)
    try:
        return contender.prepare(truth)
    except Exception as error:
        running.pop(name).close()
        return _gone_wrong(error, device)


def _gone_wrong(error: Exception, device: torch.device) -> Result:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return Result("skipped", device.type, f"out of memory: {str(error).partition('.')[0]}")
    return Result("failed", device.type, f"{type(error).__name__}: {error}")


def _judge(results: dict[str, Result], case: Case) -> None:
    measured = [r for r in results.values() if r.outcome == "measured"]
    rounding = torch.finfo(DTYPES[case.dtype]).eps / 2  # of the exact result, where the official one may be luckier
    for result in measured:
        for what in ("error", "gradient_error"):
            found, official = getattr(result, what), getattr(measured[0], what)
            if found is not None and not found <= 2 * official + rounding:
                result.outcome = "failed"
                result.reason = f"wrong: {what} {found:.3g} against fp64, of the official computation {official:.3g}"


def _enter(suite: Suite, case: Case, name: str | None, device: torch.device) -> Any:
    return (Contender if device.type == "cuda" else Remote)(suite.inputs.__module__, case, name, device)


class Contender:
    """One variant of one case, in this process. ``name`` None: the truth.

    Args:
        module: whose ``SUITE`` it is.
    """

    def __init__(self, module: str, case: Case, name: str | None, device: torch.device) -> None:
        self.suite: Suite = importlib.import_module(module).SUITE
        self.case, self.name, self.device = case, name, device
        self.iterations = 1

    def write_truth(self, path: Path) -> None:
        """Outputs and gradients in fp64."""
        self.run, self.inputs = self.suite.truth, self._inputs(wide=True)
        torch.save(self._values(), path)

    def prepare(self, truth: Path) -> Result:
        """Check, warm up and count; after that come rounds."""
        assert self.name is not None
        variant = self.suite.variants[self.name]
        if self.case.threads:
            torch.set_num_threads(self.case.threads)
        if not variant.ours and variant.in_fp32:
            self.suite.verify(variant, self.device)
        if self.case.direction == BACKWARD:
            torch._functorch.config.donated_buffer = False  # a graph that stays must keep its buffers
        self.run, self.inputs = variant.prepare(variant.run), self._inputs()
        found, expected = self._values(), torch.load(truth, map_location=self.device)
        result = Result("measured", self.device.type, note=variant.note)
        result.threads = torch.get_num_threads() if self.device.type == "cpu" else None
        result.error = _relative(found["outputs"], expected["outputs"])
        result.gradient_error = _worst(found["gradients"], expected["gradients"])
        result.moved = _size(self.inputs.reads) + _size(found["outputs"]) + _size(found["gradients"])
        del found, expected
        self.call = self._call()
        first = measure(self.call, self.device)
        result.memory, once = first.peak_bytes, first.seconds
        end = time.perf_counter() + WARM_UP_SECONDS - once
        while time.perf_counter() < end:
            once = self._once()
        result.seconds = [once]  # tells how many rounds there is time for
        if self.device.type == "cuda":
            result.launches, result.syncs = _count(self.call)
        else:
            self.iterations = max(1, round(ROUND_SECONDS / once))
        return result

    def round(self) -> list[float]:
        """Seconds of one call; of several calls on a GPU, each with a cold L2 cache."""
        if self.device.type != "cuda":
            return [sum(self._once() for _ in range(self.iterations)) / self.iterations]
        flushed = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device=self.device)
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(5)]
        for start, end in events:
            flushed.zero_()
            start.record()
            self.call()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in events]

    def close(self) -> None:
        """Give its memory back."""
        vars(self).clear()

    def _inputs(self, wide: bool = False) -> Any:
        inputs = self.suite.inputs(self.case, Draw(self.case, self.device, wide))
        for leaf in inputs.leaves:
            leaf.requires_grad_(self.case.direction != FORWARD)
        return inputs

    def _values(self) -> dict[str, list[Tensor]]:
        if self.case.direction == FORWARD:
            with torch.no_grad():
                return {"outputs": listed(self.run(self.inputs)), "gradients": []}
        outputs = listed(self.run(self.inputs))
        gradients = self._gradients(outputs)
        zeros = (torch.zeros_like(leaf) for leaf in self.inputs.leaves)
        filled = [z if g is None else g for g, z in zip(gradients, zeros, strict=True)]
        return {"outputs": [o.detach() for o in outputs], "gradients": filled}

    def _gradients(self, outputs: list[Tensor], retain_graph: bool = False) -> Sequence[Tensor | None]:
        return torch.autograd.grad(
            outputs, self.inputs.leaves, self._cotangents(outputs), retain_graph=retain_graph, allow_unused=True
        )

    def _cotangents(self, outputs: list[Tensor]) -> list[Tensor]:
        if not hasattr(self, "cotangents"):
            dtype, generator = DTYPES[self.case.dtype], torch.Generator(self.device).manual_seed(1)
            drawn = (torch.randn(o.shape, generator=generator, device=self.device).to(dtype) for o in outputs)
            self.cotangents = [c.to(o) for c, o in zip(drawn, outputs, strict=True)]
        return self.cotangents

    def _call(self) -> Any:
        """What is measured, without arguments."""
        if self.case.direction == FORWARD:
            return torch.no_grad()(functools.partial(self.run, self.inputs))
        if self.case.direction == BACKWARD:
            return functools.partial(self._gradients, listed(self.run(self.inputs)), retain_graph=True)
        return lambda: self._gradients(listed(self.run(self.inputs)))

    def _once(self) -> float:
        """Seconds of one call."""
        start = time.perf_counter()
        self.call()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start


class Remote:
    """A :class:`Contender` in a process of its own."""

    def __init__(self, *arguments: Any) -> None:
        ours, theirs = multiprocessing.Pipe()
        self._connection = ours
        self._process = _processes().Process(target=_serve, args=(theirs, arguments), daemon=True)
        self._process.start()
        theirs.close()

    def __getattr__(self, method: str) -> Any:
        def call(*arguments: Any) -> Any:
            self._connection.send((method, arguments))
            try:
                error, answer = self._connection.recv()
            except EOFError:
                self._process.join()
                code = self._process.exitcode
                raise MemoryError(f"the process was killed, exit code {code}") from None
            if error is not None:
                raise error
            return answer

        return call

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self._process.kill()
        self._process.join()
        self._connection.close()


def _serve(connection: Any, arguments: tuple) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    contender = None
    while True:
        method, rest = connection.recv()
        try:
            contender = contender or Contender(*arguments)
            connection.send((None, getattr(contender, method)(*rest)))
        except Exception as error:
            text = "".join(traceback.format_exception_only(error)[-1:]).strip()
            kind = MemoryError if isinstance(error, MemoryError) or "can't allocate memory" in text else RuntimeError
            connection.send((kind(text), None))


@functools.cache
def _processes() -> Any:
    """Forks of a process which has imported everything and computed nothing."""
    root = str(Path(__file__).resolve().parents[1])
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.bench_adapter", "torch._dynamo", "torch._inductor.compile_fx"])
    return context


def _size(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _relative(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    difference = sum(float((f.double() - e).norm() ** 2) for f, e in zip(found, expected, strict=True))
    return (difference / sum(float(e.norm() ** 2) for e in expected)) ** 0.5


def _worst(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float | None:
    norms = [float(e.norm()) for e in expected]
    counted = [(f, e) for f, e, n in zip(found, expected, norms, strict=True) if n > TINY_GRADIENT * max(norms)]
    return max((_relative([f], [e]) for f, e in counted), default=None)


def _count(call: Any) -> tuple[int | None, int | None]:
    """Kernel launches and synchronisations of one call on a GPU; None where the profiler does not see them."""
    with torch.profiler.profile() as profile:
        call()
    names = [event.name for event in profile.events()]
    launches = sum(name.startswith(("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")) for name in names)
    return (launches, sum("Synchronize" in name for name in names)) if launches else (None, None)
