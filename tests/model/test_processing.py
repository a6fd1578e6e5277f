"""Texts, images and questions as the model takes them."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from mova import MoVAImageProcessor, MoVAProcessor, experts, prompts
from mova.demo import small_model
from mova.demo.pictures import pictures
from mova.images import prepare

IMAGE = Image.new("RGB", (30, 20), "teal")
OWN_TEMPLATE = (
    "<s>{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.fixture
def processor():
    return small_model().processor


def test_an_image_takes_its_tokens_and_rows_are_padded_on_the_left(processor):
    inputs = processor([IMAGE, IMAGE], ["<image>a", "<image>bcd"])
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    assert ids.shape == (2, 64 + 3) and (ids == processor.image_token_id).sum(1).tolist() == [64, 64]
    assert mask.tolist() == [[0, 0] + [1] * 65, [1] * 67]
    assert (ids[mask == 0] == processor.tokenizer.pad_token_id).all()
    assert processor.tokenizer.decode(ids[1, 64:]) == "bcd"


def test_images_go_to_their_places_in_order(processor):
    images = [picture.image for picture in pictures()[:3]]
    inputs = processor(images, ["<image> and <image>", "<image>"])
    base = small_model().model.config.base_expert
    expected = torch.stack([prepare(image, base) for image in images])
    assert torch.equal(inputs["pixel_values"], expected)
    assert (inputs["input_ids"] == processor.image_token_id).sum(1).tolist() == [128, 64]


def test_a_text_without_images(processor):
    assert set(processor(text="only words")) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize(("images", "text"), [([IMAGE, IMAGE], "<image>"), (None, "<image>"), (IMAGE, "none")])
def test_as_many_images_as_places(processor, images, text):
    with pytest.raises(ValueError, match=r"images must be \d, as many as <image> in text"):
        processor(images, text)


def test_a_cut_that_would_lose_image_tokens_is_an_error_that_names_the_row(processor):
    with pytest.raises(ValueError, match=r"max_length must leave text\[1\] its 64 image tokens, got 66"):
        processor([IMAGE, IMAGE], ["<image>a", "abcdefgh<image>"], max_length=66)


def test_a_cut_of_words_alone_is_none(processor):
    inputs = processor(IMAGE, "<image>" + "a" * 99, max_length=70)
    assert inputs["input_ids"].shape == (1, 70)


def test_an_expert_gets_the_images_that_use_it(processor):
    images = [picture.image for picture in pictures()[:3]]
    chosen = [["sam", "deplot"], [], ["sam"]]
    inputs = processor(images, ["<image>"] * 3, experts=chosen, questions=["a", "b", "c"])
    pool = {expert.name: expert for expert in processor.pool}
    assert inputs["routing"].tolist() == [[name in row for name in pool] for row in chosen]
    assert set(inputs["expert_pixel_values"]) == {"sam", "deplot"}
    expected = torch.stack([prepare(images[i], pool["sam"]) for i in (0, 2)])
    assert torch.equal(inputs["expert_pixel_values"]["sam"], expected)
    assert inputs["expert_pixel_values"]["deplot"].shape == (1, 144, 2 + 3 * 64)
    assert inputs["question_ids"].shape == inputs["question_mask"].shape == (3, 3)


def test_no_question_is_needed_without_experts(processor):
    inputs = processor(IMAGE, "<image>", experts="none")
    assert not inputs["routing"].any() and "question_ids" not in inputs
    with pytest.raises(ValueError, match="questions must be given"):
        processor(IMAGE, "<image>", experts=["sam"])


def test_questions_are_padded_on_the_right_and_cut_at_the_models_length(processor):
    found = processor.tokenize_questions(["a", "abc " * 400])
    assert found["question_ids"].shape == (2, 512)
    assert found["question_mask"].sum(1).tolist() == [3, 512]
    assert found["question_ids"][0, :3].tolist()[0] == processor.question_tokenizer.cls_token_id


def test_a_conversation_begins_with_one_bos_only(processor):
    text = processor.conversation("What?")
    ids = processor(IMAGE, text)["input_ids"][0].tolist()
    assert ids.count(processor.tokenizer.bos_token_id) == 1 and ids[0] == processor.tokenizer.bos_token_id


@pytest.mark.parametrize("place", ["tokenizer", "processor"])
def test_a_template_of_ones_own(processor, place):
    (processor.tokenizer if place == "tokenizer" else processor).chat_template = OWN_TEMPLATE
    assert processor.conversation("What?") == "<s>[user] <image>\nWhat?</s>[assistant] "


def test_the_system_prompt_comes_first_unless_the_conversation_has_one(processor):
    processor.chat_template, processor.system_prompt = OWN_TEMPLATE, "Be brief."
    assert processor.conversation("What?").startswith("<s>[system] Be brief.</s>[user]")
    given = [{"role": "system", "content": "Be long."}, {"role": "user", "content": "What?"}]
    assert processor.apply_chat_template(given) == "<s>[system] Be long.</s>[user] What?</s>[assistant] "


def test_a_content_of_parts(processor):
    processor.chat_template = OWN_TEMPLATE
    parts = [{"type": "image"}, {"type": "text", "text": "What?"}]
    assert processor.apply_chat_template([{"role": "user", "content": parts}]) == processor.conversation("What?")
    with pytest.raises(ValueError, match="must hold parts of type image or text, got 'video'"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "video"}]}])


def test_several_turns(processor):
    turns = [("user", "Hi"), ("assistant", "Hello"), ("user", "Bye")]
    text = processor.apply_chat_template([{"role": role, "content": content} for role, content in turns])
    assert text == "<s>USER: Hi\nASSISTANT: Hello</s>\nUSER: Bye\nASSISTANT:"


def test_saved_and_found_again(processor, tmp_path):
    processor.system_prompt, processor.routing_template = "Be brief.", "{pool} {question}"
    processor.chat_template = OWN_TEMPLATE
    processor.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "mova"}')
    again = AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is MoVAProcessor
    assert (again.pool, again.base, again.topk) == (processor.pool, processor.base, processor.topk)
    assert (again.system_prompt, again.routing_template) == ("Be brief.", "{pool} {question}")
    arguments = IMAGE, again.conversation("What?")
    question = prompts("What?", experts.OFFICIAL).text
    for key, value in processor(*arguments, experts="all", questions=question).items():
        found = again(*arguments, experts="all", questions=question)[key]
        pairs = zip(value.values(), found.values(), strict=True) if isinstance(value, dict) else [(value, found)]
        assert all(torch.equal(a, b) for a, b in pairs), key


def test_the_image_processor_is_found_by_itself(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    found = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(found) is MoVAImageProcessor
    assert torch.equal(found(IMAGE)["pixel_values"], processor.image_processor(IMAGE)["pixel_values"])


def test_a_folder_from_before_image_processors_were_saved(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    file = tmp_path / "processor_config.json"
    fields = json.loads(file.read_text())
    del fields["image_processor"]
    file.write_text(json.dumps(fields))
    assert AutoProcessor.from_pretrained(tmp_path).to_dict() == processor.to_dict()


def test_a_tokenizer_must_number_the_placeholder_as_the_model_does(processor):
    config = small_model().model.config
    config.image_token_id = 7
    with pytest.raises(ValueError, match=r"tokenizer must number <image> as the model does \(7\), got 3"):
        MoVAProcessor.for_config(config, processor.tokenizer, processor.question_tokenizer)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"text": 3}, TypeError, "text must be"),
        ({"text": []}, TypeError, "text must be"),
        ({"text": "a", "return_tensors": "np"}, ValueError, "return_tensors must be 'pt'"),
        ({"images": IMAGE, "text": "<image>", "experts": ["bert"]}, ValueError, "experts must be"),
        ({"images": IMAGE, "text": "<image>", "experts": "sam"}, ValueError, "experts must be 'all'"),
        (
            {"images": [IMAGE] * 2, "text": ["<image>"] * 2, "experts": "all", "questions": ["a"]},
            ValueError,
            "questions",
        ),
    ],
)
def test_bad_input_is_named(processor, arguments, error, message):
    with pytest.raises(error, match=message):
        processor(**arguments)
