"""Runs one variant of one case: verifies it, warms it up and measures rounds; here or in a process of its own."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mova_kernels._measure import measure

from .cases import BACKWARD, DTYPES, FORWARD, Case
from .result import Result
from .suite import Draw, Inputs, Outputs, find, listed

ROUND_SECONDS = 0.02  # at least, on a CPU: shorter computations are repeated within a round
WARM_UP_SECONDS = 0.3
FLUSHED_BYTES = 256 << 20  # more than a GPU's L2 cache
TINY_GRADIENT = 1e-3  # gradients whose norm is below this part of the largest one's are residues of cancellation


class LocalRunner:
    """One variant of one case, in this process.

    Args:
        module: the module of the suite.
        case: the case.
        name: the name of the variant; None: the truth.
        device: the device.
    """

    def __init__(self, module: str, case: Case, name: str | None, device: torch.device) -> None:
        self.suite = find(module)
        self.case, self.name, self.device = case, name, device
        self.iterations = 1

    def write_truth(self, path: Path) -> None:
        """Save outputs and gradients in fp64."""
        torch.save(self.values(self.suite.truth, wide=True), path)

    def prepare(self, truth: Path) -> Result:
        """Verify, warm up and count. The result has the seconds of one call."""
        assert self.name is not None
        variant = self.suite.variants[self.name]
        if self.case.threads:
            torch.set_num_threads(self.case.threads)
        if not variant.ours and variant.in_fp32:
            self.suite.verify(variant, self.device)
        if self.case.direction == BACKWARD:
            torch._functorch.config.donated_buffer = False  # a graph that stays must keep its buffers
        values, expected = self.values(variant.prepare(variant.run)), torch.load(truth, map_location=self.device)
        result = Result("measured", self.device.type, note=variant.note)
        result.threads = torch.get_num_threads() if self.device.type == "cpu" else None
        result.error = relative_error(values["outputs"], expected["outputs"])
        result.gradient_error = worst_error(values["gradients"], expected["gradients"])
        result.moved = sum(t.nbytes for t in (*self.inputs.reads, *values["outputs"], *values["gradients"]))
        del values, expected
        self.call = self._call()
        first = measure(self.call, self.device)
        result.memory, once = first.peak_bytes, first.seconds
        end = time.perf_counter() + WARM_UP_SECONDS - once
        while time.perf_counter() < end:
            once = self._once()
        result.seconds = [once]  # tells how many rounds there is time for
        if self.device.type == "cuda":
            result.launches, result.syncs = launches_and_syncs(self.call)
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
        """Free the memory."""
        vars(self).clear()

    def values(self, run: Callable[[Inputs], Outputs], wide: bool = False) -> dict[str, list[Tensor]]:
        """Outputs and, for a case with a backward pass, gradients of ``run``; in fp64 if ``wide``.

        The inputs are fresh ones. They and ``run`` are what is measured later.
        """
        self.run, self.inputs = run, self.suite.inputs(self.case, Draw(self.case, self.device, wide))
        for leaf in self.inputs.leaves:
            leaf.requires_grad_(self.case.direction != FORWARD)
        if self.case.direction == FORWARD:
            with torch.no_grad():
                return {"outputs": listed(run(self.inputs)), "gradients": []}
        outputs = listed(run(self.inputs))
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
        """The function that is measured, without arguments."""
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


class RemoteRunner:
    """A :class:`LocalRunner` in a process of its own."""

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
        """Kill the process, whatever it is doing."""
        self._process.kill()
        self._process.join()
        self._connection.close()


def _serve(connection: Any, arguments: tuple) -> None:
    """Calls the methods of a runner that the parent process names, and sends (error, answer) back."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    runner = None
    while True:
        method, rest = connection.recv()
        try:
            runner = runner or LocalRunner(*arguments)
            connection.send((None, getattr(runner, method)(*rest)))
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


def relative_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Relative L2 error of all tensors together."""
    difference = sum(float((f.double() - e).norm() ** 2) for f, e in zip(found, expected, strict=True))
    return (difference / sum(float(e.norm() ** 2) for e in expected)) ** 0.5


def worst_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float | None:
    """The largest relative L2 error of a tensor; those with a tiny norm do not count."""
    norms = [float(e.norm()) for e in expected]
    counted = [(f, e) for f, e, n in zip(found, expected, norms, strict=True) if n > TINY_GRADIENT * max(norms)]
    return max((relative_error([f], [e]) for f, e in counted), default=None)


def launches_and_syncs(call: Any) -> tuple[int | None, int | None]:
    """Kernel launches and synchronisations of one call on a GPU; None if the profiler does not see them."""
    with torch.profiler.profile() as profile:
        call()
    names = [event.name for event in profile.events()]
    launches = sum(name.startswith(("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")) for name in names)
    return (launches, sum("Synchronize" in name for name in names)) if launches else (None, None)
