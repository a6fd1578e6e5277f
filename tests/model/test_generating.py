"""Every way of generating that transformers has: greedy tokens are the model's own best, whatever loop finds them."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from mova import prompts
from mova.demo import small_model
from mova.demo.pictures import pictures

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


def generated(model, inputs, assistants, mode, new=NEW):
    mode = {**mode, "assistant_model": assistants[mode["assistant_model"]]} if "assistant_model" in mode else mode
    result = model.generate(**inputs, max_new_tokens=new, do_sample=False, pad_token_id=0, **mode)
    return result[:, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize("mode", MODES)
def test_every_loop_finds_the_best_tokens_of_a_batch(pipeline, two, mode):
    assert torch.equal(generated(pipeline.model, two, {}, MODES[mode]), best(pipeline.model, two))


@pytest.mark.parametrize("mode", ALONE)
def test_every_loop_with_candidates_finds_the_best_tokens(pipeline, one, mode):
    assistants = {"language": copy.deepcopy(pipeline.model.language_model), "whole": small_model(seed=1).model}
    assert torch.equal(generated(pipeline.model, one, assistants, ALONE[mode]), best(pipeline.model, one))


# The same situations in transformers' own LLaVA: what works there works here (the tests above); its text-only assistant
# and its chunks fail before 5.24, and what it refuses is refused here with a reason.


def test_a_model_that_exits_early_is_refused(pipeline, one):
    with pytest.raises(ValueError, match="assistant_early_exit must be None"):
        pipeline.model.generate(**one, max_new_tokens=2, assistant_early_exit=1)


def test_paged_batches_take_no_images(pipeline, one):
    with pytest.raises(ValueError, match="cache_implementation must not be 'paged' with images"):
        pipeline.model.generate(**one, max_new_tokens=2, cache_implementation="paged")


@pytest.mark.parametrize("how", ["merged, with input_ids", "merged", "with placeholders"])
def test_embeddings_instead_of_tokens(pipeline, two, how):
    model, features = pipeline.model, features_of(pipeline.model, two)
    given = {"inputs_embeds": model.embed(two["input_ids"], features)}
    if how == "merged, with input_ids":
        given["input_ids"] = two["input_ids"]
    if how == "with placeholders":
        given = {"inputs_embeds": model.get_input_embeddings()(two["input_ids"]), "image_features": features}
    found = model.generate(**given, attention_mask=two["attention_mask"], max_new_tokens=NEW, do_sample=False)
    assert torch.equal(found[:, -NEW:], best(model, two))


def test_embeddings_alone_cannot_have_candidates(pipeline, one):
    embedded = pipeline.model.embed(one["input_ids"], features_of(pipeline.model, one))
    with pytest.raises(ValueError, match="inputs_embeds must come with input_ids"):
        pipeline.model.generate(inputs_embeds=embedded, max_new_tokens=4, prompt_lookup_num_tokens=3)


@pytest.mark.parametrize("of", ["argument", "config", "model", "model, with a config"])
def test_embeddings_alone_cannot_be_read_in_chunks(pipeline, one, of, monkeypatch):
    model, arguments = pipeline.model, {"prefill_chunk_size": 16}
    embedded = model.embed(one["input_ids"], features_of(model, one))
    if of == "config":
        arguments = {"generation_config": GenerationConfig(prefill_chunk_size=16)}
    if of.startswith("model"):
        monkeypatch.setattr(model.generation_config, "prefill_chunk_size", 16)
        arguments = {"generation_config": GenerationConfig(num_beams=1)} if of != "model" else {}
    with pytest.raises(ValueError, match="prefill_chunk_size must be None with inputs_embeds alone, got 16"):
        model.generate(inputs_embeds=embedded, max_new_tokens=4, **arguments)


def test_rows_that_are_padded_on_the_right_are_refused(pipeline, two):
    """Their answers would begin behind the padding."""
    mask = two["attention_mask"].flip(1)
    assert not mask[:, -1].all()
    with pytest.raises(ValueError, match="attention_mask must be 1 in its last column: pad on the left"):
        pipeline.model.generate(**{**two, "attention_mask": mask}, max_new_tokens=2)


def test_without_a_mask_padding_is_what_transformers_takes_for_it(pipeline, two):
    model, (first, second) = pipeline.model, two["input_ids"]
    padding = model.generation_config.pad_token_id
    assert (first != padding).all() and second[0] == padding
    left = {**two, "attention_mask": None}
    found = model.generate(**left, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(found[:, -NEW:], best(model, two))
    number = int((second == padding).sum())
    with pytest.raises(ValueError, match="attention_mask must be 1 in its last column: pad on the left"):
        model.generate(**{**left, "input_ids": torch.stack([first, second.roll(-number)])}, max_new_tokens=2)


@pytest.mark.parametrize(
    ("name", "value"), [("num_beams", "2"), ("num_beams", 0), ("prefill_chunk_size", True), ("stop_strings", 5)]
)
def test_values_that_transformers_does_not_look_at(pipeline, one, name, value):
    with pytest.raises((TypeError, ValueError), match=f"{name} must be"):
        pipeline.model.generate(**one, max_new_tokens=2, **{name: value})


def test_a_placeholder_that_was_generated_is_a_token_like_any_other(pipeline, one):
    model, place = pipeline.model, pipeline.model.config.image_token_id
    found = model.generate(**one, max_new_tokens=3, prefix_allowed_tokens_fn=lambda *_: [place])
    assert found[0, -3:].tolist() == [place] * 3


def test_sequences_of_several_images_keep_their_own(pipeline, two):
    """Rows that are repeated have their images repeated together: [A, B, A, B] and not [A, A, B, B]."""
    found = generated(pipeline.model, two, {}, {"num_beams": 2, "num_return_sequences": 2}, new=4)
    model, features = pipeline.model, features_of(pipeline.model, two)
    expected = model.language_model.generate(
        inputs_embeds=model.embed(two["input_ids"], features), attention_mask=two["attention_mask"], max_new_tokens=4,
        num_beams=2, num_return_sequences=2, do_sample=False, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    assert torch.equal(found, expected)


# A conversation that goes on with its cache.


CACHE = "cache" if hasattr(CausalLMOutputWithPast(), "cache") else "past_key_values"  # its name before 5.24


@pytest.fixture
def turns(pipeline):
    """Two turns with an image each, as inputs of one conversation; and the first one's length and images."""
    first, second = (pipeline.processor.conversation(q) for q in ("What is it?", "And this, what is it?"))
    whole = inputs_for(pipeline, first + second, images=IMAGES[:2])
    length = pipeline.processor.tokenize([first], pipeline.model.config.num_image_tokens)["input_ids"].shape[1]
    return whole, length, features_of(pipeline.model, whole)


