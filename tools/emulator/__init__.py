"""A GPU on the CPU: runs compiled PTX, with numbers, and finds what hardware forgives by luck. See README.md."""

from .machine import SETTINGS, Counter, Fault, Kernel, Launch, Memory, Totals
from .ptx import Unsupported, entries

__all__ = ["SETTINGS", "Counter", "Fault", "Kernel", "Launch", "Memory", "Totals", "Unsupported", "entries"]
