"""The model as a citizen of transformers: saving, loading, generating, training, other language models."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.modeling_outputs import BaseModelOutputWithPast

import mova
from mova import MoVAConfig, MoVAForConditionalGeneration, MoVAPipeline, MoVAProcessor, prompts
from mova.demo import small_config, small_model
from mova.demo.pictures import pictures
from mova_kernels import MoVAdapter

EXPERTS = [("sam", "dinov2"), (), ("pix2struct",)]
QUESTIONS = ["What is this?", "And this, of which there is much more to be said?", "Why?"]
LM = {"vocab_size": 512, "hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def pipeline():
    return small_model()


@pytest.fixture
def copy(saved_model, tmp_path):
    """A directory that a test may spoil."""
    return shutil.copytree(saved_model, tmp_path / "copy")


def inputs_for(pipeline, rows=slice(None)):
    processor = pipeline.processor
    return processor(
        [picture.image for picture in pictures()[:3]][rows],
        [processor.conversation(question) for question in QUESTIONS[rows]],
        experts=EXPERTS[rows],
        questions=[prompts(question, processor.pool).text for question in QUESTIONS[rows]],
    )


def new_tokens(model, inputs, **generate):
    result = model.generate(**inputs, max_new_tokens=6, pad_token_id=0, eos_token_id=511, **generate)
    return result[:, inputs["input_ids"].shape[1] :]


def test_what_is_saved_comes_back_through_the_auto_classes(pipeline, saved_model):
    model = AutoModelForImageTextToText.from_pretrained(saved_model)
    processor = AutoProcessor.from_pretrained(saved_model)
    assert type(model) is MoVAForConditionalGeneration and type(processor) is mova.MoVAProcessor
    assert model.experts.loaded() == ()
    inputs = inputs_for(MoVAPipeline(model, processor))
    assert torch.equal(model(**inputs).logits, pipeline.model(**inputs_for(pipeline)).logits)
    assert set(model.experts.loaded()) == {"sam", "dinov2", "pix2struct"}
    before, after = pipeline.model.state_dict(), model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_saving_a_loaded_model_copies_the_experts_that_it_never_loaded(saved_model, tmp_path):
    model = MoVAForConditionalGeneration.from_pretrained(saved_model)
    model.save_pretrained(tmp_path)
    for name in model.experts.specs:
        file = f"experts/{name}/model.safetensors"
        assert (tmp_path / file).read_bytes() == (saved_model / file).read_bytes()


def test_an_expert_that_is_not_in_use_needs_no_weights_to_save_the_model(copy, tmp_path):
    model = MoVAForConditionalGeneration.from_pretrained(copy)
    shutil.rmtree(copy / "experts" / "sam")
    with pytest.raises(FileNotFoundError, match="experts/sam"):
        model.save_pretrained(tmp_path / "with")
    model.experts.only(["vary"])
    model.save_pretrained(tmp_path / "without")
    assert not (tmp_path / "without" / "experts" / "sam").exists()
    assert (tmp_path / "without" / "experts" / "dinov2" / "model.safetensors").is_file()


def test_experts_that_lie_elsewhere_are_referred_to_and_not_written(saved_model, tmp_path):
    model = MoVAForConditionalGeneration.from_pretrained(saved_model)
    model.config.expert_path = str(saved_model)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "experts").exists()
    assert MoVAForConditionalGeneration.from_pretrained(tmp_path).experts["vary"] is not None


@pytest.mark.parametrize("key", ["adapter.pos_embed", "text_encoder.embeddings.word_embeddings.weight"])
@pytest.mark.parametrize("fault", ["missing", "unexpected"])
def test_a_checkpoint_with_other_keys_is_an_error_that_names_them(copy, key, fault):
    file = copy / "model.safetensors"
    state = load_file(file)
    other = key if fault == "missing" else key + "_2"
    if fault == "missing":
        del state[key]
    else:
        state[other] = torch.zeros(1)
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"1 {fault} \({other}\)"):
        MoVAForConditionalGeneration.from_pretrained(copy)


def test_an_expert_in_use_without_weights_is_an_error_and_another_is_not(copy):
    shutil.rmtree(copy / "experts" / "sam")
    with pytest.raises(FileNotFoundError, match=r"no weights of the expert 'sam'.*experts_in_use"):
        MoVAForConditionalGeneration.from_pretrained(copy)
    model = MoVAForConditionalGeneration.from_pretrained(copy, experts_in_use=["vary"])
    assert model.experts["vary"] is not None and model.experts.allowed == ("vary",)


def test_an_expert_with_a_missing_key_is_an_error_that_names_it(copy):
    file = copy / "experts" / "codetr" / "model.safetensors"
    state = load_file(file)
    state.pop("out_norm.weight")
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"codetr.*1 missing \(out_norm.weight\)"):
        MoVAForConditionalGeneration.from_pretrained(copy).experts["codetr"]


def test_a_left_padded_batch_generates_what_each_row_does_alone(pipeline):
    together = new_tokens(pipeline.model, inputs_for(pipeline))
    for i in range(3):
        alone = new_tokens(pipeline.model, inputs_for(pipeline, slice(i, i + 1)))
        assert torch.equal(together[i : i + 1], alone)


def test_the_cache_of_keys_and_values_changes_nothing(pipeline):
    inputs = inputs_for(pipeline)
    assert torch.equal(new_tokens(pipeline.model, inputs), new_tokens(pipeline.model, inputs, use_cache=False))


def test_generating_greedily_is_taking_the_best_logit_again_and_again(pipeline):
    inputs = dict(inputs_for(pipeline, slice(0, 1)))
    generated = new_tokens(pipeline.model, inputs)
    for token in generated[0]:
        assert pipeline.model(**inputs).logits[0, -1].argmax() == token
        inputs["input_ids"] = torch.cat([inputs["input_ids"], token[None, None]], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])


def test_images_are_fused_once_for_all_beams(pipeline, monkeypatch):
    calls = []
    fuse = MoVAForConditionalGeneration.fuse
    monkeypatch.setattr(
        MoVAForConditionalGeneration,
        "fuse",
        lambda self, base, *rest: calls.append(len(base)) or fuse(self, base, *rest),
    )
    beams = new_tokens(pipeline.model, inputs_for(pipeline), num_beams=3)
    assert calls == [3] and beams.shape[0] == 3


def test_one_beam_of_several_is_the_search_without_images_in_the_embeddings(pipeline):
    """The beams continue the same prompt as a language model that is given the embeddings."""
    inputs = inputs_for(pipeline)
    features = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
    embedded = pipeline.model.embed(inputs["input_ids"], pipeline.model.get_image_features(**features))
    expected = pipeline.model.language_model.generate(
        inputs_embeds=embedded, attention_mask=inputs["attention_mask"], num_beams=3, max_new_tokens=6, pad_token_id=0,
        eos_token_id=511,
    )  # fmt: skip
    assert torch.equal(new_tokens(pipeline.model, inputs, num_beams=3), expected)


def test_the_model_without_its_head(pipeline, saved_model, tmp_path):
    whole = MoVAForConditionalGeneration.from_pretrained(saved_model)
    inputs = inputs_for(pipeline)
    model = AutoModel.from_pretrained(saved_model)
    assert type(model) is mova.MoVAModel and model.get_input_embeddings() is not None
    assert whole.state_dict().keys() - model.state_dict().keys() == {"language_model.lm_head.weight"}
    assert model.state_dict().keys() < whole.state_dict().keys()
    with torch.no_grad():
        found, expected = model(**inputs), whole(**inputs, output_hidden_states=True)
    assert isinstance(found, BaseModelOutputWithPast)
    torch.testing.assert_close(found.last_hidden_state, expected.hidden_states[-1])
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        again = AutoModel.from_pretrained(tmp_path)(**inputs)
    torch.testing.assert_close(again.last_hidden_state, found.last_hidden_state)


def test_the_model_without_its_head_picks_no_experts(pipeline, saved_model):
    chat = [
        {
            "role": "user",
            "content": [{"type": "image", "image": pictures()[0].image}, {"type": "text", "text": "What?"}],
        }
    ]
    inputs = pipeline.processor.apply_chat_template(chat, tokenize=True, return_dict=True)
    with pytest.raises(TypeError, match="routing must be a bool tensor"):
        AutoModel.from_pretrained(saved_model)(**inputs)


def test_the_output_object_of_generate(pipeline):
    inputs = inputs_for(pipeline)
    output = pipeline.model.generate(
        **inputs, max_new_tokens=2, pad_token_id=0, return_dict_in_generate=True, output_scores=True
    )
    assert len(output.scores) == 2
    assert torch.equal(output.sequences[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])


@pytest.mark.parametrize(
    "text_config",
    [
        MistralConfig(num_key_value_heads=2, **LM),
        Qwen2Config(num_key_value_heads=2, tie_word_embeddings=True, **LM),
        Qwen3Config(num_key_value_heads=2, head_dim=24, **LM),
        LlamaConfig(tie_word_embeddings=True, **LM),
    ],
    ids=["mistral", "qwen2-tied", "qwen3", "llama-tied"],
)
def test_other_language_models(text_config, tmp_path):
    pipeline = small_model(text_config=text_config)
    pipeline.model.save_pretrained(tmp_path)
    loaded = MoVAForConditionalGeneration.from_pretrained(tmp_path)
    assert type(loaded.language_model).__name__.lower().startswith(text_config.model_type)
    inputs = inputs_for(pipeline)
    assert torch.equal(new_tokens(loaded, inputs), new_tokens(pipeline.model, inputs))


def test_attention_implementation_and_dtype(saved_model, pipeline):
    eager = MoVAForConditionalGeneration.from_pretrained(saved_model, attn_implementation="eager", dtype=torch.bfloat16)
    assert eager.language_model.config._attn_implementation == "eager"
    assert {p.dtype for p in eager.parameters()} == {torch.bfloat16}
    inputs = inputs_for(pipeline)
    expected = pipeline.model(**inputs).logits[:, -1]
    found = eager(**inputs).logits[:, -1]
    assert found.dtype == torch.bfloat16
    assert (found - expected).norm() < 0.1 * expected.norm()


def test_device_map(saved_model, pipeline):
    model = MoVAForConditionalGeneration.from_pretrained(saved_model, device_map="auto")
    inputs = inputs_for(pipeline)
    assert torch.equal(new_tokens(model, inputs), new_tokens(pipeline.model, inputs))


def test_the_stages_are_the_encoders_and_the_adapter(pipeline):
    """The model against its own parts, one image at a time, with dense features of every expert."""
    model, inputs = pipeline.model, inputs_for(pipeline)
    inputs_all = pipeline.processor(
        [picture.image for picture in pictures()[:3]], ["<image>"] * 3, experts="all", questions="x"
    )
    base = model.base(inputs["pixel_values"])
    dense = [model.experts[name](pixels) for name, pixels in inputs_all["expert_pixel_values"].items()]
    hidden = model.text_encoder(inputs["question_ids"], attention_mask=inputs["question_mask"]).last_hidden_state
    expected = model.adapter(base, dense, inputs["routing"], hidden[:, 0])
    features = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
    torch.testing.assert_close(model.get_image_features(**features), expected, rtol=0, atol=1e-4)


def test_image_tokens_stand_at_their_placeholders(pipeline):
    model = pipeline.model
    place, other = model.config.image_token_id, 7
    features = torch.randn(2, 3, 96)
    ids = torch.tensor([[other, place, place, place, other], [place, other, place, place, other]])
    embedded = model.embed(ids, features)
    assert torch.equal(embedded[0, 1:4], features[0])
    assert torch.equal(embedded[1, [0, 2, 3]], features[1])
    assert torch.equal(embedded[0, 0], model.get_input_embeddings().weight[other])


@pytest.mark.parametrize("places", [2, 4])
def test_more_or_fewer_placeholders_than_image_tokens(pipeline, places):
    ids = torch.tensor([[pipeline.model.config.image_token_id] * places])
    with pytest.raises(ValueError, match=f"one placeholder for each of 3 image tokens, got {places}"):
        pipeline.model.embed(ids, torch.randn(1, 3, 96))


def test_a_selected_expert_needs_pixels_and_a_question(pipeline):
    inputs = inputs_for(pipeline)
    with pytest.raises(ValueError, match="question_ids must be given"):
        pipeline.model(**{k: v for k, v in inputs.items() if not k.startswith("question")})
    inputs["expert_pixel_values"].pop("sam")
    with pytest.raises(ValueError, match=r"expert_pixel_values must have those that are selected, .*sam\), got \["):
        pipeline.model(**inputs)


def test_experts_in_another_order_are_those_of_another_model(pipeline):
    """The columns of its routing mean other experts, whatever the names."""
    inputs = inputs_for(pipeline)
    inputs["expert_pixel_values"] = dict(reversed(inputs["expert_pixel_values"].items()))
    with pytest.raises(ValueError, match="in the order of the model's experts"):
        pipeline.model(**inputs)


def gradients(model, inputs):
    model.zero_grad(set_to_none=True)
    labels = inputs["input_ids"].clone()
    labels[:, :-4] = -100
    loss = model(**inputs, labels=labels).loss
    loss.backward()
    return loss, {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


def test_the_loss_reaches_all_but_the_frozen_parts():
    pipeline = small_model()
    model = pipeline.model.train()
    assert not model.text_encoder.training and model.adapter.training
    loss, reached = gradients(model, inputs_for(pipeline))
    parts = {name.partition(".")[0] for name in reached}
    assert loss.isfinite() and parts == {"language_model", "base", "adapter"}
    experts = [p for name in model.experts.loaded() for p in model.experts[name].parameters()]
    assert experts and all(p.grad is None and not p.requires_grad for p in experts)


def test_the_text_encoder_trains_if_it_is_not_frozen():
    config = small_config()
    config.freeze_text_encoder = False
    pipeline = small_model()
    model = MoVAForConditionalGeneration(config).train()
    model.load_state_dict(pipeline.model.state_dict())
    assert model.text_encoder.training
    _, reached = gradients(model, inputs_for(pipeline))
    assert any(name.startswith("text_encoder.") for name in reached)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")  # by 5.23; 5.17 knows no other
def test_checkpointed_gradients_are_the_same():
    pipeline = small_model()
    inputs = inputs_for(pipeline)
    loss, _ = gradients(pipeline.model.train(), inputs)
    expected = pipeline.model.adapter.pos_embed.grad.clone()
    pipeline.model.gradient_checkpointing_enable()
    again, _ = gradients(pipeline.model, inputs)
    torch.testing.assert_close(again, loss)
    torch.testing.assert_close(pipeline.model.adapter.pos_embed.grad, expected, rtol=1e-4, atol=1e-7)


def test_a_new_model_has_the_adapters_official_initial_state():
    """transformers' own initialisation would overwrite the zeros at the end of the branches (T24)."""
    model = MoVAForConditionalGeneration(small_config())
    zeros = {name for name, p in MoVAdapter(model.config.adapter_config).named_parameters() if not p.any()}
    assert zeros and {name for name, p in model.adapter.named_parameters() if not p.any()} == zeros


