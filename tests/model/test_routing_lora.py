"""The routing LoRA: what it changes and what it must leave alone, training, saving and resuming, other adapters."""

from __future__ import annotations

import copy
import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import CheckpointError, checkpoint
from transformers import LlamaConfig, Trainer, TrainingArguments

from mova import MoVAForConditionalGeneration, prompts
from mova.demo import small_model
from mova.demo.pictures import pictures

TARGETS = ["q_proj", "v_proj"]


@pytest.fixture(scope="module")
def built():
    return small_model()


@pytest.fixture
def model(built):
    return copy.deepcopy(built.model)


@pytest.fixture(scope="module")
def inputs(built):
    """Two images, one with an expert; the labels are the tokens."""
    processor = built.processor
    shown = pictures()[:2]
    encoded = dict(
        processor(
            [picture.image for picture in shown],
            [processor.conversation("What is this?"), processor.conversation("Why?")],
            experts=[("biomedclip",), ()],
            questions=[prompts(question, processor.pool).text for question in ("What is this?", "Why?")],
        )
    )
    return {**encoded, "labels": encoded["input_ids"]}


def lora(**arguments):
    return LoraConfig(**{"r": 4, "target_modules": TARGETS, "init_lora_weights": False, **arguments})


def add(model, **arguments):
    torch.manual_seed(0)
    model.add_routing_lora(lora(**arguments))
    return model


def trainable(model):
    return {name.replace("base_layer.", "") for name, p in model.named_parameters() if p.requires_grad}


def weights(model):
    return {name: p for name, p in model.named_parameters() if ".routing" in name}


@torch.no_grad()
def logits(model, inputs):
    return model(**inputs).logits


# What it changes.


def test_it_acts_in_the_routing_pass_alone(model, inputs):
    expected = logits(model, inputs)
    add(model)
    assert torch.equal(logits(model, inputs), expected)
    with model.routing_pass():
        inside = logits(model, inputs)
        with model.routing_pass():
            pass
        assert torch.equal(logits(model, inputs), inside)  # the inner pass has not switched it off
    assert (inside - expected).abs().max() > 1e-3
    with pytest.raises(ZeroDivisionError), model.routing_pass():
        raise ZeroDivisionError
    assert torch.equal(logits(model, inputs), expected)


def test_its_pass_is_that_of_a_language_model_with_the_products_added(model, inputs):
    plain = copy.deepcopy(model)
    add(model, lora_alpha=12)
    with torch.no_grad():
        for name, layer in plain.language_model.named_modules():
            if name.endswith(tuple(TARGETS)):
                own = model.language_model.get_submodule(name)
                layer.weight += 12 / 4 * own.lora_B["routing"].weight @ own.lora_A["routing"].weight
    with model.routing_pass():
        torch.testing.assert_close(logits(model, inputs), logits(plain, inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frozen", [(), ("language_model",), ("base", "adapter")])
def test_everything_else_stays_as_trainable_as_it_was(model, frozen):
    for part in frozen:
        getattr(model, part).requires_grad_(False)
    before = trainable(model)
    add(model)
    always = before | weights(model).keys()
    assert trainable(model) == always
    with model.routing_pass():
        assert trainable(model) == always
    assert trainable(model) == always


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["plain", "reentrant", "not reentrant"])
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated", "ignore:None of the inputs")
def test_gradients_reach_it_from_the_pass_alone(model, inputs, checkpointing):
    """Also where layers are computed again in a backward that is called outside of the pass."""
    add(model).train()
    expected = copy.deepcopy(model)
    with expected.routing_pass():
        expected(**inputs).loss.backward()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model = copy.deepcopy(model)
    with model.routing_pass():
        loss = model(**inputs).loss
    loss.backward()
    assert all(p.grad.any() for p in weights(model).values())
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6, msg=name)
    model.zero_grad()
    model(**inputs).loss.backward()
    assert all(p.grad is None for p in weights(model).values())


def checkpointed(model, use_reentrant):
    """The model with checkpointing of one's own around the decoder's layers."""

    def run(forward, x, **others):
        return checkpoint(partial(forward, **others), x, use_reentrant=use_reentrant)

    for layer in add(model).train().language_model.model.layers:
        layer.forward = partial(run, layer.forward)
    return model


