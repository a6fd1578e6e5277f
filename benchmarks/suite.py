"""A benchmark consists of a problem, our implementations of it, and everything that somebody might use instead."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor

from mova_kernels import backends

from .cases import DTYPES, TINY, Case

Outputs = Tensor | Sequence[Tensor]
Declines = Callable[[Case, torch.device], "str | None"]
AGREEMENT = 1e-9  # relative L2 in fp64: the same function, summed in another order


class Inputs(SimpleNamespace):
    """The tensors of one problem, under names that the suite chooses.

    Attributes:
        leaves: the tensors that get gradients.
        reads: all tensors that every computation has to read. The least memory traffic is counted from them.
    """

    leaves: Sequence[Tensor]
    reads: Sequence[Tensor]


class Draw:
    """Random fp32 numbers rounded to the case's dtype, the same for every variant of a case."""

    def __init__(self, case: Case, device: torch.device, wide: bool = False) -> None:
        self.dtype, self.device, self.wide = DTYPES[case.dtype], device, wide
        self._generator = torch.Generator(device).manual_seed(0)

    def __call__(self, *shape: int, scale: float = 1, shift: float = 0) -> Tensor:
        """Normal numbers. ``wide`` makes them fp64 without changing their values."""
        return self.cast(torch.randn(shape, generator=self._generator, device=self.device) * scale + shift)

    def cast(self, x: Tensor) -> Tensor:
        x = x.to(self.device, self.dtype)
        return x.double() if self.wide else x


@dataclass(frozen=True)
class Work:
    """The least work of a forward pass, and that of the backward pass as a multiple of it.

    Attributes:
        flop: FLOPs of the matrix products of the selected (sample, expert) pairs.
        exps: the number of exponentials.
        backward: FLOPs of the backward pass divided by those of the forward pass.
    """

    flop: int = 0
    exps: int = 0
    backward: float = 2.0

    def of(self, direction: str) -> tuple[int, int]:
        """FLOPs and exponentials. A backward pass without stored scores computes the exponentials again."""
        forward, backward = "forward" in direction, "backward" in direction
        return int(self.flop * (forward + backward * self.backward)), self.exps * (forward + backward)


@dataclass(frozen=True)
class Variant:
    """One way to compute a suite's problem.

    Attributes:
        run: Inputs -> outputs, differentiable.
        ours: whether it is one of our backends.
        declines: gives the reason why it cannot run a case on a device, or None.
        prepare: turns ``run`` into the function that is measured, for example by torch.compile.
        note: a remark for the report.
        quick: whether it is part of ``--quick``.
        in_fp32: whether it can run in the dtype in which baselines are verified. Its error in the case's dtype is
            judged in any case.
    """

    name: str
    run: Callable[[Inputs], Outputs]
    ours: bool = False
    declines: Declines = lambda case, device: None
    prepare: Callable[[Callable], Callable] = lambda run: run
    note: str | None = None
    quick: bool = True
    in_fp32: bool = True


class Suite:
    """The benchmark of one op or module.

    Args:
        module: ``__name__`` of the module whose ``SUITE`` this is. Another process finds the suite by it.
        name: the name of the op, or of the module that is measured.
        cases: its cases in ``benchmarks/cases.py``.
        inputs: (case, draw) -> Inputs.
        baselines: the first is the official computation.
        work: case -> Work.
        op: (Inputs, backend) -> outputs, for a suite of an op with backends.
        ours: our variants, besides those of the op's backends.
        truth: Inputs in fp64 -> outputs; default: the op's reference.
        verify: (variant, device), fails for a baseline that computes something else; default: :meth:`verify_in_fp64`.
    """

    def __init__(
        self,
        module: str,
        name: str,
        cases: Sequence[Case],
        inputs: Callable[[Case, Draw], Inputs],
        baselines: Sequence[Variant],
        work: Callable[[Case], Work],
        *,
        op: Callable[[Inputs, str], Outputs] | None = None,
        ours: Sequence[Variant] = (),
        truth: Callable[[Inputs], Outputs] | None = None,
        verify: Callable[[Variant, torch.device], None] | None = None,
    ) -> None:
        self.module, self.name, self.cases, self.inputs, self.work = module, name, list(cases), inputs, work
        if op is not None:
            ours = [*(_of_backend(name, backend, op) for backend in backends.explain()[name]), *ours]
            truth = truth or functools.partial(op, backend="reference")
        assert truth is not None, name
        self.truth, self.verify = truth, verify or self.verify_in_fp64
        self.variants = {v.name: v for v in (*baselines, *ours)}

    def verify_in_fp64(self, variant: Variant, device: torch.device) -> None:
        """Compare a variant with the truth on a small problem.

        Raises:
            ValueError: it computes something else.
        """
        with torch.no_grad():
            found, expected = (listed(run(self.inputs(TINY, Draw(TINY, device)))) for run in (variant.run, self.truth))
        for f, e in zip(found, expected, strict=True):
            error = float((f - e).norm() / e.norm())
            if not error < AGREEMENT:
                raise ValueError(f"{variant.name} computes something else: relative error {error:.2g} in fp64")


def find(module: str) -> Suite:
    """The suite of a module that has been named to :class:`Suite`."""
    return importlib.import_module(module).SUITE


def listed(outputs: Outputs) -> list[Tensor]:
    """Outputs as a list."""
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def takes(op: str, backend: str) -> Declines:
    """The reason why a backend of an op does not take a case, or None."""

    def declines(case: Case, device: torch.device) -> str | None:
        try:
            backends.choose(op, backend, device, DTYPES[case.dtype])
        except backends.BackendError as error:
            return str(error)
        return None

    return declines


def _of_backend(op: str, backend: str, run: Callable[[Inputs, str], Outputs]) -> Variant:
    run_there = functools.partial(run, backend=backend)
    return Variant(backend, run_there, ours=True, declines=takes(op, backend), quick=backend != "reference")
