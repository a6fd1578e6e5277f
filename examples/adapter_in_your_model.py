"""MoVAdapter inside another model, for somebody who wants to fuse several vision encoders.

The base encoder sees every image, an expert sees the images that selected it, and a head of your own reads the fused
tokens. The encoders are small here and have random weights. Yours would come from ``from_pretrained``.

    python examples/adapter_in_your_model.py
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from mova_kernels import MoVAdapter, MoVAdapterConfig

SMALL = {"image_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


class Classifier(nn.Module):
    """Says what an image shows, given the feature of a question about it."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.base = CLIPVisionModel(CLIPVisionConfig(hidden_size=64, intermediate_size=128, patch_size=8, **SMALL))
        self.experts = nn.ModuleList(
            [
                Dinov2Model(Dinov2Config(hidden_size=96, patch_size=16, **SMALL)),
                SiglipVisionModel(SiglipVisionConfig(hidden_size=48, intermediate_size=96, patch_size=4, **SMALL)),
            ]
        )
        self.prefix_tokens = (1, 0)  # DINOv2 puts a CLS token before its patches, SigLIP puts none
        config = MoVAdapterConfig(
            in_channels=64,  # the width of the base encoder's tokens
            resolution=8,  # CLIP makes 8 x 8 tokens of 64 x 64 pixels
            out_channels=128,
            num_heads=4,
            text_channels=32,  # the width of the question's feature
            expert_channels=(96, 48),  # any widths and any grids: the adapter resamples
        )
        self.adapter = MoVAdapter(config)
        self.head = nn.Linear(config.out_channels, num_classes)
        self.base.requires_grad_(False)
        self.experts.requires_grad_(False)

    def fused_tokens(self, images: Tensor, routing: Tensor, question: Tensor) -> Tensor:
        """images (B, 3, 64, 64), routing (B, 2) bool, question (B, 32) -> (B, 16, 128)."""
        base = self.base(images).last_hidden_state[:, 1:]
        features = []
        for expert, prefix, selected in zip(self.experts, self.prefix_tokens, routing.T, strict=True):
            features.append(expert(images[selected]).last_hidden_state[:, prefix:] if selected.any() else None)
        return self.adapter(base, features, routing, question)

    def forward(self, images: Tensor, routing: Tensor, question: Tensor) -> Tensor:
        return self.head(self.fused_tokens(images, routing, question).mean(1))


def main() -> None:
    torch.manual_seed(0)
    model = Classifier(num_classes=4)
    images, question, labels = torch.randn(4, 3, 64, 64), torch.randn(4, 32), torch.arange(4)
    # One row per image, one column per expert: the first image selects both, the last one none.
    routing = torch.tensor([[1, 1], [0, 1], [1, 0], [0, 0]]).bool()
    print("fused tokens", tuple(model.fused_tokens(images, routing, question).shape))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    for step in range(20):
        loss = F.cross_entropy(model(images, routing, question), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 19 == 0:
            print(f"step {step} loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
