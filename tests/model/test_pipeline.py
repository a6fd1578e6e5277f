"""The two passes: which encoders run on what, that a batch is its samples, and what is kept between questions."""

from __future__ import annotations

import copy
import warnings
from collections import Counter

import pytest
import torch
from PIL import Image, ImageOps

from mova import MoVAPipeline, experts
from mova.demo import small_model
from mova.demo.pictures import pictures
from mova.router import Router

NAMES = [expert.name for expert in experts.OFFICIAL]
# Sixteen samples: none, each expert alone, pairs, three, more than top-k, all.
MIXED = [
    (), ("sam",), ("dinov2",), ("vary", "codetr"), ("pix2struct", "deplot", "biomedclip"), (), ("sam", "dinov2"),
    ("codetr",), ("deplot",), tuple(NAMES), ("biomedclip", "vary"), ("pix2struct",), ("vary",),
    ("dinov2", "vary", "codetr", "sam"), ("biomedclip",), ("sam", "codetr", "dinov2"),
]  # fmt: skip


@pytest.fixture
def pipeline():
    return small_model()


@pytest.fixture
def images():
    """Sixteen different ones, of different shapes."""
    drawn = [picture.image for picture in pictures()]
    return [*drawn, *map(ImageOps.mirror, drawn[:4]), *map(ImageOps.flip, drawn), *map(ImageOps.invert, drawn[:2])]


@pytest.fixture
def questions():
    return [f"What is {'so ' * i}remarkable here?" for i in range(16)]


@pytest.fixture
def rows(pipeline, monkeypatch):
    """How many images each vision encoder, and how many questions the text encoder, has seen."""
    seen: Counter[str] = Counter()

    def watch(name, module):
        def count(_, args, kwargs):
            seen[name] += len(args[0])

        module.register_forward_pre_hook(count, with_kwargs=True)

    watch("clip", pipeline.model.base)
    watch("text", pipeline.model.text_encoder)
    for name in NAMES:
        watch(name, pipeline.model.experts[name])
    return seen


def says(monkeypatch, pipeline, answers):
    """Let the router answer this, one for each sample in turn; the second pass is the language model's own."""
    generate = type(pipeline.model).generate
    left = list(answers)
    tokens = pipeline.model.config.num_routing_tokens

    def instead(model, input_ids, image_features=None, **kwargs):
        if image_features.shape[1] != tokens:
            return generate(model, input_ids, image_features=image_features, **kwargs)
        given, left[: len(input_ids)] = left[: len(input_ids)], []
        encoded = pipeline.processor.tokenizer(given, padding=True, padding_side="right", return_tensors="pt")
        return torch.cat([input_ids, encoded["input_ids"]], 1)

    monkeypatch.setattr(type(pipeline.model), "generate", instead)


def test_a_sample_has_the_same_result_in_a_batch_of_sixteen_as_alone(pipeline, images, questions):
    together = pipeline.answer(images, questions, experts=MIXED, max_new_tokens=8)
    for i, answer in enumerate(together):
        pipeline.clear()
        (alone,) = pipeline.answer([images[i]], [questions[i]], experts=[MIXED[i]], max_new_tokens=8)
        torch.testing.assert_close(answer.tokens, alone.tokens, rtol=0, atol=1e-4)
        torch.testing.assert_close(answer.gates, alone.gates, rtol=0, atol=1e-4)
        assert (answer.text, answer.route) == (alone.text, alone.route)


def test_an_encoder_sees_exactly_the_images_that_selected_it(pipeline, images, questions, rows):
    pipeline.fuse(images, questions, MIXED)
    expected = Counter({name: sum(name in chosen for chosen in MIXED) for name in NAMES})
    assert rows == expected + Counter({"clip": 16, "text": sum(map(bool, MIXED))})


def test_a_second_question_runs_no_encoder_again(pipeline, images, questions, rows):
    pipeline.answer(images, questions, experts=MIXED, max_new_tokens=1)
    before = rows.copy()
    pipeline.answer(images, questions[::-1], experts=MIXED, max_new_tokens=1)
    del before["text"], rows["text"]
    assert rows == before


def test_only_a_further_expert_runs_for_a_second_question(pipeline, images, questions, rows):
    pipeline.fuse(images[:1], questions[:1], [["sam"]])
    before = rows.copy()
    pipeline.fuse(images[:1], questions[:1], [["sam", "vary"]])
    assert rows - before == Counter({"vary": 1})