@pytest.mark.filterwarnings("ignore:None of the inputs")
def test_checkpointing_of_ones_own_cannot_mix_up_the_passes(model, inputs):
    """Neither a pass that is computed again outside, nor an answer that is computed again within a pass."""
    checkpointed(model, use_reentrant=True)
    with model.routing_pass(), pytest.raises(RuntimeError, match="as reentrant checkpointing has it"):
        model(**inputs, use_cache=False)
    loss = model(**inputs, use_cache=False).loss
    with model.routing_pass(), pytest.raises(RuntimeError, match="as reentrant checkpointing has it"):
        loss.backward()
    model(**inputs, use_cache=False).loss.backward()


def test_checkpointing_of_ones_own_that_is_not_reentrant(model, inputs):
    checkpointed(model, use_reentrant=False)
    with model.routing_pass():
        loss = model(**inputs, use_cache=False).loss
    with pytest.raises(CheckpointError):
        loss.backward()
    model.zero_grad()
    expected = copy.deepcopy(model)
    with model.routing_pass():
        model(**inputs, use_cache=False).loss.backward()
    for layer in expected.language_model.model.layers:
        del layer.forward
    with expected.routing_pass():
        expected(**inputs, use_cache=False).loss.backward()
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_under_zero3_it_gets_zeros_outside_of_the_pass(model, inputs):
    """ZeRO-3 would take a step with the gradient of the last pass."""
    plain = add(model).train()(**inputs).loss
    for number, parameter in enumerate(weights(model).values()):
        parameter.ds_id = number
    loss = model(**inputs).loss
    loss.backward()
    assert torch.equal(loss, plain)
    assert all(p.grad is not None and not p.grad.any() for p in weights(model).values())
    model.zero_grad()
    with model.routing_pass():
        model(**inputs).loss.backward()
    assert all(p.grad.any() for p in weights(model).values())


def test_under_zero3_one_with_more_weights_is_refused(model, inputs):
    for number, parameter in enumerate(weights(add(model, use_dora=True)).values()):
        parameter.ds_id = number
    with pytest.raises(RuntimeError, match="under ZeRO-3 must have the weights lora_A and lora_B alone"):
        model(**inputs)


def test_under_zero3_one_of_embeddings_is_refused(model, inputs):
    add(model, target_modules=["embed_tokens", "q_proj"])
    for number, parameter in enumerate(weights(model).values()):
        parameter.ds_id = number
    with pytest.raises(RuntimeError, match="under ZeRO-3 must have the weights lora_A and lora_B alone"):
        model(**inputs)


def test_under_zero3_an_adapter_with_a_similar_name_is_another(model, inputs):
    wrapped = get_peft_model(add(model), LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="routing2")
    for number, parameter in enumerate(model.parameters()):
        parameter.ds_id = number
    wrapped(**inputs).loss.backward()
    assert all(not p.grad.any() for name, p in model.named_parameters() if ".routing." in name)


def test_one_in_bf16_that_is_loaded_in_inference_mode_trains(model, inputs, tmp_path):
    for parameter in weights(add(model)).values():
        parameter.data = parameter.data.bfloat16()
    model.save_pretrained(tmp_path)
    with torch.inference_mode():
        model.load_routing_lora(tmp_path / "routing")
    with model.routing_pass():
        model(**inputs).loss.backward()
    assert all(p.dtype == torch.bfloat16 and p.grad.any() for p in weights(model).values())


def test_one_that_is_added_in_inference_mode_trains(model, inputs):
    with torch.inference_mode():
        add(model)
    with model.routing_pass():
        model(**inputs).loss.backward()
    assert all(p.grad.any() for p in weights(model).values())


def test_a_copy_has_its_own(model, inputs):
    expected = copy.deepcopy(add(model))
    with torch.no_grad(), model.routing_pass():
        for p in weights(model).values():
            p.zero_()
        changed = logits(expected, inputs)
    with expected.routing_pass():
        assert (logits(expected, inputs) - changed).abs().max() > 1e-3  # the pass of the other was not its own


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"modules_to_save": ["lm_head"]}, r"config\.modules_to_save must be empty"),
        ({"bias": "all"}, r"config\.bias must be 'none', got 'all'"),
        ({"init_lora_weights": "pissa"}, r"config\.init_lora_weights must be one of .* got 'pissa'"),
        ({"layer_replication": [(0, 2)]}, r"config\.layer_replication must be empty"),
        ({"target_parameters": ["q_proj.weight"]}, r"config\.target_parameters must be empty"),
    ],
)
def test_what_would_change_the_language_model_itself_is_refused(model, arguments, message):
    before = model.state_dict().keys()
    with pytest.raises(ValueError, match=message):
        add(model, **arguments)
    assert model.state_dict().keys() == before and not model.config.routing_lora