def test_experts_go_where_they_are_placed(saved_model, pipeline):
    model = MoVAForConditionalGeneration.from_pretrained(saved_model)
    model.experts.place("sam", dtype=torch.bfloat16)
    inputs = inputs_for(pipeline)
    base = model.base_features(inputs["pixel_values"])
    tokens = model.experts.encode("sam", inputs["expert_pixel_values"]["sam"], base)
    assert tokens.dtype == torch.float32
    assert {p.dtype for p in model.experts["sam"].parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.experts["dinov2"].parameters()} == {torch.float32}
    exact = pipeline.model.experts.encode("sam", inputs["expert_pixel_values"]["sam"], base)
    assert 0 < (tokens - exact).norm() < 0.1 * exact.norm()


def test_an_offloaded_expert_returns_to_the_host(saved_model, pipeline, monkeypatch):
    model = MoVAForConditionalGeneration.from_pretrained(saved_model)
    model.experts.place(offload=True)
    moves = []
    monkeypatch.setattr(model.experts["sam"], "to", lambda *where: moves.append(where[0]) or model.experts["sam"])
    inputs = inputs_for(pipeline)
    model.experts.encode("sam", inputs["expert_pixel_values"]["sam"], torch.zeros(1))
    assert moves == [torch.device("cpu"), "cpu"]


