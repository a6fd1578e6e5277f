"""The arguments of an answer: what they do, what the generation config adds, what is refused before anything runs."""

from __future__ import annotations

import warnings

import pytest
from transformers import GenerationConfig

from mova.demo import small_model
from mova.demo.pictures import pictures

IMAGES, QUESTIONS = [picture.image for picture in pictures()[:2]], ["What?", "Why is it so?"]


@pytest.fixture(scope="module")
def whole():
    return small_model()


@pytest.fixture
def pipeline(whole, monkeypatch):
    monkeypatch.setattr(whole.model, "generation_config", GenerationConfig(pad_token_id=0))  # nothing ends early
    return whole


def new_tokens(pipeline, monkeypatch, **arguments):
    """How many tokens the model generated, without a warning."""
    lengths, generate = [], type(pipeline.model).generate

    def record(model, **kwargs):
        result = generate(model, **kwargs)
        sequences = getattr(result, "sequences", result)
        assert len(sequences) == len(kwargs["input_ids"])
        lengths.append(sequences.shape[1] - kwargs["input_ids"].shape[1])
        return result

    monkeypatch.setattr(type(pipeline.model), "generate", record)
    logged = []
    monkeypatch.setattr("transformers.generation.utils.logger.warning", lambda *a, **k: logged.append(a))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipeline.answer(IMAGES, QUESTIONS, experts="none", **arguments)
    assert not logged
    return lengths[0]


def prompt_length(pipeline):
    texts = [pipeline.processor.conversation(q) for q in QUESTIONS]
    return pipeline.processor.tokenize(texts, pipeline.model.config.num_image_tokens)["input_ids"].shape[1]


@pytest.mark.parametrize(
    ("config", "arguments", "expected"),
    [
        ({}, {"max_new_tokens": 3}, 3),
        ({"max_new_tokens": 4}, {}, 4),
        ({"max_new_tokens": 4}, {"max_new_tokens": 3}, 3),
        ({"max_length": 7}, {"max_new_tokens": 3}, 3),
        ({"max_new_tokens": 4, "max_length": 7}, {}, 4),
        ({}, {"generation_config": GenerationConfig(max_new_tokens=5)}, 5),
        ({"max_length": 9}, {"generation_config": GenerationConfig(max_new_tokens=5), "max_new_tokens": 2}, 2),
        ({"min_new_tokens": 9}, {"max_new_tokens": 3}, 3),
        ({"min_length": 9000}, {"max_new_tokens": 3}, 3),
        ({"num_return_sequences": 2, "num_beams": 2}, {"max_new_tokens": 3}, 3),
        ({"return_dict_in_generate": True, "output_scores": True}, {"max_new_tokens": 3}, 3),
    ],
)
def test_how_long_an_answer_is(pipeline, monkeypatch, config, arguments, expected):
    pipeline.model.generation_config = GenerationConfig(pad_token_id=0, **config)
    assert new_tokens(pipeline, monkeypatch, **arguments) == expected


@pytest.mark.parametrize("of", ["argument", "config"])
def test_max_length_counts_the_prompt(pipeline, monkeypatch, of):
    longest = prompt_length(pipeline) + 2
    if of == "config":
        pipeline.model.generation_config.max_length = longest
    assert new_tokens(pipeline, monkeypatch, **({"max_length": longest} if of == "argument" else {})) == 2


def test_the_least_length_holds_back_the_end(pipeline, monkeypatch):
    first = pipeline.processor.tokenizer.vocab_size
    end = list(range(first))  # everything ends an answer
    assert new_tokens(pipeline, monkeypatch, max_new_tokens=5, eos_token_id=end) == 1
    end.remove(7)
    assert new_tokens(pipeline, monkeypatch, max_new_tokens=5, eos_token_id=end, min_new_tokens=3) in (4, 5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_return_sequences": 2, "num_beams": 2}, ValueError, "num_return_sequences must be 1.*got 2"),
        ({"return_dict_in_generate": True}, ValueError, "return_dict_in_generate must be False"),
        ({"output_scores": True}, ValueError, "output_scores must be False"),
        ({"max_new_tokens": 2, "max_length": 900}, ValueError, "max_length must be None with max_new_tokens, got 900"),
        ({"max_length": 20}, ValueError, "max_length must be above the .* tokens of the prompt"),
        ({"max_new_tokens": 2, "min_new_tokens": 3}, ValueError, "min_length must be at most"),
        ({"max_new_tokens": True}, TypeError, "max_new_tokens must be an int"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be at least 1"),
        ({"max_new_token": 3}, TypeError, "max_new_token must be an argument of transformers' generate"),
        ({"input_ids": 3}, TypeError, "input_ids must be an argument"),
        ({"generation_config": {"max_new_tokens": 3}}, TypeError, "generation_config must be a GenerationConfig"),
    ],
)
def test_what_is_no_argument_of_an_answer(pipeline, arguments, error, message):
    with pytest.raises(error, match=message):
        pipeline.answer(IMAGES, QUESTIONS, experts="none", **arguments)


def test_a_prompt_without_room_is_refused_before_it_is_read(pipeline, monkeypatch):
    """Of a batch, the longest prompt counts; the model is not called. One that just fits is answered."""
    longest = prompt_length(pipeline)
    config = pipeline.model.config.text_config
    monkeypatch.setattr(config, "max_position_embeddings", longest)
    assert new_tokens(pipeline, monkeypatch, max_new_tokens=1) == 1
    monkeypatch.setattr(config, "max_position_embeddings", longest - 1)
    monkeypatch.setattr(type(pipeline.model), "generate", None)
    with pytest.raises(ValueError, match=f"at most {longest - 1} tokens.*, got {longest}$"):
        pipeline.answer(IMAGES, QUESTIONS, experts="none", max_new_tokens=1)


def test_scaled_positions_have_no_limit_in_the_config(pipeline, monkeypatch):
    config = pipeline.model.config.text_config
    monkeypatch.setattr(config, "max_position_embeddings", 8)
    monkeypatch.setattr(config, "rope_parameters", {**config.rope_parameters, "rope_type": "dynamic"})
    assert new_tokens(pipeline, monkeypatch, max_new_tokens=1) == 1


@pytest.mark.filterwarnings("ignore:the router's answer names no expert")
@pytest.mark.parametrize("of", ["argument", "config"])
def test_strings_that_stop_an_answer_do_not_stop_the_router(pipeline, monkeypatch, of):
    """They need a tokenizer, which the pipeline has."""
    plain = pipeline.answer(IMAGES[1:], QUESTIONS[1:], max_new_tokens=8)[0].text
    stop = [plain[1]]
    if of == "config":
        config = GenerationConfig(pad_token_id=0, stop_strings=stop)
        monkeypatch.setattr(pipeline.model, "generation_config", config)
    seen, generate = [], type(pipeline.model).generate

    def record(model, **kwargs):
        seen.append(kwargs.get("stop_strings", model.generation_config.stop_strings))
        return generate(model, **kwargs)

    monkeypatch.setattr(type(pipeline.model), "generate", record)
    given = {"stop_strings": stop} if of == "argument" else {}
    found = pipeline.answer(IMAGES[1:], QUESTIONS[1:], max_new_tokens=8, **given)[0].text
    assert seen == [None, stop]
    assert found == plain[:2] and len(plain) > 2
