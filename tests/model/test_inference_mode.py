"""Inference mode around loading and answering leaves nothing behind that cannot be moved or trained with later."""

from __future__ import annotations

import pytest
import torch

from mova import MoVAForConditionalGeneration, MoVAPipeline
from mova.demo import small_model
from mova.demo.pictures import pictures

IMAGES, QUESTIONS, EXPERTS = [pictures()[0].image], [pictures()[0].question], [["sam", "deplot"]]


def trains(expert):
    """A step of training changes its weights, after a move to another dtype and back."""
    expert.to(torch.float64).to(torch.float32).requires_grad_(True)
    shape = (2, *expert._pixels_shape())
    expert(torch.rand(shape)).square().sum().backward()
    gradients = [p.grad for p in expert.parameters() if p.grad is not None]
    return any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("offload", [True, False])
def test_experts_that_were_loaded_in_inference_mode_train_later(saved_model, saved, offload):
    pipeline = MoVAPipeline.from_pretrained(saved_model) if saved else small_model()
    pipeline.model.experts.place(offload=offload)
    pipeline.model.experts.place("sam", dtype=torch.float64, offload=offload)
    with torch.inference_mode():
        pipeline.fuse(IMAGES, QUESTIONS, EXPERTS)
    for name in EXPERTS[0]:
        tensors = [*pipeline.model.experts[name].parameters(), *pipeline.model.experts[name].buffers()]
        assert not any(tensor.is_inference() for tensor in tensors)
    assert trains(pipeline.model.experts["sam"])


def test_a_model_that_was_loaded_in_inference_mode_trains_later(saved_model):
    with torch.inference_mode():
        model = MoVAForConditionalGeneration.from_pretrained(saved_model)
    assert not any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers()))
    loss = model(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss
    loss.backward()
    assert model.get_input_embeddings().weight.grad.any()


def test_features_that_were_kept_in_inference_mode_train_later():
    pipeline = small_model()
    with torch.inference_mode():
        pipeline.fuse(IMAGES, QUESTIONS, EXPERTS)
    assert len(pipeline.cache) > 0
    assert not any(tensor.is_inference() for tensor in pipeline.cache._entries.values())
    kept = next(iter(pipeline.cache._entries.values()))
    weight = torch.ones((), requires_grad=True)
    (kept * weight).sum().backward()
    assert torch.equal(weight.grad, kept.sum())


def test_inference_mode_changes_no_result():
    pipeline = small_model()
    expected = pipeline.fuse(IMAGES, QUESTIONS, EXPERTS).tokens
    with torch.inference_mode():
        assert torch.equal(small_model().fuse(IMAGES, QUESTIONS, EXPERTS).tokens, expected)
