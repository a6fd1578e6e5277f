"""Chooses the implementation that runs an op. :func:`explain` says which one and why; :func:`use_backend` sets it.

The order is: the ``backend`` argument of an op, then :func:`use_backend`, then the environment variable
``MOVA_KERNELS_BACKEND``, then ``auto``. A request is either one name for all ops (``"reference"``) or a list of
``op=name`` pairs (``"feature_resample=cpu,rope2d=reference"``) which leaves the other ops on auto. ``auto`` takes the
first backend of :data:`BACKENDS` which accepts the device and the dtype. An explicit request is never replaced by
something else: if it cannot be met, :class:`BackendError` says why.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import ModuleType

import torch
from torch import Tensor

from ._checks import check
from ._plain import only_reference

BACKENDS = ("triton", "cuda", "cpu", "reference")  # the order in which auto tries them
ENVIRONMENT_VARIABLE = "MOVA_KERNELS_BACKEND"

Declines = Callable[[torch.device, torch.dtype], "str | None"]


class BackendError(RuntimeError):
    """The requested backend cannot run this op here; the message gives the reason."""


@dataclass(frozen=True)
class Backend:
    """One implementation of one op.

    Attributes:
        name: one of :data:`BACKENDS`.
        declines: gives the reason why it cannot run on a device and dtype, or None.
        only_when_asked: gives the reason why auto does not take it on a device although it could run, or None.
        caution: what a warning says, once per process, where auto takes it.
        takes: the values that it takes of each size with a limit; :func:`register` sets it.
    """

    name: str
    declines: Declines
    only_when_asked: Callable[[torch.device], str | None] = lambda device: None
    caution: str | None = None
    takes: Mapping[str, Sequence[int]] = field(default_factory=dict)


Limits = Mapping[str, Mapping[str, Sequence[int]]]  # name of a size -> backend -> the values that it takes

_TABLE: dict[str, dict[str, Backend]] = {}
_MODULES = {"triton": "triton_impl", "cuda": "cuda_impl", "cpu": "cpu_impl"}  # in the folder of an op
_request: str | None = None  # what use_backend() says; process-wide, so that autograd's threads see it too


def register(op: str, *backends: Backend, limits: Limits | None = None) -> None:
    """Add the implementations of ``op`` to the table. The reference is always there, and takes every size."""
    every = [Backend("reference", lambda device, dtype: None)]
    for b in backends:
        takes = {size: values[b.name] for size, values in (limits or {}).items() if b.name in values}
        every.append(replace(b, takes=takes))
    _TABLE[op] = {b.name: b for b in sorted(every, key=lambda b: BACKENDS.index(b.name))}


def ops() -> tuple[str, ...]:
    """The names of all ops."""
    return tuple(_TABLE)


@contextmanager
def use_backend(request: str) -> Iterator[None]:
    """Run the ops inside the block on these backends: a name, ``"auto"``, or ``op=name`` pairs.

    Process-wide, like torch's own global switches. Code compiled by torch.compile keeps the choice it was traced with.

    Raises:
        ValueError: unknown backend or op, or a backend which this op does not have.
    """
    global _request
    _parse(request, "request")
    before, _request = _request, request
    try:
        yield
    finally:
        _request = before


def choose(
    op: str,
    backend: str | None,
    device: torch.device,
    dtype: torch.dtype,
    sizes: Mapping[str, int] | None = None,
    tensors: Sequence[Tensor] | None = None,
    unfit: Mapping[str, str] | None = None,
) -> str:
    """The name of the backend that runs ``op`` on tensors of this device and dtype.

    ``sizes`` has the value of every size that the op's limits name. ``unfit`` holds, per backend that cannot run this
    very call for another reason, that reason. ``tensors`` are the arguments of the call. Where a derivative other than
    one backward pass is asked of them, where they are batched by vmap, of a subclass that computes in its own way, or
    where torch.jit.trace or torch.onnx look on, only the reference can run. None: kernels call each other, where that
    has been asked before.

    Raises:
        ValueError: unknown backend.
        BackendError: the backend that was asked for cannot run the op here, or none can.
    """
    name = requested(op, backend)
    only = None if tensors is None else only_reference(tensors)

    def refusal(b: Backend) -> str | None:
        reason = b.declines(device, dtype) or (only if b.name != "reference" else None)
        return reason or (unfit or {}).get(b.name) or _beyond_limits(b, sizes or {})

    if name == "auto":
        for b in _TABLE[op].values():
            if not b.only_when_asked(device) and not refusal(b):
                if b.caution and not torch.compiler.is_compiling():
                    _warn(b.caution)
                return b.name
        reasons = (f"{b.name}: {refusal(b) or b.only_when_asked(device)}" for b in _TABLE[op].values())
        raise BackendError(f"no backend can run {op} on {device.type} {dtype}: {'; '.join(reasons)}")
    candidate = _TABLE[op].get(name)
    reason = refusal(candidate) if candidate else f"it has no such implementation ({_names(op)})"
    if reason:
        raise BackendError(f"backend {name!r} cannot run {op} on {device.type} {dtype}: {reason}")
    return name


def implementation(
    op: str, backend: str, x: Tensor, sizes: Mapping[str, int] | None = None, unfit: Mapping[str, str] | None = None
) -> ModuleType:
    """The module with the kernels of ``op`` for tensors like ``x``; ``sizes`` and ``unfit`` as in :func:`choose`.

    The backend is chosen a second time where the op runs, because an exported graph may run on another machine.

    Raises:
        ValueError: ``backend`` is none with kernels.
        BackendError: it cannot run the op here.
    """
    if backend not in _MODULES:  # the rule is not written out for every call
        check(False, "backend", f"must be one of {', '.join(_MODULES)}", backend)
    return _module(op, choose(op, backend, x.device, x.dtype, sizes, unfit=unfit))


@functools.cache
def _module(op: str, backend: str) -> ModuleType:
    return importlib.import_module(f"mova_kernels.ops.{op}.{_MODULES[backend]}")


def _beyond_limits(b: Backend, sizes: Mapping[str, int]) -> str | None:
    """The reason if the backend does not take one of the sizes."""
    for name, values in b.takes.items():
        if name in sizes and not _takes(values, sizes[name]):
            return f"it takes {name} {_text(values)}, not {sizes[name]}"
    return None


def _takes(values: Sequence[int], size: int) -> bool:
    """``size in values``, which torch.compile cannot ask of a size that may change."""
    if not isinstance(values, range):
        return any(size == value for value in values)
    return values.start <= size < values.stop and (values.step == 1 or (size - values.start) % values.step == 0)


def _text(values: Sequence[int]) -> str:
    if not isinstance(values, range):
        return f"{', '.join(map(str, values[:-1]))} and {values[-1]}"
    start = f"from {values[0]} " if values[0] else "up "
    steps = f" in steps of {values.step}" if values.step != 1 else ""
    return f"{start}to {values[-1]}{steps}"


def explain(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, dict[str, str]]:
    """Per op and backend: ``"runs"``, or the reason why it does not run on this device and dtype.

    The answer honours :func:`use_backend` and the environment, and torch.func transforms, torch.jit.trace and ONNX
    export where it is asked inside of them. It is about plain tensors: those with a tangent (forward-mode AD) and those
    of subclasses with ``__torch_dispatch__`` run on the reference. Reasons are sentences for people, not for programs.
    """
    device = torch.device(device)
    answer: dict[str, dict[str, str]] = {}
    for op, implementations in _TABLE.items():
        try:
            selected = choose(op, None, device, dtype, tensors=())
        except BackendError:
            selected = None
        answer[op] = {}
        for b in implementations.values():
            idle = b.only_when_asked(device) if requested(op, None) == "auto" else None
            special = None if b.name == "reference" else only_reference(())
            reason = (
                b.declines(device, dtype)
                or special
                or idle
                or f"could run, but {selected or requested(op, None)} was chosen"
            )
            answer[op][b.name] = "runs" if b.name == selected else reason
    return answer


def requested(op: str, backend: str | None = None) -> str:
    """The backend that was asked for, by the argument ``backend`` or around it, or ``"auto"``; see above."""
    request = backend or _request or os.environ.get(ENVIRONMENT_VARIABLE)
    if not request:
        return "auto"
    source = "backend" if backend else "use_backend" if _request else ENVIRONMENT_VARIABLE
    requests = _parse(request, source)
    return requests.get(op, requests.get("*", "auto"))


def _parse(request: str, source: str) -> dict[str, str]:
    """``"cpu"`` -> {"*": "cpu"}; ``"rope2d=cpu"`` -> {"rope2d": "cpu"}."""
    requests = {}
    for item in request.split(","):
        op, _, name = item.strip().rpartition("=")
        if op and op not in _TABLE:
            raise ValueError(f"{source} must name one of the ops {', '.join(_TABLE)}, got {op!r}")
        choices = ("auto", *(_TABLE[op] if op else BACKENDS))
        if name not in choices:
            raise ValueError(f"{source}{f' for {op}' if op else ''} must be one of {', '.join(choices)}, got {name!r}")
        requests[op or "*"] = name
    return requests


@functools.cache  # once
def _warn(caution: str) -> None:
    warnings.warn(caution, stacklevel=2)


def _names(op: str) -> str:
    return "there are " + ", ".join(_TABLE[op])
