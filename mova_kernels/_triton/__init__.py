"""What the Triton kernels share: whether they can run, device functions, and launch configurations.

Only ``availability`` is imported without Triton.
"""

from .availability import BACKEND as BACKEND

__all__ = ["BACKEND"]
