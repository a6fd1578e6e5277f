"""One wording for errors: the argument, the rule it breaks, the value it has."""

from __future__ import annotations

import torch
from torch import Tensor

from ._plain import autocast


def check(ok: object, argument: str, rule: str, value: object, error: type[Exception] = ValueError) -> None:
    """Raise ``error("argument rule, got value")`` unless ``ok``."""
    if not ok:
        raise error(f"{argument} {rule}, got {value!r}")


def check_tensor(argument: str, value: object, shape: tuple[int | str, ...]) -> None:
    """``value`` must be a tensor of this shape; strings in ``shape`` are free dimensions and name themselves.

    Raises:
        TypeError: ``value`` is no tensor, or one that is not numbers with strides (sparse, nested, quantised).
        ValueError: wrong rank or size.
    """
    check_dense(argument, value)
    assert isinstance(value, Tensor)
    actual = value.shape
    if actual == shape:
        return
    fits = len(actual) == len(shape)
    if fits:
        for want, have in zip(shape, actual, strict=True):
            if have != want and not isinstance(want, str):
                fits = False
    if not fits:
        raise ValueError(f"{argument} must have shape ({', '.join(map(str, shape))}), got {tuple(value.shape)}")


def check_dense(argument: str, value: object) -> None:
    """``value`` must be a tensor whose numbers have strides. Raises TypeError."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{argument} must be a tensor, got {type(value).__name__!r}")
    if value.layout is not torch.strided or value.is_nested or value.is_quantized:
        kind = "nested" if value.is_nested else "quantized" if value.is_quantized else value.layout
        raise TypeError(f"{argument} must be a dense, strided tensor, got a {kind} one")


def check_floats(argument: str, value: object, shape: tuple[int | str, ...]) -> None:
    """:func:`check_tensor`, and the dtype must be a floating point one."""
    check_tensor(argument, value, shape)
    assert isinstance(value, Tensor)
    if not value.is_floating_point():
        raise TypeError(f"{argument} must be floating point, got {value.dtype}")


def check_device(argument: str, value: Tensor, reference_name: str, reference: Tensor) -> None:
    """``value`` must live on the device of ``reference``."""
    if value.device != reference.device:
        owner = f"{reference_name}'" if reference_name.endswith("s") else f"{reference_name}'s"
        raise ValueError(f"{argument} must be on {owner} {reference.device}, got {value.device!r}")


def check_like(argument: str, value: Tensor, reference_name: str, reference: Tensor) -> None:
    """``value`` must live on the device of ``reference`` and, outside autocast, have its dtype."""
    check_device(argument, value, reference_name, reference)
    if value.dtype != reference.dtype and not autocast(reference.device.type):
        raise ValueError(f"{argument} must have {reference_name}'s {reference.dtype}, got {value.dtype}")
