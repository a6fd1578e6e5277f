"""The hub: what is uploaded loads again, and every loading argument reaches experts, processor and routing LoRA."""

from __future__ import annotations

import inspect
import shutil

import huggingface_hub
import pytest
import torch
import transformers.utils.hub
from fake_hub import running

from mova import MoVAForConditionalGeneration, MoVAPipeline, MoVAProcessor
from mova.demo import small_model
from mova.demo.pictures import pictures

IMAGES, QUESTIONS = [p.image for p in pictures()[:2]], [p.question for p in pictures()[:2]]
EXPERTS = [["deplot"], ["sam", "vary"]]
EXPERT_FILES = {
    f"experts/{name}/{file}"
    for name in ("dinov2", "vary", "codetr", "pix2struct", "deplot", "biomedclip", "sam")
    for file in ("config.json", "model.safetensors")
}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with running() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.endpoint)
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
        monkeypatch.setattr(transformers.utils.hub, "create_and_tag_model_card", lambda *_, **__: _Card())
        yield hub


class _Card:
    """In the place of a model card, whose template comes from elsewhere."""

    def save(self, path):
        with open(path, "w") as file:
            file.write("card")


@pytest.fixture(scope="module")
def pipeline():
    return small_model()


@pytest.fixture
def uploaded(hub, saved_model):
    """A repository, ``me/x``, with the saved model."""
    files = {path.relative_to(saved_model).as_posix(): path.read_bytes() for path in saved_model.rglob("*.*")}
    hub.create("me/x")
    hub.upload("me/x", "main", files)
    return hub


def tokens(pipeline):
    return pipeline.fuse(IMAGES, QUESTIONS, EXPERTS).tokens


@pytest.mark.parametrize("how", ["push_to_hub", "save_pretrained"])
def test_what_is_uploaded_loads_again_and_gives_the_same(hub, pipeline, tmp_path, how):
    for part in (pipeline.model, pipeline.processor):
        if how == "push_to_hub":
            part.push_to_hub("me/x", token="t")
        else:
            part.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="me/x", token="t")
    files = set(hub.files("me/x"))
    assert EXPERT_FILES <= files
    assert {"config.json", "model.safetensors", "processor_config.json", "question_tokenizer/tokenizer.json"} <= files
    assert torch.equal(tokens(MoVAPipeline.from_pretrained("me/x")), tokens(pipeline))


def test_a_second_save_uploads_the_experts_again_and_nothing_that_lies_beside(hub, saved_model, tmp_path):
    directory = shutil.copytree(saved_model, tmp_path / "saved")
    (directory / "notes").mkdir()
    (directory / "notes" / "mine.txt").write_text("mine")
    model = MoVAForConditionalGeneration.from_pretrained(directory)
    model.save_pretrained(directory, push_to_hub=True, repo_id="me/y", token="t")
    assert EXPERT_FILES <= set(hub.files("me/y"))
    assert "notes/mine.txt" not in hub.files("me/y")


