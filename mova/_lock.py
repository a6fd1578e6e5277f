"""The lock of a model, of its experts and of its cache: one thread works at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import wraps
from types import TracebackType
from typing import Any, TypeVar, cast

import torch

Method = TypeVar("Method", bound=Callable[..., Any])


class Lock:
    """A re-entrant lock whose owner can be copied and pickled: the copy gets a new lock that is free."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[Lock], tuple[()]]:
        return type(self), ()


def locked(method: Method) -> Method:
    """Decorate a method: it holds ``self.lock`` while it runs."""

    @wraps(method)
    def one_at_a_time(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.lock:
            return method(self, *args, **kwargs)

    return cast(Method, one_at_a_time)


def locked_with_lora(method: Method) -> Method:
    """Decorate a method as :func:`locked` does, for models with a routing LoRA: another thread may have switched it on.

    Compiled code takes no lock.
    """

    @wraps(method)
    def one_at_a_time(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not self.config.routing_lora:
            return method(self, *args, **kwargs)
        with self.lock:
            return method(self, *args, **kwargs)

    return cast(Method, one_at_a_time)
