from .op import expert_gate as expert_gate

__all__ = ["expert_gate"]