def test_one_question_about_one_image_twice_is_computed_once(pipeline, images, questions, rows):
    same = images[0].copy()
    pipeline.fuse([images[0], same], [questions[0]] * 2, [["sam"], ["sam"]])
    assert rows == Counter({"clip": 1, "sam": 1, "text": 1})


def test_the_router_and_the_answer_share_the_base_encoder(pipeline, images, questions, rows, monkeypatch):
    says(monkeypatch, pipeline, ["A", "G, B", "none"])
    answers = pipeline.answer(images[:3], questions[:3], max_new_tokens=1)
    assert [a.route.experts for a in answers] == [("dinov2",), ("sam", "vary"), ()]
    assert [a.route.answer for a in answers] == ["A", "G, B", "none"]
    assert answers[0].route.letters["G"] == "sam"
    assert rows == Counter({"clip": 3, "dinov2": 1, "sam": 1, "vary": 1, "text": 2})


def test_routed_and_chosen_samples_in_one_batch(pipeline, images, questions, monkeypatch):
    says(monkeypatch, pipeline, ["C"])
    answers = pipeline.answer(images[:3], questions[:3], experts=["none", None, ["sam"]], max_new_tokens=1)
    assert [a.route.experts for a in answers] == [(), ("codetr",), ("sam",)]
    assert [a.route.answer for a in answers] == [None, "C", None]


def test_an_answer_that_names_nothing_means_no_expert_with_a_warning(pipeline, images, questions, monkeypatch):
    says(monkeypatch, pipeline, ["no idea"])
    with pytest.warns(UserWarning, match="no idea"):
        (answer,) = pipeline.answer(images[:1], questions[:1], max_new_tokens=1)
    assert answer.route.experts == ()


def test_the_router_sees_the_tokens_without_experts_averaged_two_by_two(pipeline, images, questions):
    tokens = pipeline.fuse(images[:2], questions[:2], "none").tokens.clone()
    base = torch.stack([pipeline.cache.get(key) for key in list(pipeline.cache._entries)])
    expected = tokens.unflatten(1, (4, 2, 4, 2)).mean((2, 4)).flatten(1, 2)
    torch.testing.assert_close(pipeline.model.routing_tokens(base), expected)


def test_gates_are_of_the_selected_experts_and_sum_to_one(pipeline, images, questions):
    gates = pipeline.fuse(images, questions, MIXED).gates
    assert gates.shape == (16, 3, 7)
    for sample, chosen in zip(gates, MIXED, strict=True):
        outside = [i for i, name in enumerate(NAMES) if name not in chosen]
        assert not sample[:, outside].any()
        torch.testing.assert_close(sample.sum(1), torch.full((3,), float(bool(chosen))))


def test_attention_maps_are_of_the_experts_that_are_used(pipeline, images, questions):
    """The numbers are tested with mova.inspection; here, that the right features are looked at."""
    maps = pipeline.attention_maps(images[0], questions[0], (3, 5), experts=["sam", "vary"], block=0)
    assert list(maps) == ["vary", "sam"]
    alone = pipeline.attention_maps(images[0], questions[0], (3, 5), experts=["sam"], block=0)
    torch.testing.assert_close(maps["sam"], alone["sam"])  # the first block's query knows no expert yet
    assert (maps["sam"] - maps["vary"]).abs().max() > 0.1 / 256
    assert maps["sam"].shape == (16, 16) and maps["sam"].sum() == pytest.approx(1)


def test_a_model_that_was_replaced_also_routes_and_answers(pipeline, images, questions, monkeypatch):
    """As with a compiled, quantised or wrapped copy."""
    before = pipeline.answer(images[:1], questions[:1])
    old, new, generated = pipeline.model, copy.copy(pipeline.model), []
    original = type(new).generate

    def generate(model, *arguments, **settings):
        generated.append(model)
        return original(model, *arguments, **settings)

    monkeypatch.setattr(type(new), "generate", generate)
    monkeypatch.setattr(pipeline, "model", new)
    after = pipeline.answer(images[:1], questions[:1])
    assert [answer.text for answer in after] == [answer.text for answer in before]
    assert generated and all(model is new and model is not old for model in generated)


@pytest.mark.parametrize("budget", [0, 40_000])
def test_a_small_or_no_cache_changes_no_result(pipeline, images, questions, budget):
    small = MoVAPipeline(pipeline.model, pipeline.processor, cache_bytes=budget)
    expected = pipeline.fuse(images, questions, MIXED).tokens
    torch.testing.assert_close(small.fuse(images, questions, MIXED).tokens, expected, rtol=0, atol=1e-4)
    assert small.cache.bytes <= budget


