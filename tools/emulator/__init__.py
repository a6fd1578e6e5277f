"""A GPU on the CPU: runs compiled PTX, with numbers, and finds what hardware forgives by luck. See README.md."""

from .machine import Counter, Fault, Kernel, Memory, Totals
from .ptx import Unsupported, entries

__all__ = ["Counter", "Fault", "Kernel", "Memory", "Totals", "Unsupported", "entries"]