def test_an_unloaded_expert_gives_its_memory_back_and_loads_again(saved_model):
    pool = MoVAForConditionalGeneration.from_pretrained(saved_model).experts
    assert pool["vary"] is pool["vary"] and pool.loaded() == ("vary",)
    pool.unload("vary")
    assert pool.loaded() == ()
    with pytest.raises(ValueError, match="must be one of the model's experts"):
        pool["bert"]


def test_an_expert_of_ones_own_in_the_whole_model(tmp_path, monkeypatch):
    monkeypatch.setattr(mova.experts, "_REGISTRY", dict(mova.experts._REGISTRY))
    monkeypatch.setattr(mova.experts, "_BUILDERS", dict(mova.experts._BUILDERS))
    half = (0.5, 0.5, 0.5)
    own = mova.VisionExpert("edges", "Follows outlines.", 64, mean=half, std=half, grid=(4, 4), channels=32)
    mova.experts.register(own, lambda width=32: torch.nn.Conv2d(3, width, 16, 16))
    config = small_config()
    sizes = {name: config.encoder_sizes[name] for name in ("clip", "sam")}
    config = MoVAConfig(
        config.text_config, config.text_encoder_config, config.base, [config.experts[6], own], sizes, adapter_heads=4,
        num_routing_tokens=16, image_token_id=3,
    )  # fmt: skip
    small = small_model().processor
    processor = MoVAProcessor.for_config(config, small.tokenizer, small.question_tokenizer)
    pipeline = MoVAPipeline(MoVAForConditionalGeneration(config), processor)
    with torch.no_grad():
        for parameter in pipeline.model.adapter.parameters():
            parameter.add_(0.01)
    images, questions = [picture.image for picture in pictures()[:2]], ["What?", "Why?"]
    expected = pipeline.fuse(images, questions, [["edges"], ["edges", "sam"]])
    assert expected.gates.shape == (2, 3, 2) and expected.gates[0, :, 1].eq(1).all()
    pipeline.model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = MoVAPipeline.from_pretrained(tmp_path)
    assert torch.equal(loaded.fuse(images, questions, [["edges"], ["edges", "sam"]]).tokens, expected.tokens)


