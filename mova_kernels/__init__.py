"""mova_kernels: gated cross-attention of image tokens to the vision experts that each image selected."""

from . import backends, ops
from ._inputs import split_concatenated
from ._version import __version__
from .adapter import MoVAdapter
from .backends import BackendError, use_backend
from .block import AdapterBlock
from .config import MoVAdapterConfig
from .routing import RaggedPairs, device_routing

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
