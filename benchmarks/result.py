"""The result of a race for one variant of a case."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field


@dataclass
class Result:
    """The result of one variant of a case.

    Attributes:
        outcome: "measured", "skipped" or "failed".
        device: "cpu" or "cuda".
        reason: why it was skipped or failed.
        seconds: the time of each round.
        moved: the bytes that every computation has to read and write.
        memory: peak bytes beyond the inputs; None where the system cannot tell.
        error: relative L2 error of all outputs together, against fp64.
        gradient_error: relative L2 error of the worst gradient, against fp64.
        threads: on a CPU.
        launches, syncs: how many kernels a call launches, and how often the host waits for the GPU; None on a CPU.
        note: a remark for the report.
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
        """The median of the seconds."""
        return statistics.median(self.seconds)