@torch.no_grad()
def cache_of(model, ids, features):
    return getattr(model(input_ids=ids, image_features=features, use_cache=True), CACHE)


@pytest.mark.parametrize("cut", [0, 7, -5], ids=["as it was", "cropped", "extended"])
@torch.no_grad()
def test_a_second_image_is_seen_whatever_the_cache(pipeline, turns, cut):
    model, (whole, length, features) = pipeline.model, turns
    ids = whole["input_ids"]
    cache = cache_of(model, ids[:, : length + max(-cut, 0)], features[:1])
    if cut > 0:
        cache.crop(-cut)
    rest = ids[:, length - cut :]
    expected = model(input_ids=ids, image_features=features).logits[:, length - cut :]
    found = model(input_ids=rest, image_features=features[1:], **{CACHE: cache}).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("images", [0, 2])
def test_placeholders_and_images_fit_whatever_the_cache(pipeline, turns, images):
    model, (whole, length, features) = pipeline.model, turns
    cache = cache_of(model, whole["input_ids"][:, :length], features[:1])
    given = features[:images] if images else None
    with pytest.raises(ValueError, match=f"one placeholder for each of {images * features.shape[1]} image tokens, got"):
        model(input_ids=whole["input_ids"][:, length:], image_features=given, **{CACHE: cache})
    with pytest.raises(ValueError, match="one placeholder"):
        model(input_ids=torch.tensor([[model.config.image_token_id]]), **{CACHE: cache})


@pytest.mark.parametrize("given", ["all tokens, all images", "all tokens, new image", "new tokens, new image"])
def test_generating_goes_on_with_a_cache(pipeline, turns, given):
    model, (whole, length, features) = pipeline.model, turns
    cache = cache_of(model, whole["input_ids"][:, :length], features[:1])
    ids = whole["input_ids"][:, length:] if given.startswith("new") else whole["input_ids"]
    images = features if given.endswith("all images") else features[1:]
    found = model.generate(
        ids, whole["attention_mask"], image_features=images, max_new_tokens=NEW, do_sample=False, **{CACHE: cache}
    )
    assert torch.equal(found[:, -NEW:], best(model, whole))


@pytest.mark.parametrize("candidates", ["prompt lookup", "an assistant"])
def test_candidates_need_an_empty_cache(pipeline, turns, candidates):
    """transformers' loop would give other tokens than the model's own best, for any model."""
    model, (whole, length, features) = pipeline.model, turns
    cache = cache_of(model, whole["input_ids"][:, :length], features[:1])
    how = {"assistant_model": model.language_model}
    if candidates == "prompt lookup":
        how = {"prompt_lookup_num_tokens": 3}
    ids, mask = whole["input_ids"], whole["attention_mask"]
    with pytest.raises(ValueError, match=f"past_key_values must be empty when candidates are tried, got '{length} tok"):
        model.generate(ids, mask, image_features=features, max_new_tokens=NEW, **how, **{CACHE: cache})


@pytest.mark.parametrize("given", ["all", "new"])
def test_chunks_of_a_prompt_behind_a_cache(pipeline, turns, given):
    """transformers before 5.24 begins again at the cache's first token."""
    model, (whole, length, features) = pipeline.model, turns
    cache = cache_of(model, whole["input_ids"][:, :length], features[:1])
    ids = whole["input_ids"] if given == "all" else whole["input_ids"][:, length:]
    images = features if given == "all" else features[1:]
    arguments = {"max_new_tokens": NEW, "do_sample": False, "prefill_chunk_size": 16, CACHE: cache}
    if CACHE == "past_key_values":
        with pytest.raises(ValueError, match="prefill_chunk_size must be None if the cache is not empty"):
            model.generate(ids, whole["attention_mask"], image_features=images, **arguments)
        return
    found = model.generate(ids, whole["attention_mask"], image_features=images, **arguments)
    assert torch.equal(found[:, -NEW:], best(model, whole))


def test_images_in_inputs_embeds_without_their_places_are_refused(pipeline):
    with pytest.raises(ValueError, match="one placeholder for each of 3 image tokens, got 0"):
        pipeline.model(inputs_embeds=torch.randn(1, 4, 96), image_features=torch.randn(1, 3, 96))


def test_an_assistant_of_another_width_says_so(pipeline, one):
    narrow = LlamaConfig(
        vocab_size=512, hidden_size=32, intermediate_size=32, num_attention_heads=2, num_hidden_layers=1
    )
    assistant = small_model(text_config=narrow).model
    with pytest.raises(ValueError, match=r"image_features must be of shape \(M, T, 32\)"):
        pipeline.model.generate(**one, max_new_tokens=4, assistant_model=assistant)