def test_the_routing_lora_is_uploaded_and_found_again(hub):
    peft = pytest.importorskip("peft")
    model = small_model().model
    model.add_routing_lora(peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    model.push_to_hub("me/lora", token="t")
    assert {"routing/adapter_config.json", "routing/adapter_model.safetensors"} <= set(hub.files("me/lora"))
    loaded = MoVAForConditionalGeneration.from_pretrained("me/lora")
    key = "language_model.model.layers.0.self_attn.q_proj.lora_B.routing.weight"
    assert torch.equal(loaded.state_dict()[key], model.state_dict()[key])


def test_an_upload_to_a_branch(hub, pipeline):
    pipeline.model.push_to_hub("me/branch", revision="next", token="t")
    assert EXPERT_FILES <= set(hub.files("me/branch", "next"))
    assert not hub.files("me/branch", "main")


def test_experts_are_fetched_when_they_are_asked_and_from_the_commit_of_the_model(uploaded, pipeline):
    loaded = MoVAPipeline.from_pretrained("me/x")
    fetched = {path for method, path, _ in uploaded.requests if method == "GET" and "/resolve/" in path}
    assert not any("experts" in path and path.endswith(".safetensors") for path in fetched)
    damaged = {name: b"another" for name in EXPERT_FILES}
    uploaded.upload("me/x", "main", damaged)
    assert torch.equal(tokens(loaded), tokens(pipeline))


def test_revision_and_token_and_cache_dir_and_local_files_only(uploaded, pipeline, tmp_path):
    good = uploaded.files("me/x")
    uploaded.branches["me/x"]["v1"] = uploaded.commit("me/x")
    uploaded.upload("me/x", "main", {name: b"{}" for name in good})
    uploaded.private.add("me/x")
    where = {"revision": "v1", "token": "secret", "cache_dir": tmp_path / "mine"}
    loaded = MoVAPipeline.from_pretrained("me/x", **where)
    assert torch.equal(tokens(loaded), tokens(pipeline))
    assert {token for _, path, token in uploaded.requests if "me/x" in path} == {"Bearer secret"}
    assert not (tmp_path / "cache").exists() or not any((tmp_path / "cache").rglob("*.safetensors"))
    uploaded.requests.clear()
    names = ["deplot", "sam", "vary"]
    again = MoVAPipeline.from_pretrained("me/x", local_files_only=True, experts_in_use=names, **where)
    assert torch.equal(tokens(again), tokens(pipeline))
    assert not uploaded.requests
    with pytest.raises(FileNotFoundError, match=r"expert 'dinov2'.*experts_in_use"):
        MoVAPipeline.from_pretrained("me/x", local_files_only=True, **where)


def test_force_download_fetches_experts_again_once(uploaded):
    MoVAPipeline.from_pretrained("me/x").model.experts["sam"]
    uploaded.requests.clear()
    model = MoVAPipeline.from_pretrained("me/x", force_download=True).model
    for _ in range(2):
        assert model.experts["sam"] is not None
        model.experts.unload("sam")
    gets = [path for method, path, _ in uploaded.requests if method == "GET" and path.endswith("sam/model.safetensors")]
    assert len(gets) == 1


@pytest.mark.parametrize("on_the_hub", [True, False])
def test_subfolder(hub, saved_model, pipeline, tmp_path, on_the_hub):
    source = tmp_path / "parent"
    shutil.copytree(saved_model, source / "sub")
    if on_the_hub:
        hub.create("me/nested")
        files = {p.relative_to(source).as_posix(): p.read_bytes() for p in source.rglob("*.*")}
        hub.upload("me/nested", "main", files)
        source = "me/nested"
    loaded = MoVAPipeline.from_pretrained(source, subfolder="sub")
    assert torch.equal(tokens(loaded), tokens(pipeline))


def test_an_expert_that_the_repository_lacks_is_an_error_at_loading(uploaded):
    uploaded.files("me/x").pop("experts/sam/model.safetensors")
    with pytest.raises(FileNotFoundError, match="no weights of the expert 'sam'"):
        MoVAForConditionalGeneration.from_pretrained("me/x")


@pytest.mark.parametrize("name", ["processor_config.json", "question_tokenizer/tokenizer.json"])
def test_a_damaged_file_on_the_hub_is_named(uploaded, name):
    uploaded.files("me/x")[name] = b"[1]"
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        MoVAPipeline.from_pretrained("me/x")


def test_a_repository_without_the_question_tokenizer(uploaded):
    for name in [name for name in uploaded.files("me/x") if name.startswith("question_tokenizer/")]:
        uploaded.files("me/x").pop(name)
    with pytest.raises(FileNotFoundError, match="question_tokenizer"):
        MoVAPipeline.from_pretrained("me/x")


def test_no_such_repository(hub):
    for kind in (MoVAPipeline, MoVAForConditionalGeneration, MoVAProcessor):
        with pytest.raises(OSError, match="me/none"):
            kind.from_pretrained("me/none")


def test_experts_elsewhere_take_the_token_and_not_the_revision(uploaded, saved_model, tmp_path, pipeline):
    model = MoVAForConditionalGeneration.from_pretrained(saved_model)
    model.config.expert_path = "me/x"
    model.save_pretrained(tmp_path / "m")
    uploaded.create("me/main")
    files = {p.relative_to(tmp_path / "m").as_posix(): p.read_bytes() for p in (tmp_path / "m").rglob("*.*")}
    uploaded.upload("me/main", "v2", files)
    uploaded.private |= {"me/x", "me/main"}
    loaded = MoVAForConditionalGeneration.from_pretrained("me/main", revision="v2", token="secret")
    assert torch.equal(tokens(MoVAPipeline(loaded, pipeline.processor)), tokens(pipeline))


# What is saved.


def test_a_variant_is_of_the_experts_too(pipeline, tmp_path):
    pipeline.model.save_pretrained(tmp_path)
    plain = (tmp_path / "experts" / "sam" / "model.safetensors").read_bytes()
    half = small_model().model
    for name in half.experts.specs:
        half.experts[name].to(torch.float16)
    half.to(torch.float16).save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / "experts" / "sam" / "model.safetensors").read_bytes() == plain
    for variant, dtype in (("fp16", torch.float16), (None, torch.float32)):
        model = MoVAForConditionalGeneration.from_pretrained(tmp_path, variant=variant)
        assert {p.dtype for p in model.experts["sam"].parameters()} == {dtype}
    (tmp_path / "experts" / "sam" / "model.fp16.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"variant fp16.*experts/sam"):
        MoVAForConditionalGeneration.from_pretrained(tmp_path, variant="fp16")


def test_an_expert_that_was_not_loaded_is_saved_as_a_variant_too(saved_model, tmp_path):
    model = MoVAForConditionalGeneration.from_pretrained(saved_model)
    model.save_pretrained(tmp_path, variant="v")
    assert model.experts.loaded() == ()
    assert [f.name for f in sorted((tmp_path / "experts" / "sam").glob("*.safetensors"))] == ["model.v.safetensors"]


def test_shards_of_experts_are_read_again(pipeline, tmp_path):
    pipeline.model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list((tmp_path / "experts" / "sam").glob("*.safetensors"))) > 1
    pipeline.processor.save_pretrained(tmp_path)
    assert torch.equal(tokens(MoVAPipeline.from_pretrained(str(tmp_path))), tokens(pipeline))


def test_only_the_main_process_writes(pipeline, tmp_path):
    pipeline.model.save_pretrained(tmp_path / "a", is_main_process=False)
    pipeline.model.save_pretrained(tmp_path / "b", False)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_file_is_no_directory_to_save_to(pipeline, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="save_directory must not be a file"):
        pipeline.model.save_pretrained(tmp_path / "file")


def test_transformers_still_calls_what_is_overridden():
    """The upload goes through a method of transformers that is not public: it must still be the one that is called."""
    theirs = inspect.signature(transformers.utils.hub.PushToHubMixin._upload_modified_files).parameters
    for kind in (MoVAForConditionalGeneration, MoVAProcessor):
        assert list(inspect.signature(kind._upload_modified_files).parameters) == list(theirs)
