"""docs/mova.md: its examples run in their order."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from mova import experts
from mova.demo import small_model
from mova.demo.pictures import pictures

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "mova.md"


@pytest.mark.filterwarnings("ignore:the router's answer names no expert")
def test_the_examples_run(tmp_path, monkeypatch):
    monkeypatch.setattr(experts, "_REGISTRY", dict(experts._REGISTRY))
    monkeypatch.setattr(experts, "_BUILDERS", dict(experts._BUILDERS))
    pipeline = small_model()
    pipeline.model.save_pretrained(tmp_path / "my-mova")
    pipeline.processor.save_pretrained(tmp_path / "my-mova")
    for picture in pictures()[:2]:
        picture.image.save(tmp_path / f"{picture.name}.png")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for example in re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL):
        exec(compile(example, "docs/mova.md", "exec"), names)
    assert names["answers"][0].gates.shape == (3, 7)
    assert names["config"].adapter_config.expert_channels == (1536, 768, 32)
    assert names["target"] in ("A", "B", "C", "D", "E", "F", "G")
    with torch.no_grad():
        edges = names["mova"].VisionEncoder(names["own"])
        assert edges(torch.zeros(2, 3, 224, 224)).shape == (2, 196, 32)

    parts = pipeline.model.language_model, pipeline.model.text_encoder, pipeline.model.base.backbone
    with torch.device("meta"):
        model = names["assemble"](*parts)
    assert (model.language_model, model.text_encoder, model.base.backbone) == parts


def test_the_documents_it_links_exist():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", DOCUMENT.read_text()) if "://" not in link]
    assert links and all((DOCUMENT.parent / link).exists() for link in links)
