"""What people who know transformers type: it means the same as the pipeline's own methods."""

from __future__ import annotations

import base64
import copy
from io import BytesIO

import pytest
import torch
from transformers import pipeline as of_transformers

from mova import MoVAPipeline, chat, experts, prompts
from mova.demo import small_model
from mova.demo.pictures import pictures
from mova.images import open_image, prepare
from mova.router import Router

PICTURES = pictures()
IMAGES, QUESTIONS = [p.image for p in PICTURES], [p.question for p in PICTURES]
CHOSEN = ["sam", "codetr"]
ARGUMENTS = {"tokenize": True, "add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}


@pytest.fixture
def pipeline(monkeypatch) -> MoVAPipeline:
    """A small model whose router always picks :data:`CHOSEN`."""
    pipeline = small_model()
    generate, places = Router.generate, pipeline.model.config.num_routing_tokens

    def instead(self, texts, image_tokens, **kwargs):
        found = generate(self, texts, image_tokens, **kwargs)
        return ["G, C"] * len(texts) if image_tokens.shape[1] == places else found

    monkeypatch.setattr(Router, "generate", instead)
    return pipeline


def turn(i: int, **image: object) -> dict:
    """A user's message with the i-th image and question."""
    content = [{"type": "image", **(image or {"image": IMAGES[i]})}, {"type": "text", "text": QUESTIONS[i]}]
    return {"role": "user", "content": content}


def features(pipeline: MoVAPipeline, inputs) -> torch.Tensor:
    names = ("pixel_values", "routing", "expert_pixel_values", "question_ids", "question_mask")
    with torch.no_grad():
        return pipeline.model.get_image_features(**{name: inputs[name] for name in names if name in inputs})


def new_text(pipeline: MoVAPipeline, inputs, **generate: object) -> list[str]:
    tokens = pipeline.model.generate(**inputs, **generate)[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in pipeline.processor.batch_decode(tokens, skip_special_tokens=True)]


def test_a_chat_is_routed_and_answered_as_the_pipeline_does_it(pipeline):
    (answer,) = pipeline.answer(IMAGES[:1], QUESTIONS[:1], max_new_tokens=8)
    inputs = pipeline.processor.apply_chat_template([turn(0)], **ARGUMENTS)
    assert answer.route.experts == tuple(CHOSEN)
    torch.testing.assert_close(features(pipeline, inputs), answer.tokens[None])
    assert new_text(pipeline, inputs, max_new_tokens=8) == [answer.text]


def test_several_chats_at_once(pipeline):
    answers = pipeline.answer(IMAGES[:3], QUESTIONS[:3], max_new_tokens=8)
    inputs = pipeline.processor.apply_chat_template([[turn(i)] for i in range(3)], padding=True, **ARGUMENTS)
    torch.testing.assert_close(features(pipeline, inputs), torch.stack([a.tokens for a in answers]), rtol=0, atol=1e-4)
    assert new_text(pipeline, inputs, max_new_tokens=8) == [answer.text for answer in answers]


def test_a_forward_routes_too(pipeline):
    inputs = pipeline.processor.apply_chat_template([turn(0)], **ARGUMENTS)
    by_hand = pipeline.processor.apply_chat_template([turn(0)], experts=CHOSEN, **ARGUMENTS)
    none = pipeline.processor.apply_chat_template([turn(0)], experts="none", **ARGUMENTS)
    with torch.no_grad():
        logits, expected, without = (pipeline.model(**given).logits for given in (inputs, by_hand, none))
    torch.testing.assert_close(logits, expected)
    assert (logits - without).abs().max() > 1e-3


def test_experts_that_are_given_are_not_asked_of_the_router(pipeline, monkeypatch):
    monkeypatch.setattr(Router, "ask", None)
    inputs = pipeline.processor.apply_chat_template([turn(0)], experts=["deplot"], **ARGUMENTS)
    (answer,) = pipeline.answer(IMAGES[:1], QUESTIONS[:1], experts=["deplot"], max_new_tokens=8)
    torch.testing.assert_close(features(pipeline, inputs), answer.tokens[None])
    assert new_text(pipeline, inputs, max_new_tokens=8) == [answer.text]


def test_every_image_has_all_questions_of_its_conversation(pipeline, monkeypatch):
    asked = []
    route = Router.route
    monkeypatch.setattr(Router, "route", lambda self, i, q: asked.extend(q) or route(self, i, q))
    reply = {"role": "assistant", "content": "Well."}
    first = [{"role": "system", "content": "Be brief."}, turn(0), reply, {"role": "user", "content": "Why?"}]
    inputs = pipeline.processor.apply_chat_template([first, [turn(1)]], **ARGUMENTS)
    found = features(pipeline, inputs)
    assert asked == [[QUESTIONS[0], "Why?"], [QUESTIONS[1]]]
    expected = pipeline.fuse(IMAGES[:2], [[QUESTIONS[0], "Why?"], QUESTIONS[1]], CHOSEN).tokens
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_a_chat_without_images_is_only_tokens(pipeline):
    inputs = pipeline.processor.apply_chat_template([{"role": "user", "content": "Hi"}], **ARGUMENTS)
    assert set(inputs) == {"input_ids", "attention_mask"}


def test_tokens_alone(pipeline):
    ids = pipeline.processor.apply_chat_template([turn(0)], tokenize=True)
    assert torch.equal(ids, pipeline.processor(IMAGES[0], pipeline.processor.conversation(QUESTIONS[0]))["input_ids"])


@pytest.mark.parametrize("batch_size", [1, 2])
def test_the_pipeline_of_transformers(pipeline, saved_model, batch_size):
    """The small model has the same weights wherever it is made."""
    answers = pipeline.answer(IMAGES[:2], QUESTIONS[:2], max_new_tokens=8)
    task = of_transformers("image-text-to-text", model=str(saved_model), device="cpu")
    found = task(text=[[turn(0)], [turn(1)]], max_new_tokens=8, batch_size=batch_size)
    rows = [row[0] if isinstance(row, list) else row for row in found]
    assert [row["generated_text"][-1]["content"].strip() for row in rows] == [answer.text for answer in answers]


def test_the_pipeline_of_transformers_takes_experts(pipeline, saved_model, monkeypatch):
    monkeypatch.setattr(Router, "ask", None)
    (answer,) = pipeline.answer(IMAGES[:1], QUESTIONS[:1], experts=["deplot"], max_new_tokens=8)
    task = of_transformers("image-text-to-text", model=str(saved_model), device="cpu")
    (row,) = task(text=[turn(0)], max_new_tokens=8, experts=["deplot"], return_full_text=False)
    assert row["generated_text"].strip() == answer.text


def encoded() -> bytes:
    file = BytesIO()
    IMAGES[0].save(file, "PNG")
    return file.getvalue()


WORD = base64.b64encode(encoded()).decode()


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": IMAGES[0]},
        {"type": "image", "image": encoded()},
        {"type": "image", "path": "a.png"},
        {"type": "image", "url": "a.png"},
        {"type": "image", "url": "https://host/a.png"},
        {"type": "image", "base64": WORD},
        {"type": "image", "url": f"data:image/png;base64,{WORD}"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{WORD}"}},
    ],
)
def test_an_image_wherever_it_comes_from(part, tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(encoded())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(chat, "load_image", lambda url: open_image("a.png") if url == "https://host/a.png" else None)
    (found,) = chat.chat_images([{"role": "user", "content": [part]}])
    assert found.image.tobytes() == IMAGES[0].tobytes()


@pytest.mark.parametrize(
    ("message", "error", "rule"),
    [
        (turn(0, image=IMAGES[0], path="a"), ValueError, "conversation must have one of image, url, path, base64"),
        (turn(0, base64="#"), ValueError, "conversation must have base64"),
        (turn(0, path="absent.png"), FileNotFoundError, "absent.png"),
        ({"role": "user", "content": [{"type": "image"}]}, ValueError, "images must be 1"),
        ({"role": "user", "content": [{"type": "audio"}]}, ValueError, "parts of type image or text, got 'audio'"),
        ("What?", TypeError, "conversation must hold messages with role and content, got 'What"),
        ({"role": "user", "content": 0}, TypeError, "conversation must have a string or a list of parts as content"),
        ({"role": "user", "content": "\ud800"}, ValueError, "conversation must be valid Unicode"),
        ({"content": "What?"}, ValueError, "conversation must have the role of each message, got None"),
        ({"role": "user", "content": 3}, TypeError, "conversation must have a string or a list of parts as content"),
        ({"role": "user", "content": [{"type": "text"}]}, TypeError, "must have text in a part of type text, got None"),
        ({"role": "user", "content": ["What?"]}, ValueError, "parts of type image or text, got 'What"),
        ({"role": "user", "content": [{"type": "image", "image": IMAGES[0]}]}, ValueError, "questions must not be"),
    ],
)
def test_a_bad_chat_is_named(pipeline, message, error, rule):
    with pytest.raises(error, match=rule):
        pipeline.processor.apply_chat_template([message], **ARGUMENTS)


def test_the_calls_own_arguments_stand_beside_the_templates(pipeline):
    arguments = {**ARGUMENTS, "padding": "max_length", "max_length": 400}
    assert pipeline.processor.apply_chat_template([turn(0)], **arguments)["input_ids"].shape == (1, 400)


def test_one_of_several_templates_by_its_name(pipeline, tmp_path):
    processor = copy.copy(pipeline.processor)
    processor.chat_template = {"default": "D{{ messages[0]['content'] }}", "rag": "R{{ messages[0]['content'] }}"}
    processor.save_pretrained(tmp_path)
    processor = type(processor).from_pretrained(tmp_path)
    chat = [{"role": "user", "content": "Hi"}]
    for template, expected in ((None, "DHi"), ("rag", "RHi"), ("X{{ messages|length }}", "X1")):
        assert processor.apply_chat_template(chat, template) == expected
    processor.chat_template = {"rag": "R"}
    with pytest.raises(ValueError, match="chat_template must be one of rag, got None"):
        processor.apply_chat_template(chat)


@pytest.mark.parametrize("name", ["do_sample", "num_beams"])
def test_arguments_of_generate_are_not_lost_in_the_processor(pipeline, name):
    for call in (
        lambda **more: pipeline.processor.apply_chat_template([turn(0)], **ARGUMENTS, **more),
        lambda **more: pipeline.processor(IMAGES[0], "<image>", **more),
    ):
        with pytest.raises(TypeError, match=rf"is for generate \(.*generate_kwargs.*, got \['{name}'\]"):
            call(**{name: 1})


def test_a_mask_of_the_assistants_tokens_is_refused(pipeline):
    with pytest.raises(ValueError, match="return_assistant_tokens_mask must be False"):
        pipeline.processor.apply_chat_template([turn(0)], **ARGUMENTS, return_assistant_tokens_mask=True)


def test_a_model_in_training_mode_is_not_asked_for_experts(pipeline):
    inputs = pipeline.processor.apply_chat_template([turn(0)], **ARGUMENTS)
    pipeline.model.train()
    with pytest.raises(ValueError, match="model must be in eval mode"):
        pipeline.model(**inputs)


def test_a_list_as_the_routing_is_refused(pipeline):
    inputs = pipeline.processor(IMAGES[0], "<image>")
    with pytest.raises(TypeError, match="routing must be a bool tensor"):
        pipeline.model.get_image_features(inputs["pixel_values"], [[True] * 7])


# The processor's call.


def test_padding_is_as_in_transformers(pipeline):
    processor = pipeline.processor
    texts = [processor.conversation("a"), processor.conversation("bcd")]
    plain = processor(IMAGES[:2], texts)
    padded = processor(images=IMAGES[:2], text=texts, padding=True, return_tensors="pt")
    assert plain.keys() == padded.keys() and all(torch.equal(plain[key], padded[key]) for key in plain)
    right = processor(images=IMAGES[:2], text=texts, padding=True, padding_side="right")
    assert right["attention_mask"][0].tolist() == plain["attention_mask"][0].tolist()[::-1]
    wide = processor(images=IMAGES[:2], text=texts, padding="max_length", max_length=200)
    assert wide["input_ids"].shape == (2, 200) and torch.equal(wide["pixel_values"], plain["pixel_values"])


def test_rows_of_several_lengths_without_padding_are_refused(pipeline):
    with pytest.raises(ValueError, match="padding"):
        pipeline.processor(text=["a", "bcd"], padding=False)


def test_max_length_without_truncation_cuts_nothing(pipeline):
    assert pipeline.processor(text="a" * 50, max_length=10, truncation=False)["input_ids"].shape == (1, 50)


def test_images_in_a_list_for_each_text(pipeline):
    texts = ["<image><image>", "<image>"]
    nested = pipeline.processor([IMAGES[:2], IMAGES[2:3]], texts)
    assert torch.equal(nested["pixel_values"], pipeline.processor(IMAGES[:3], texts)["pixel_values"])


def test_images_in_lists_that_do_not_fit_their_texts(pipeline):
    with pytest.raises(ValueError, match=r"images must be lists of \[1, 1\], as many as <image> in .*, got \[2, 0\]"):
        pipeline.processor([IMAGES[:2], []], ["<image>a", "<image>b"])


def test_no_images_for_the_image_processor(pipeline):
    with pytest.raises(ValueError, match="images must not be empty"):
        pipeline.processor.image_processor([])


def test_an_unknown_argument_is_named(pipeline):
    with pytest.raises(TypeError, match=r"must be one of experts, .* got \['paddings'\]"):
        pipeline.processor(text="a", paddings=True)


def test_the_image_processor_makes_what_the_base_encoder_takes(pipeline):
    processor = pipeline.processor.image_processor
    base = pipeline.model.config.base_expert
    expected = torch.stack([prepare(image, base) for image in IMAGES[:2]])
    assert torch.equal(processor(IMAGES[:2], return_tensors="pt")["pixel_values"], expected)
    assert torch.equal(processor.preprocess(IMAGES[0])["pixel_values"], expected[:1])
    assert (processor.size["height"], processor.image_mean) == (base.image_size, base.mean)


def test_the_questions_are_worded_as_for_the_pipeline(pipeline):
    """Where experts are given: the gates read the same text."""
    inputs = pipeline.processor.apply_chat_template([turn(0)], experts="all", **ARGUMENTS)
    expected = pipeline.processor.tokenize_questions([prompts(QUESTIONS[0], experts.OFFICIAL).text])
    assert torch.equal(inputs["question_ids"], expected["question_ids"])
