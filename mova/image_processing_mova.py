"""The image processor of the base encoder, known to ``AutoImageProcessor``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from ._checks import check
from .experts import VisionExpert
from .images import PreparedImage


class MoVAImageProcessor(BaseImageProcessor):
    """Prepares images for the base encoder. The experts' images come from :class:`MoVAProcessor`.

    Args:
        base: the fields of the base encoder's VisionExpert (``MoVAConfig.base``).
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012  # as in transformers

    def __init__(self, base: Mapping[str, Any], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.base = dict(base)
        expert = VisionExpert(**self.base)
        self.size = {"height": expert.image_size, "width": expert.image_size}
        self.image_mean, self.image_std = expert.mean, expert.std

    def preprocess(self, images: Any, return_tensors: str = "pt", **kwargs: Any) -> BatchFeature:
        """Turn one image, a list of M images, or a list of lists into ``pixel_values`` (M, 3, S, S).

        Raises:
            TypeError, ValueError: an argument breaks its rule, or an image cannot be read.
        """
        check(return_tensors == "pt", "return_tensors", "must be 'pt'", return_tensors)
        check(not kwargs, "preprocess", "must have no other argument", sorted(kwargs), TypeError)
        expert, flat = VisionExpert(**self.base), flat_images(images)
        check(flat, "images", "must not be empty", images)
        return BatchFeature({"pixel_values": torch.stack([PreparedImage(x).view(expert) for x in flat])})


def flat_images(images: Any) -> list[Any]:
    """Flatten None, one image, a list of images, or a list of lists into one list."""
    if images is None:
        return []
    if not isinstance(images, list | tuple):
        return [images]
    return [image for entry in images for image in (entry if isinstance(entry, list | tuple) else [entry])]
