from .op import expert_attention as expert_attention

__all__ = ["expert_attention"]
