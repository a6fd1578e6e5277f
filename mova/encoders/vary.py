"""Vary's vision vocabulary: the image encoder of SAM, and a convolution that halves its grid."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel, SamVisionConfig, SamVisionModel


class VaryConfig(SamVisionConfig):
    """Sizes of :class:`VaryModel`, which are those of SAM's image encoder; the default is ViT-B."""

    model_type = "mova_vary"


class VaryModel(PreTrainedModel):
    """Source: Vary (arXiv 2312.06109), without its second convolution, as in MoVA."""

    config_class = VaryConfig
    main_input_name = "pixel_values"
    _supports_sdpa = True

    def __init__(self, config: VaryConfig) -> None:
        super().__init__(config)
        self.sam = SamVisionModel(config)
        channels = config.output_channels
        self.net_2 = nn.Conv2d(channels, 2 * channels, kernel_size=3, stride=2, padding=1, bias=False)
        self.post_init()

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Encode (B, 3, S, S) into (B, 2 * output_channels, h, w) with h = w = S / patch_size / 2."""
        return self.net_2(self.sam(pixel_values).last_hidden_state)