# The config.


def test_the_config_survives_json(tmp_path):
    config = small_config()
    config.save_pretrained(tmp_path)
    again = MoVAConfig.from_pretrained(tmp_path)
    assert (again.pool, again.base_expert, again.adapter_config) == (
        config.pool,
        config.base_expert,
        config.adapter_config,
    )
    assert again.to_dict() == {**config.to_dict(), "_name_or_path": str(tmp_path)} or json.loads(
        again.to_json_string()
    ) == json.loads(config.to_json_string())


def test_the_default_config_is_the_released_models():
    config = MoVAConfig()
    adapter = config.adapter_config
    assert (adapter.in_channels, adapter.out_channels, adapter.num_tokens) == (1024, 4096, 2304)
    assert adapter.expert_channels == (1536, 512, 256, 1536, 768, 768, 256)
    assert (config.num_image_tokens, config.num_routing_tokens, config.topk) == (576, 144, 3)
    assert config.text_encoder_config.num_hidden_layers == 24


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_routing_tokens": 143}, "num_routing_tokens must be a square"),
        ({"num_routing_tokens": 25}, "whose root divides"),
        ({"image_token_id": 128257}, "image_token_id must be below the vocabulary"),
        ({"experts": ["sam", "sam"]}, "must not repeat a name"),
        ({"experts": ["bert"]}, "registered expert"),
        ({"experts": [{"nme": "x"}]}, "must have the fields of a VisionExpert"),
        ({"encoder_sizes": {"bert": {}}}, "encoder_sizes must be of"),
        ({"adapter_heads": 3}, "num_heads"),
    ],
)
def test_a_bad_config_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        MoVAConfig(**arguments)
