"""A model whose parts others hold: offloaded by accelerate, wrapped by peft, compiled by torch."""

from __future__ import annotations

import warnings

import pytest
import torch
from accelerate import cpu_offload
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from mova import MoVAPipeline
from mova._wrapped import compute_device, unwrapped
from mova.demo import small_model
from mova.demo.pictures import pictures
from mova_kernels import MoVAdapter

PARTS = ("language_model", "base", "text_encoder", "adapter")
IMAGES, QUESTIONS = [picture.image for picture in pictures()[:2]], ["What?", "Why is it so?"]
EXPERTS = [["deplot"], ["sam", "vary"]]


@pytest.fixture(scope="module")
def expected():
    return outcome(small_model())


def outcome(pipeline):
    maps = pipeline.attention_maps(IMAGES[1], QUESTIONS[1], (3, 5), experts=["sam"])
    answers = pipeline.answer(IMAGES, QUESTIONS, experts=EXPERTS, max_new_tokens=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the random router names nothing
        routes = pipeline.route(IMAGES, QUESTIONS)
    return answers, maps["sam"], [route.answer for route in routes]


def assert_same(found, expected):
    for answer, wanted in zip(found[0], expected[0], strict=True):
        assert answer.text == wanted.text
        torch.testing.assert_close(answer.tokens, wanted.tokens, rtol=0, atol=1e-4)
        torch.testing.assert_close(answer.gates, wanted.gates, rtol=0, atol=1e-5)
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-5)
    assert found[2] == expected[2]


@pytest.mark.parametrize("placed", [True, False], ids=["placed", "not placed"])
@pytest.mark.parametrize("whole", [True, False], ids=["encoder", "backbone"])
def test_an_expert_that_accelerate_offloads(expected, whole, placed):
    pipeline = small_model()
    pipeline.model.experts.place("sam", offload=placed)
    encoder = pipeline.model.experts["sam"]
    cpu_offload(encoder if whole else encoder.backbone, execution_device="cpu")
    assert any(p.is_meta for p in encoder.parameters())
    assert_same(outcome(pipeline), expected)


@pytest.mark.parametrize("part", PARTS)
def test_a_part_on_disk_changes_nothing(saved_model, tmp_path, expected, part):
    where = {name: "disk" if name == part else "cpu" for name in PARTS}
    pipeline = MoVAPipeline.from_pretrained(saved_model, device_map=where, offload_folder=tmp_path)
    assert any(p.is_meta for p in getattr(pipeline.model, part).parameters())
    assert pipeline.model.device == torch.device("cpu")
    assert_same(outcome(pipeline), expected)


def test_all_parts_in_the_hosts_memory_change_nothing(expected):
    from accelerate import cpu_offload

    pipeline = small_model()
    cpu_offload(pipeline.model, execution_device="cpu")
    assert all(p.is_meta for p in pipeline.model.parameters())
    assert_same(outcome(pipeline), expected)


def test_a_device_map_for_little_memory_changes_nothing(saved_model, tmp_path, expected):
    pipeline = MoVAPipeline.from_pretrained(
        saved_model, device_map="auto", max_memory={"cpu": 2_000_000}, offload_folder=tmp_path
    )
    assert any(p.is_meta for p in pipeline.model.parameters())
    assert_same(outcome(pipeline), expected)


def test_an_offloaded_language_model_has_an_assistant(saved_model, tmp_path):
    """transformers moves the candidates to model.device, which must not be that of the weights."""
    where = {name: "disk" if name == "language_model" else "cpu" for name in PARTS}
    pipeline, plain = (
        MoVAPipeline.from_pretrained(saved_model, device_map=where, offload_folder=tmp_path),
        small_model(),
    )
    asked = {"experts": "none", "max_new_tokens": 6}
    found = pipeline.answer(IMAGES[:1], QUESTIONS[:1], **asked, assistant_model=plain.model.language_model)
    assert found[0].text == plain.answer(IMAGES[:1], QUESTIONS[:1], **asked)[0].text


@pytest.mark.parametrize("way", ["trained", "disabled"])
def test_an_adapter_that_peft_trains(expected, way):
    from peft import LoraConfig, get_peft_model

    pipeline = small_model()
    wrapped = get_peft_model(
        pipeline.model, LoraConfig(target_modules=r"language_model.*q_proj", modules_to_save=["adapter"])
    )
    trained = wrapped.base_model.model.adapter.modules_to_save["default"]
    kept = wrapped.base_model.model.adapter.original_module
    with torch.no_grad():  # the one that must not be asked is spoilt
        for parameter in (kept if way == "trained" else trained).parameters():
            parameter.fill_(float("nan"))
    if way == "trained":
        assert unwrapped(pipeline.model.adapter, MoVAdapter) is trained
        assert_same(outcome(pipeline), expected)
    else:
        with wrapped.disable_adapter():
            assert unwrapped(pipeline.model.adapter, MoVAdapter) is kept
            assert_same(outcome(pipeline), expected)


@pytest.mark.parametrize("way", ["wrapped", "in place", "a block"])
def test_a_compiled_adapter(expected, way):
    pipeline = small_model()
    model = pipeline.model
    if way == "wrapped":
        model.adapter = torch.compile(model.adapter, backend="eager")
    elif way == "in place":
        model.adapter.compile(backend="eager")
    else:
        model.adapter.blocks[1] = torch.compile(model.adapter.blocks[1], backend="eager")
    base = torch.randn(2, 256, model.config.adapter_config.in_channels)
    model.routing_tokens(base)  # a graph that knows no hooks
    assert_same(outcome(pipeline), expected)


def test_a_model_with_compiled_parts_is_saved_under_its_own_names(tmp_path):
    model = small_model().model
    names = set(model.state_dict())
    model.adapter.blocks[0] = torch.compile(model.adapter.blocks[0], backend="eager")
    model.language_model = torch.compile(model.language_model, backend="eager")
    model.save_pretrained(tmp_path)
    assert set(type(model).from_pretrained(tmp_path).state_dict()) == names


def test_an_adapter_with_checkpoints(expected):
    pipeline = small_model()
    pipeline.model.adapter = checkpoint_wrapper(pipeline.model.adapter)
    assert_same(outcome(pipeline), expected)


def test_an_adapter_in_fsdp(expected, tmp_path):
    import torch.distributed as dist
    from torch.distributed.fsdp import FullyShardedDataParallel

    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        pipeline = small_model()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that one process shards nothing
            pipeline.model.adapter = FullyShardedDataParallel(pipeline.model.adapter, device_id=torch.device("cpu"))
        fusion = pipeline.fuse(IMAGES, QUESTIONS, EXPERTS)
    finally:
        dist.destroy_process_group()
    for i, wanted in enumerate(expected[0]):
        torch.testing.assert_close(fusion.tokens[i], wanted.tokens, rtol=0, atol=1e-4)
        torch.testing.assert_close(fusion.gates[i], wanted.gates, rtol=0, atol=1e-5)


def test_where_a_module_without_weights_computes():
    assert compute_device(torch.nn.Identity()) == torch.device("cpu")
