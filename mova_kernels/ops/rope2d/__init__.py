from .op import rope2d as rope2d
from .reference import rope2d_table as rope2d_table

__all__ = ["rope2d", "rope2d_table"]
