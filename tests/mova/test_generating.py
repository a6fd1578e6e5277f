"""Every way of generating that transformers offers: greedy tokens are the model's own best, whatever the loop."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from mova import prompts
from mova.demo import small_model
from mova.pictures import pictures

IMAGES = [picture.image for picture in pictures()]
NEW = 8


@pytest.fixture(scope="module")
def pipeline():
    pipeline = small_model()
    pipeline.model.generation_config.eos_token_id = None  # nothing ends early
    return pipeline


def inputs_for(pipeline, *texts, images):
    processor = pipeline.processor
    asked = [prompts("What?", processor.pool).text] * len(images)
    return dict(processor(images, list(texts), experts=[["sam"], ["vary"], []][: len(images)], questions=asked))


@pytest.fixture(scope="module")
def two(pipeline):
    """A left-padded batch: two images in the first row, one in the second."""
    texts = (pipeline.processor.conversation("Which differs?", images=2), pipeline.processor.conversation("Why?"))
    return inputs_for(pipeline, *texts, images=IMAGES[:3])


@pytest.fixture(scope="module")
def one(pipeline):
    return inputs_for(pipeline, pipeline.processor.conversation("What is it, it is what?"), images=IMAGES[:1])


@torch.no_grad()
def best(model, inputs, new=NEW):
    """The greedy tokens, by a forward of everything for each of them."""
    features = features_of(model, inputs)
    embedded, mask = model.embed(inputs["input_ids"], features), inputs["attention_mask"]
    found = []
    for _ in range(new):
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        out = model.language_model(inputs_embeds=embedded, attention_mask=mask, position_ids=positions, use_cache=False)
        found.append(out.logits[:, -1].argmax(-1, keepdim=True))
        embedded = torch.cat([embedded, model.get_input_embeddings()(found[-1])], 1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return torch.cat(found, 1)


@torch.no_grad()
def features_of(model, inputs):
    return model.get_image_features(**{k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")})


def loop(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
    """A greedy loop of one's own that gives prepare_inputs_for_generation the newest token alone."""
    first, step = True, input_ids
    for _ in range(NEW):
        inputs = model.prepare_inputs_for_generation(step, is_first_iteration=first, **model_kwargs)
        out = model(**inputs, return_dict=True)
        model_kwargs = model._update_model_kwargs_for_generation(out, model_kwargs)
        step = out.logits[:, -1:].argmax(-1)
        input_ids, first = torch.cat([input_ids, step], 1), False
    return input_ids


MODES = {
    "greedy": {},
    "without a cache": {"use_cache": False},
    "chunked": {"prefill_chunk_size": 16},
    "static": {"cache_implementation": "static"},
    "chunked static": {"cache_implementation": "static", "prefill_chunk_size": 50},
    "own loop": {"custom_generate": loop},
}
ALONE = {  # transformers takes one row
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "assistant": {"assistant_model": "language"},
    "assistant with images": {"assistant_model": "whole"},
}


@pytest.fixture(scope="module")
def llava():
    """A tiny LLaVA, and its inputs: the same situation in transformers' own model."""
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_id=5)).eval()
    ids = torch.tensor([[1, 7, 5, 5, 5, 5, 9, 8, 11, 9, 8]])
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(1, 3, 28, 28)}


def generated(model, inputs, assistants, mode, new=NEW):
    mode = {**mode, "assistant_model": assistants[mode["assistant_model"]]} if "assistant_model" in mode else mode
    mode = (
        {**mode, "prefill_chunk_size": 4}
        if model.config.model_type == "llava" and "prefill_chunk_size" in mode
        else mode
    )
    result = model.generate(**inputs, max_new_tokens=new, do_sample=False, pad_token_id=0, **mode)
    return result[:, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize("mode", MODES)
def test_every_loop_finds_the_best_tokens_of_a_batch(pipeline, two, mode):
    assert torch.equal(generated(pipeline.model, two, {}, MODES[mode]), best(pipeline.model, two))


@pytest.mark.parametrize("mode", ALONE)
def test_every_loop_with_candidates_finds_the_best_tokens(pipeline, one, mode):
    assistants = {"language": copy.deepcopy(pipeline.model.language_model), "whole": small_model(seed=1).model}
    assert torch.equal(generated(pipeline.model, one, assistants, ALONE[mode]), best(pipeline.model, one))