def test_there_is_one(model):
    with pytest.raises(ValueError, match="the model has one"):
        add(add(model))
    with pytest.raises(TypeError, match=r"must be a peft\.LoraConfig"):
        model.add_routing_lora({"r": 4})


# The pipeline.


def test_the_pipelines_router_has_it_and_its_answer_has_not(monkeypatch):
    active = []
    generate = MoVAForConditionalGeneration.generate

    def record(self, *args, **kwargs):
        active.append("routing" in self.language_model.model.layers[0].self_attn.q_proj.active_adapters)
        return generate(self, *args, **kwargs)

    pipeline = small_model()
    add(pipeline.model)
    monkeypatch.setattr(MoVAForConditionalGeneration, "generate", record)
    with pytest.warns(UserWarning, match="names no expert"):
        pipeline.answer([pictures()[0].image], ["What?"], max_new_tokens=1)
    assert active == [True, False]


# Saving and loading.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target", ["q_proj", "embed_tokens", "lm_head"])
def test_it_is_saved_beside_the_model_and_found_again(saved_model, inputs, tmp_path, dtype, target):
    model = add(MoVAForConditionalGeneration.from_pretrained(saved_model, dtype=dtype), target_modules=[target])
    if target == "embed_tokens":  # peft starts half of it with zeros whatever one says
        torch.nn.init.normal_(weights(model)["language_model.model.embed_tokens.lora_embedding_B.routing"])
    model.save_pretrained(tmp_path)
    file = load_file(tmp_path / "model.safetensors")
    assert not any("base_layer" in key for key in file)
    assert {key for key in file if "lora" in key} == weights(model).keys()
    assert not any("routing" in key for key in load_file(tmp_path / "routing" / "adapter_model.safetensors"))
    loaded = MoVAForConditionalGeneration.from_pretrained(tmp_path)
    assert trainable(loaded) >= weights(loaded).keys()
    for (name, p), q in zip(loaded.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q) and p.dtype == q.dtype, name
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))
    with loaded.routing_pass(), model.routing_pass():
        assert torch.equal(logits(loaded, inputs), logits(model, inputs))


