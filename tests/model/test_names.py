"""An expert may have any name that VisionExpert allows: no key of ours is taken for it, in a cache or in a folder."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import mova
from mova import MoVAConfig, MoVAForConditionalGeneration, MoVAPipeline, MoVAProcessor
from mova.demo import small_config, small_model
from mova.demo.pictures import pictures

NAMES = [
    "router",
    "text",
    "base",
    "expert",
    "routing",
    "experts",
    "question_tokenizer",
    "adapter",
    "official",
    "config",
]
HALF = (0.5, 0.5, 0.5)
OWN = mova.VisionExpert("own", "Follows outlines.", 64, mean=HALF, std=HALF, grid=(16, 16), channels=64)
IMAGES, QUESTIONS = [picture.image for picture in pictures()[:2]], ["What?", "Why?"]


class _Edges(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 64, 4, 4)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(3)
            values = torch.randn(self.conv.weight.numel() + 64, generator=generator)
            if not self.conv.weight.is_meta:
                self.conv.weight.copy_(values[64:].view_as(self.conv.weight))
                self.conv.bias.copy_(values[:64])

    def forward(self, pixels):
        return self.conv(pixels)


def pipeline_with(name):
    """A model whose only expert has this name, with the same weights whatever it is."""
    if name not in mova.experts.names():
        mova.experts.register(replace(OWN, name=name), _Edges)
    small = small_config()
    config = MoVAConfig(
        small.text_config, small.text_encoder_config, small.base, [name], {"clip": small.encoder_sizes["clip"]},
        adapter_heads=4, num_routing_tokens=16, image_token_id=3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = MoVAForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.adapter.parameters():
            parameter.add_(0.01)
    processor = small_model().processor
    return MoVAPipeline(model, MoVAProcessor.for_config(config, processor.tokenizer, processor.question_tokenizer))


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    monkeypatch.setattr(mova.experts, "_REGISTRY", dict(mova.experts._REGISTRY))
    monkeypatch.setattr(mova.experts, "_BUILDERS", dict(mova.experts._BUILDERS))


@pytest.fixture
def expected():
    return pipeline_with("own").fuse(IMAGES, QUESTIONS, "all").tokens


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:.*names no expert")
def test_any_name(name, expected, tmp_path):
    """Its features are its own behind a routing pass, which keeps features of its own, and after saving and loading."""
    pipeline = pipeline_with(name)
    routes = pipeline.route(IMAGES, QUESTIONS)
    assert torch.equal(pipeline.fuse(IMAGES, QUESTIONS, "all").tokens, expected)
    assert [r.answer for r in pipeline.route(IMAGES, QUESTIONS)] == [r.answer for r in routes]
    pipeline.model.save_pretrained(tmp_path)
    pipeline.processor.save_pretrained(tmp_path)
    loaded = MoVAPipeline.from_pretrained(tmp_path)
    assert torch.equal(loaded.fuse(IMAGES, QUESTIONS, "all").tokens, expected)