def test_clear_forgets_what_old_weights_made(pipeline, images, questions):
    before = pipeline.fuse(images[:1], questions[:1], "none").tokens.clone()
    with torch.no_grad():
        for parameter in pipeline.model.base.parameters():
            parameter.mul_(2)
    torch.testing.assert_close(pipeline.fuse(images[:1], questions[:1], "none").tokens, before)
    pipeline.clear()
    assert (pipeline.fuse(images[:1], questions[:1], "none").tokens - before).abs().max() > 1e-3


def test_experts_by_name_are_for_all_images(pipeline, images, questions):
    named = pipeline.fuse(images[:3], questions[:3], ["dinov2", "sam"]).tokens
    listed = pipeline.fuse(images[:3], questions[:3], [["sam", "dinov2"]] * 3).tokens
    assert torch.equal(named, listed)


def test_all_is_every_expert(pipeline, images, questions):
    assert torch.equal(
        pipeline.fuse(images[:2], questions[:2], "all").tokens, pipeline.fuse(images[:2], questions[:2], NAMES).tokens
    )


def test_a_restricted_pool_is_all_that_the_router_is_offered(pipeline, images, questions, monkeypatch):
    pipeline.model.experts.only(["sam", "vary"])
    says(monkeypatch, pipeline, ["A, B, C"])
    (answer,) = pipeline.answer(images[:1], questions[:1], max_new_tokens=1)
    assert answer.route.letters == {"A": "vary", "B": "sam"}
    assert answer.route.experts == ("vary", "sam")
    with pytest.raises(ValueError, match=r"must be one of the experts in use .vary, sam., got 'dinov2'"):
        pipeline.fuse(images[:1], questions[:1], ["dinov2"])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([], []), ValueError, "images must not be empty"),
        ((["x"], ["What?"]), FileNotFoundError, "x"),
        (([b"no image"], ["What?"]), ValueError, "image"),
        (([Image.new("RGB", (8, 8))], [" "]), ValueError, r"questions\[0\] must not be empty"),
        (([Image.new("RGB", (8, 8))], []), ValueError, "questions must be 1"),
        ((Image.new("RGB", (8, 8)), ["What?"]), TypeError, "images must be a list"),
        (([Image.new("RGB", (8, 8))], "What?"), TypeError, "questions must be a list"),
    ],
)
def test_bad_input_is_named(pipeline, arguments, error, message):
    with pytest.raises(error, match=message):
        pipeline.answer(*arguments, experts="none")


@pytest.mark.parametrize(
    ("chosen", "error"), [(["bert"], ValueError), ("sam", ValueError), ([["sam"], "none"], ValueError), (3, TypeError)]
)
def test_bad_experts_are_named(pipeline, images, questions, chosen, error):
    with pytest.raises(error, match="experts"):
        pipeline.answer(images[:1], questions[:1], experts=chosen)


def test_the_suffix_goes_where_it_is_wanted(pipeline, images, questions, monkeypatch):
    texts: list[list[str]] = []
    generate = Router.generate

    def record(self, asked, tokens, **kwargs):
        texts.append(list(asked))
        return generate(self, asked, tokens, **kwargs)

    monkeypatch.setattr(Router, "generate", record)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the random router names nothing
        pipeline.answer(images[:1], questions[:1], suffix="In one word.", max_new_tokens=1)
    (router,), (answer,) = texts
    assert answer.endswith("In one word.") and "In one word." not in router


def test_the_router_is_greedy_whatever_the_answer_is(pipeline, images, questions, monkeypatch):
    sampled = []
    generate = type(pipeline.model).generate

    def record(model, *args, **kwargs):
        sampled.append(kwargs.get("do_sample"))
        return generate(model, *args, **kwargs)

    monkeypatch.setattr(type(pipeline.model), "generate", record)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the random router names nothing
        pipeline.answer(images[:1], questions[:1], max_new_tokens=1, do_sample=True)
    assert sampled == [False, True]


def test_streaming_and_beams(pipeline, images, questions):
    class Streamer:
        pieces = 0

        def put(self, value):
            self.pieces += 1

        def end(self):
            self.ended = True

    streamer = Streamer()
    (answer,) = pipeline.answer(images[:1], questions[:1], experts="none", max_new_tokens=4, streamer=streamer)
    assert streamer.pieces > 1 and streamer.ended
    (searched,) = pipeline.answer(images[:1], questions[:1], experts="none", max_new_tokens=4, num_beams=2)
    assert torch.equal(searched.tokens, answer.tokens)
