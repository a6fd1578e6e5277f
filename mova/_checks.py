"""One wording for errors: the argument, the rule that it breaks, the value that it has. Nothing here needs torch."""

from __future__ import annotations

from collections.abc import Iterable

_NAMED = 5


def check(ok: object, argument: str, rule: str, value: object, error: type[Exception] = ValueError) -> None:
    """Raise ``error("argument rule, got value")`` unless ``ok``."""
    if not ok:
        raise error(f"{argument} {rule}, got {value!r}")


def check_int(argument: str, value: object, smallest: int) -> None:
    """``value`` must be an int (a bool is not one) of at least ``smallest``."""
    check_whole(argument, value)
    check(value >= smallest, argument, f"must be at least {smallest}", value)  # type: ignore[operator]


def check_whole(argument: str, value: object) -> None:
    """``value`` must be an int; a bool is not one."""
    check(isinstance(value, int) and not isinstance(value, bool), argument, "must be an int", value, TypeError)


def check_weights(
    of: str, missing: Iterable[str] = (), unexpected: Iterable[str] = (), wrong: Iterable[str] = ()
) -> None:
    """Raise a ValueError that counts the keys and names the first few, unless all three lists are empty."""
    found = {"missing": missing, "unexpected": unexpected, "of another shape": wrong}
    faults = []
    for fault, keys in found.items():
        names = sorted(keys)
        if names:
            more = ", ..." if len(names) > _NAMED else ""
            faults.append(f"{len(names)} {fault} ({', '.join(names[:_NAMED])}{more})")
    if faults:
        raise ValueError(f"weights must be exactly those of {of}, got {'; '.join(faults)}")