def test_it_is_saved_with_a_language_model_whose_embeddings_are_tied(inputs, tmp_path):
    tied = LlamaConfig(
        vocab_size=512, hidden_size=96, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = add(small_model(text_config=tied).model)
    model.save_pretrained(tmp_path)
    loaded = MoVAForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    with loaded.routing_pass(), model.routing_pass():
        assert torch.equal(logits(loaded, inputs), logits(model, inputs))


def test_loading_another_replaces_the_one_that_is_there(model, inputs, tmp_path):
    other = add(copy.deepcopy(model), r=2, target_modules=["o_proj"])
    other.save_pretrained(tmp_path)
    add(model).load_routing_lora(tmp_path / "routing")
    assert {name.split(".lora_")[0][-6:] for name in weights(model)} == {"o_proj"}
    with model.routing_pass(), other.routing_pass():
        assert torch.equal(logits(model, inputs), logits(other, inputs))


def test_one_that_peft_wrote(model, inputs, tmp_path):
    wrapped = get_peft_model(copy.deepcopy(model).language_model, lora())
    wrapped.save_pretrained(tmp_path)
    model.load_routing_lora(tmp_path)
    assert trainable(model) >= weights(model).keys()
    embedded = model.embed(inputs["input_ids"], torch.zeros(2, model.config.num_image_tokens, 96))
    with model.routing_pass(), torch.no_grad():
        found = model.language_model(inputs_embeds=embedded).logits
    assert torch.equal(found, wrapped(inputs_embeds=embedded).logits)


def test_a_folder_that_lacks_weights_is_an_error_that_names_them(model, tmp_path):
    add(model).save_pretrained(tmp_path)
    file = tmp_path / "routing" / "adapter_model.safetensors"
    state = load_file(file)
    state.pop("model.layers.1.self_attn.q_proj.lora_A.weight")
    save_file(state, file)
    with pytest.raises(ValueError, match=r"1 missing \(model\.layers\.1\.self_attn\.q_proj\.lora_A\.routing\.weight\)"):
        MoVAForConditionalGeneration.from_pretrained(tmp_path)


# Training.


class RoutingTrainer(Trainer):
    """Trains the router: its loss comes from the routing pass."""

    def compute_loss(self, model, inputs, **_):
        with model.routing_pass():
            return model(**inputs).loss


def train(model, inputs, output, steps, resume=None):
    arguments = TrainingArguments(
        output_dir=str(output), max_steps=steps, save_steps=1, per_device_train_batch_size=1, learning_rate=1e-2,
        report_to=[], remove_unused_columns=False, use_cpu=True, disable_tqdm=True, seed=0,
    )  # fmt: skip
    trainer = RoutingTrainer(model=model, args=arguments, train_dataset=[0] * 4, data_collator=lambda _: dict(inputs))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.fixture(scope="module")
def trained(built, inputs, tmp_path_factory):
    """A model after two steps, before them, and the folder with the checkpoints of both."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a test: sums over more of them are rounded in another way
    model = add(copy.deepcopy(built.model), init_lora_weights=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    output = tmp_path_factory.mktemp("run")
    train(model, inputs, output, 2)
    torch.set_num_threads(threads)
    return SimpleNamespace(model=model, before=before, output=output)


def test_training_changes_it_and_what_else_is_trainable(trained):
    for name, p in trained.model.named_parameters():
        used = not re.search("encoder.layers.1|post_layernorm|cross_attn|norm[12]|^text_encoder|gate", name)
        if ".routing" in name or used:
            assert not torch.equal(p, trained.before[name]), name


def test_a_resumed_run_ends_where_the_whole_one_did(trained, built, inputs, tmp_path):
    """The LoRA, the language model around it and the optimizer's state, bit for bit."""
    model = add(copy.deepcopy(built.model), init_lora_weights=True)
    for p in weights(model).values():
        p.data.fill_(7.0)  # not by chance what the first run began with
    train(model, inputs, tmp_path, 2, resume=str(trained.output / "checkpoint-1"))
    for (name, p), q in zip(model.named_parameters(), trained.model.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_a_checkpoint_of_a_run_loads_as_a_model(trained, inputs):
    loaded = MoVAForConditionalGeneration.from_pretrained(trained.output / "checkpoint-2")
    trained.model.eval()
    with loaded.routing_pass(), trained.model.routing_pass():
        assert torch.equal(logits(loaded, inputs), logits(trained.model, inputs))


def test_a_state_with_and_a_model_without_it_do_not_pass_silently(trained, model):
    state = load_file(trained.output / "checkpoint-1" / "model.safetensors")
    with pytest.raises(ValueError, match="state_dict must be of a model without a routing LoRA: call add_routing_lora"):
        model.load_state_dict(state, strict=False)
    plain = model.state_dict()
    with pytest.raises(ValueError, match="must have the weights of the routing LoRA as well"):
        add(model).load_state_dict(plain, strict=False)


# Other adapters.


def test_an_adapter_of_ones_own_on_the_whole_model(model, inputs):
    """It is on in both passes; the routing LoRA comes on top of it in one."""
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "w1"], init_lora_weights=False))
    own, before = logits(wrapped, inputs), trainable(model)
    add(model)
    assert trainable(model) == before | weights(model).keys()
    assert torch.equal(logits(wrapped, inputs), own)
    with wrapped.disable_adapter():
        none = logits(wrapped, inputs)
    with model.routing_pass():
        both = logits(wrapped, inputs)
    assert torch.equal(logits(wrapped, inputs), own)
    assert min((own - none).abs().max(), (both - own).abs().max()) > 1e-3


def test_an_adapter_of_ones_own_after_it(model, inputs):
    add(model)
    plain = logits(model, inputs)
    with model.routing_pass():
        routed = logits(model, inputs)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))  # begins with zeros
    torch.testing.assert_close(logits(wrapped, inputs), plain, rtol=1e-4, atol=1e-5)
    with model.routing_pass():
        torch.testing.assert_close(logits(wrapped, inputs), routed, rtol=1e-4, atol=1e-5)
    assert trainable(model) >= weights(model).keys()


def test_where_peft_has_taken_it_away_or_merged_it_the_pass_is_refused(model, inputs, tmp_path):
    wrapped = get_peft_model(add(model), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    expected = logits(wrapped, inputs)
    with wrapped.disable_adapter(), pytest.raises(RuntimeError, match="q_proj are disabled"), model.routing_pass():
        pass
    with pytest.raises(ValueError, match="no weights of adapters but the routing LoRA"):
        model.save_pretrained(tmp_path)
    wrapped.merge_adapter()
    with pytest.raises(RuntimeError, match="q_proj are merged into the weights"), model.routing_pass():
        pass
    wrapped.unmerge_adapter()
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(logits(merged, inputs), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="but it is gone"), merged.routing_pass():
        pass
    with pytest.raises(ValueError, match="must have the weights of the routing LoRA"):
        merged.save_pretrained(tmp_path)
