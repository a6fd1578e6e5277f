"""mova_kernels: gated cross-attention of image tokens to the vision experts that each image selected."""

from . import backends, ops
from ._version import __version__
from .adapter import AdapterBlock, MoVAdapter, split_concatenated
from .backends import BackendError, use_backend
from .config import MoVAdapterConfig
from .ragged import RaggedPairs, device_routing

__all__ = [
    "AdapterBlock",
    "BackendError",
    "MoVAdapter",
    "MoVAdapterConfig",
    "RaggedPairs",
    "__version__",
    "backends",
    "device_routing",
    "ops",
    "split_concatenated",
    "use_backend",
]
