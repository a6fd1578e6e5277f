"""The official checkpoint into this library's layout and back, at a tiny size, from the checkpoint of tiny_official."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import tiny_experts
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_official import (
    ADAPTER,
    BERT,
    CHANNELS,
    EXPERTS,
    HEAD_CHANNELS,
    LLM,
    NAMES,
    SIZES,
    TEXT,
    TOWER,
    TOWERS,
    WIDTH,
    adapter_tables,
    llama_tokenizer,
    official_config,
    official_state,
    question_tokenizer,
    write,
)
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BertTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from mova import MoVAConfig, MoVAPipeline, cli
from mova.checkpoint import read_state
from mova.convert import from_official_checkpoint, to_official_checkpoint
from mova.convert.official_layout import TOWERS as OFFICIAL_TOWERS
from mova_kernels import MoVAdapter, MoVAdapterConfig

PICTURE = Image.linear_gradient("L").convert("RGB")
tiny_checkpoint = partial(from_official_checkpoint, towers=TOWERS, encoder_sizes=SIZES)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bert")
    question_tokenizer(directory)
    return str(directory)


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """The official checkpoint in two shards, bfloat16."""
    directory = tmp_path_factory.mktemp("official")
    rows = llama_tokenizer(directory)
    write(directory, official_state(rows), official_config(rows), shards=2)
    return directory


@pytest.fixture(scope="module")
def state(official):
    return read_state(official)


@pytest.fixture(scope="module")
def converted(official, bert, tmp_path_factory):
    directory = tmp_path_factory.mktemp("converted")
    tiny_checkpoint(official, directory, text_encoder=bert)
    return directory


@pytest.fixture
def changed(official, state, tmp_path):
    """Writes a copy of the official checkpoint with changed tensors (None: without it) and fields."""

    def make(tensors=(), **fields):
        directory = tmp_path / "changed"
        shutil.copytree(official, directory, ignore=shutil.ignore_patterns("model*"))
        config = json.loads((official / "config.json").read_text())
        new = {key: value for key, value in {**state, **dict(tensors)}.items() if value is not None}
        write(directory, new, {**config, **fields})
        return directory

    return make


def digest(tensor):
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).digest()


def same(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype and torch.equal(found[key], value), key


def test_files(converted):
    assert [tower.name for tower in OFFICIAL_TOWERS] == list(NAMES)
    for name in EXPERTS:
        assert {file.name for file in (converted / "experts" / name).iterdir()} == {"config.json", "model.safetensors"}
    assert {file.name for file in converted.iterdir()} == {
        "chat_template.jinja", "config.json", "experts", "generation_config.json", "model.safetensors", "official",
        "processor_config.json", "question_tokenizer", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip


def test_it_loads_and_answers(converted):
    model = AutoModelForImageTextToText.from_pretrained(converted)
    processor = AutoProcessor.from_pretrained(converted)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.bfloat16}
    assert {model.experts[name].backbone.dtype for name in EXPERTS} == {torch.bfloat16}
    config = model.config
    assert [expert.name for expert in config.pool] == list(EXPERTS)
    assert (config.topk, config.adapter_layers, config.adapter_heads, config.num_routing_tokens) == (2, 2, 2, 1)
    assert config.text_config.rope_parameters["rope_theta"] == 500000.0 and config.dtype == torch.bfloat16
    pipeline = MoVAPipeline(model, processor)
    answers = pipeline.answer(
        [PICTURE, PICTURE.rotate(90)], ["What?", "Where?"], experts=["all", None], max_new_tokens=4
    )
    assert answers[0].route.experts == EXPERTS and all(a.tokens.isfinite().all() for a in answers)
    assert answers[0].tokens.shape == (4, LLM)


def test_adapter_is_that_of_the_official_names(converted, state):
    """With the same inputs, a MoVAdapter that was given the official names itself says the same."""
    config = MoVAdapterConfig(
        in_channels=WIDTH, out_channels=LLM, num_heads=2, num_layers=2, topk=2, resolution=5, text_channels=TEXT,
        expert_channels=tuple(CHANNELS),
    )  # fmt: skip
    direct = MoVAdapter(config)
    keys = [key for key in state if key.startswith(ADAPTER) and not key.startswith(BERT)]
    direct.load_state_dict({key.removeprefix(ADAPTER): state[key] for key in keys})
    model = AutoModelForImageTextToText.from_pretrained(converted, dtype=torch.float32)
    base, text = torch.randn(2, 25, WIDTH), torch.randn(2, TEXT)
    features = {tower.name: torch.randn(2, tower.num_tokens, tower.channels) for tower in TOWERS[1:]}
    routing = torch.ones(2, 7, dtype=torch.bool)
    grids = [tower.grid for tower in TOWERS[1:]]
    expected = direct(base, list(features.values()), routing, text, grids=grids)
    assert torch.equal(model.fuse(base, features, routing, text), expected)


def test_every_tensor_is_there_bit_for_bit(converted, state):
    found = read_state(converted)
    for key, value in state.items():
        if key.startswith(BERT):
            name = "text_encoder." + key.removeprefix(BERT)
        elif key.startswith(ADAPTER):
            name = "adapter." + key.removeprefix(ADAPTER)
        else:
            name = "language_model." + key
        if ".rope.freqs_" in key or key.startswith(TOWER):
            assert name not in found
        elif key in ("model.embed_tokens.weight", "lm_head.weight"):
            assert torch.equal(found[name][:-1], value) and not found[name][-1].any()
        else:
            assert torch.equal(found[name], value) and found[name].dtype == torch.bfloat16
    for i, name in enumerate(NAMES):
        files = found if name == "clip" else read_state(converted / "experts" / name)
        there = {digest(value) for value in files.values()}
        for key, value in state.items():
            if key.startswith(f"{TOWER}{i}.") and ".rope" not in key and ".rope_" not in key and "rope_" not in key:
                parts = value.chunk(3) if name == "biomedclip" and ".qkv." in key else [value]
                assert all(digest(part) in there for part in parts), key


@pytest.mark.parametrize("form", ["bfloat16", "float32 pickles", "saved by the model"])
def test_the_way_back(form, official, state, converted, bert, tmp_path):
    source, expected = official, state
    if form == "float32 pickles":
        source = tmp_path / "pickles"
        source.mkdir()
        rows = llama_tokenizer(source)
        expected = official_state(rows, dtype=torch.float32)
        keys = list(expected)
        for i in (0, 1):
            torch.save({key: expected[key] for key in keys[i::2]}, source / f"pytorch_model-{i + 1:05}-of-00002.bin")
        (source / "config.json").write_text(json.dumps(official_config(rows)))
        converted = tmp_path / "converted"
        tiny_checkpoint(source, converted, text_encoder=bert)
    elif form == "saved by the model":
        AutoModelForImageTextToText.from_pretrained(converted).save_pretrained(tmp_path / "saved")
        shutil.copytree(converted / "official", tmp_path / "saved" / "official")
        converted = tmp_path / "saved"
    assert cli.convert(tmp_path / "back", back=converted) == 0
    same(read_state(tmp_path / "back"), expected)
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "back" / file).read_bytes() == (source / file).read_bytes()
    assert "<image>" not in PreTrainedTokenizerFast.from_pretrained(converted / "official").get_vocab()


def test_the_way_back_needs(converted, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no official/config\.json in .*: mova convert writes it"):
        to_official_checkpoint(tmp_path, tmp_path / "back")
    source = tmp_path / "model"
    shutil.copytree(converted, source)
    shutil.rmtree(source / "experts" / "vary")
    with pytest.raises(FileNotFoundError, match="experts/vary"):
        to_official_checkpoint(source, tmp_path / "back")
    (source / "routing").mkdir()
    with pytest.raises(ValueError, match="source must have no routing LoRA"):
        to_official_checkpoint(source, tmp_path / "back")
    with pytest.raises(ValueError, match="output must not hold a model yet"):
        to_official_checkpoint(converted, converted)
    assert not (tmp_path / "back").exists()


def test_names_at_the_official_depth(monkeypatch, official, bert, tmp_path):
    """All names of the released checkpoint, at tiny widths: 768 of them are the adapter's with its BERT."""
    depths = dict(zip(NAMES, (24, 40, 12, 24, 18, 12, 12, 32), strict=True))
    sizes = {name: {**SIZES[name], "num_hidden_layers": depth} for name, depth in depths.items()}
    for name in NAMES:
        monkeypatch.setitem(tiny_experts._TINY, name, (tiny_experts._TINY[name][0], sizes[name]))
    source = tmp_path / "deep"
    rows = llama_tokenizer(source)
    state = official_state(rows, layers=3, llama=32, bert=24)
    assert sum(key.startswith(ADAPTER) for key in state) == 768
    assert sum(key.startswith(f"{ADAPTER}blocks.1.") for key in state) == 116
    write(source, state, official_config(rows, num_hidden_layers=32, num_projector_layers=3))
    from_official_checkpoint(source, tmp_path / "out", text_encoder=bert, towers=TOWERS, encoder_sizes=sizes)
    to_official_checkpoint(tmp_path / "out", tmp_path / "back")
    back = read_state(tmp_path / "back")
    # tiny_experts has the tables of two of Co-DETR's blocks only.
    assert all(torch.equal(back[key], value) for key, value in state.items())
    assert all(key.startswith(f"{TOWER}3.") and ".rope." in key for key in back.keys() - state.keys())


# Side of the base encoder's grid, and what DINOv2 and BiomedCLIP see of its image (12 and 8 pixels at most).
SIDES = {6: (12, "bilinear", 8, "bilinear"), 3: (12, None, 8, "bilinear"), 2: (8, None, 8, None)}


@pytest.mark.parametrize("side", SIDES)
def test_side_of_the_base_grid(side, official, bert, tmp_path):
    source = tmp_path / "official"
    rows = llama_tokenizer(source)
    write(source, official_state(rows, side), official_config(rows, side))
    both_given = ["dinov2", "biomedclip"]
    tiny_checkpoint(source, tmp_path / "out", text_encoder=bert, skip={*EXPERTS} - {*both_given})
    config = MoVAConfig.from_pretrained(tmp_path / "out")
    base, size = config.base_expert, 4 * side
    assert (base.image_size, base.input_size, base.grid, base.native_grid) == (size, size, (side, side), (side, side))
    assert config.encoder_sizes["clip"]["image_size"] == size and config.adapter_config.resolution == side
    pool = {expert.name: expert for expert in config.pool}
    dinov2, biomedclip = pool["dinov2"], pool["biomedclip"]
    assert dinov2.image_size == biomedclip.image_size == size
    seen = (dinov2.input_size, dinov2.resize, biomedclip.input_size, biomedclip.resize)
    assert seen == SIDES[side] and dinov2.grid == (seen[0] // 4,) * 2
    others = {name: expert for name, expert in pool.items() if name not in both_given}
    assert others == {tower.name: tower for tower in TOWERS if tower.name in others}
    pipeline = MoVAPipeline.from_pretrained(str(tmp_path / "out"))
    (answer,) = pipeline.answer([PICTURE], ["What?"], experts=both_given, max_new_tokens=1)
    assert answer.tokens.shape == ((side // 2) ** 2, LLM) and answer.tokens.isfinite().all()


def test_config_of_the_builder(changed, bert, tmp_path):
    """topk_experts, which the official builder reads, wins over topk; the select layer is both encoders'."""
    source = changed(topk_experts=1, mm_vision_select_layer=-1, surprise="x")
    tiny_checkpoint(source, tmp_path / "out", text_encoder=bert, skip=EXPERTS)
    config = MoVAConfig.from_pretrained(tmp_path / "out")
    assert config.topk == 1 and (config.base_expert.layer, config.pool[0].layer, config.pool[1].layer) == (-1, -1, None)
    assert not hasattr(config.text_config, "expert_channels") and not hasattr(config.text_config, "surprise")


GONE, ODD, NEW = None, torch.zeros(1, 2, 3), torch.zeros(1)
BLOCK, LAYER, WORD = "blocks.1.mlp.w1.bias", "model.layers.1.mlp.up_proj.weight", "embeddings.LayerNorm.bias"
POSITIONS = f"{TOWER}0.vision_model.embeddings.position_embedding.weight"
WRONG = {
    "language model, missing": ({LAYER: GONE}, f"the language model at its config's sizes, got 1 missing ({LAYER})"),
    "language model, unexpected": ({"model.image_newline": NEW}, "got 1 unexpected (model.image_newline)"),
    "language model, shape": ({LAYER: ODD}, f"1 of another shape ({LAYER} (1, 2, 3) instead of (48, 32))"),
    "adapter, missing": ({ADAPTER + BLOCK: GONE}, "the adapter at its config's sizes, got 1 missing ("),
    "adapter, unexpected": ({f"{ADAPTER}cls.x": NEW}, f"got 1 unexpected ({ADAPTER}cls.x)"),
    "adapter, shape": ({ADAPTER + BLOCK: ODD}, f"1 of another shape ({ADAPTER}{BLOCK} (1, 2, 3) instead of (42,)"),
    "adapter, block": ({f"{ADAPTER}blocks.2.self_attn.rope.freqs_cos": NEW}, f"got 1 unexpected ({ADAPTER}blocks.2."),
    "adapter, table": (
        {f"{ADAPTER}blocks.1.self_attn.rope.freqs_sin": torch.ones(25, 8)},
        f"source must hold the rotary tables of its config, got '{ADAPTER}blocks.1.self_attn.rope.freqs_sin'",
    ),
    "text encoder, missing": ({BERT + WORD: GONE}, f"text encoder at its config's sizes, got 1 missing ({BERT}"),
    "text encoder, no words": ({f"{BERT}embeddings.word_embeddings.weight": GONE}, "the text encoder, got 1 missing"),
    "text encoder, unexpected": ({f"{BERT}pooler.x": NEW}, f"got 1 unexpected ({BERT}pooler.x)"),
    "text encoder, shape": ({BERT + WORD: ODD}, f"1 of another shape ({BERT}{WORD} (1, 2, 3) instead of (24,))"),
    "base, missing": ({f"{TOWER}0.vision_model.pre_layrnorm.bias": GONE}, "clip at its sizes, got 1 missing ("),
    "base, unexpected": ({f"{TOWER}0.surprise": NEW}, "clip at its sizes, got 1 unexpected (surprise)"),
    "base, 3 x 3 positions": (
        {POSITIONS: torch.zeros(10, 16)},
        "position_embedding.weight (10, 16) instead of (26, 16))",
    ),
    "expert, missing": ({f"{TOWER}7.pos_embed": GONE}, "sam at its sizes, got 1 missing ("),
    "expert, unexpected": ({f"{TOWER}7.surprise": NEW}, "sam at its sizes, got 1 unexpected (surprise)"),
    "expert, shape": ({f"{TOWER}3.out_norm.bias": ODD}, "codetr at its sizes, got 1 of another shape (out_norm.bias"),
    "tower of another number": ({f"{TOWER}8.x": NEW}, f"got 1 unexpected ({TOWER}8.x)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_weights_are_named(name, changed, bert, tmp_path):
    tensors, message = WRONG[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        tiny_checkpoint(changed(tensors), tmp_path / "out", text_encoder=bert)
    assert not (tmp_path / "out" / "config.json").exists()


FIELDS = {
    "model_type": ("llama", "source must be an official MoVA, model_type mova_llama, got 'llama'"),
    "mm_vision_select_feature": ("cls_patch", "source must have mm_vision_select_feature patch, got 'cls_patch'"),
    "expert_channels": ([16, 12], "source must have 7 expert_channels in its config, got [16, 12]"),
    "vocab_size": (
        9,
        "source must have as many rows in model.embed_tokens.weight as vocab_size in its config, 9, got 2",
    ),
    "num_routing_tokens": (9, "num_routing_tokens must be a square whose root divides"),
    "num_projector_layers": (1, "unexpected (model.mm_projector.blocks.1."),
}


@pytest.mark.parametrize("field", FIELDS)
def test_wrong_config(field, changed, bert, tmp_path):
    value, message = FIELDS[field]
    with pytest.raises(ValueError, match=re.escape(message)):
        tiny_checkpoint(changed(**{field: value}), tmp_path / "out", text_encoder=bert)


def test_what_old_versions_saved_is_left_out(changed, bert, tmp_path):
    buffers = (f"{BERT}embeddings.position_ids", "model.layers.0.self_attn.rotary_emb.inv_freq",
               f"{TOWER}0.vision_model.embeddings.position_ids")  # fmt: skip
    tables = [ADAPTER + key for key in adapter_tables(5) if key != "blocks.0.self_attn.rope.freqs_cos"]
    source = changed({**{key: torch.zeros(1) for key in buffers}, **dict.fromkeys(tables)})
    tiny_checkpoint(source, tmp_path / "out", text_encoder=bert, skip=EXPERTS)
    assert MoVAConfig.from_pretrained(tmp_path / "out").adapter_heads == WIDTH // HEAD_CHANNELS


def test_missing_towers_can_be_skipped_or_given(changed, state, bert, tmp_path):
    lost = {key: None for key in state if key.startswith((f"{TOWER}6.", f"{TOWER}7."))}
    source = changed(lost)
    message = "source must hold all towers; give an expert's own checkpoint by expert (name=path), or skip it, got "
    with pytest.raises(ValueError, match=re.escape(message + "'none of biomedclip, sam'")):
        tiny_checkpoint(source, tmp_path / "out", text_encoder=bert, skip=["vary"])
    file = tmp_path / "sam.pth"
    encoder = tiny_experts.official_state("sam")
    torch.save({f"image_encoder.{key}": value for key, value in encoder.items()} | {"mask_decoder.x": NEW}, file)
    output = tmp_path / "out"
    tiny_checkpoint(source, output, text_encoder=bert, skip=["biomedclip", "vary"], own={"sam": file})
    assert sorted(p.name for p in (output / "experts").iterdir()) == sorted({*EXPERTS} - {"biomedclip", "vary"})
    model = AutoModelForImageTextToText.from_pretrained(output)
    there = model.experts["sam"].backbone.state_dict()
    assert {digest(value) for value in there.values()} == {digest(value) for value in encoder.values()}
    assert model.experts.allowed == tuple(name for name in EXPERTS if name not in ("biomedclip", "vary"))
    with pytest.raises(FileNotFoundError, match="no weights of the expert 'vary'"):
        model.experts["vary"]

    # The same, into a model that is there already.
    vary = tiny_experts.official_state("vary")
    save_file(vary, tmp_path / "vary.safetensors")
    assert cli.convert(output, expert=(f"vary={tmp_path / 'vary.safetensors'}",)) == 0
    assert torch.equal(model.experts["vary"].backbone.state_dict()["net_2.weight"], vary["net_2.weight"])
    with pytest.raises(ValueError, match=r"expert must be one of the model's \(dinov2, .*\), got 'eva'"):
        cli.convert(output, expert=("eva=x",))


def test_an_own_expert_replaces_the_tower(official, bert, tmp_path):
    own = tiny_experts.official_state("deplot")
    torch.save({f"encoder.{key}": value for key, value in own.items()}, tmp_path / "pytorch_model.bin")
    skip = [name for name in EXPERTS if name != "deplot"]
    tiny_checkpoint(official, tmp_path / "out", text_encoder=bert, skip=skip, own={"deplot": tmp_path})
    file = load_file(tmp_path / "out" / "experts" / "deplot" / "model.safetensors")
    assert {digest(value) for value in file.values()} == {digest(value) for value in own.values()}
    assert {value.dtype for value in file.values()} == {torch.float32}


@pytest.mark.parametrize("spare", [0, 7])
def test_vocabulary(spare, official, bert, tmp_path):
    """The image's token is the first one beyond the tokenizer; rows are added only if there is none for it."""
    source = tmp_path / "official"
    tokens = llama_tokenizer(source)
    rows = tokens + spare
    state = official_state(rows)
    write(source, state, official_config(rows))
    tiny_checkpoint(source, tmp_path / "out", text_encoder=bert, skip=EXPERTS)
    config = MoVAConfig.from_pretrained(tmp_path / "out")
    assert config.image_token_id == tokens and config.text_config.vocab_size == max(rows, tokens + 1)
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert processor.image_token_id == tokens
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        found = read_state(tmp_path / "out")[f"language_model.{key}"]
        assert torch.equal(found[:rows], state[key]) and len(found) == config.text_config.vocab_size


def test_generation(converted):
    config = GenerationConfig.from_pretrained(converted)
    vocabulary = AutoProcessor.from_pretrained(converted).tokenizer.get_vocab()
    assert config.do_sample is False and config.suppress_tokens == [vocabulary["<image>"]]
    assert config.eos_token_id == [vocabulary["<|eot_id|>"], vocabulary["<|end_of_text|>"]]
    model = AutoModelForImageTextToText.from_pretrained(converted)
    assert model.generation_config.suppress_tokens == config.suppress_tokens


PROMPT = "Pick:\nA. one\nB. two\nC. three\nD. four\nE. five\nF. six\nG. seven\n\nAsked:\n"


@pytest.mark.parametrize("adds_bos", [False, True])
def test_official_prompts(adds_bos, official, bert, tmp_path):
    code = tmp_path / "code" / "mova"
    code.mkdir(parents=True)
    (code / "constants.py").write_text(f"ROUTING_PROMPT = {PROMPT!r}\n")
    (code / "conversation.py").write_text(
        "conv_mova_llama3 = Conversation(\n"
        '    system="<|begin_of_text|><|start_header_id|>system<|end_header_id|>\\n\\nYou look.",\n)\n'
    )
    source = tmp_path / "official"
    shutil.copytree(official, source)
    llama_tokenizer(source, adds_bos)
    tiny_checkpoint(source, tmp_path / "out", code=code.parent, text_encoder=bert, skip=EXPERTS)
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert processor.routing_template == PROMPT and processor.system_prompt == "You look."
    text = (
        "<|start_header_id|>system<|end_header_id|>\n\nYou look.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n<image>\nWhy?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    # Where the tokenizer adds a beginning to the template's, the official code has both.
    assert processor.conversation("Why?") == "<|begin_of_text|>" * (1 + adds_bos) + text
    ids = processor(PICTURE, processor.conversation("Why?"))["input_ids"][0]
    assert (ids == 0).sum() == 1 + adds_bos


CALLS = {
    "nothing": ({}, "official or expert or back must be given, got None"),
    "both": ({"back": Path("x"), "official": Path("y")}, "back must be alone with output and expert, got 'x'"),
    "code alone": ({"expert": ("sam=x",), "code": Path("x")}, "must be given with official only"),
    "no path": ({"expert": ("sam",)}, "expert must be name=path, got 'sam'"),
    "unknown expert": ({"expert": ("eva=x",)}, "expert must be one of the model's (dinov2, "),
    "unknown own": ({"official": Path("x"), "expert": ("clip=x",)}, "expert must be of the experts (dinov2, "),
    "unknown skip": ({"official": Path("x"), "skip": ("sma",)}, "skip must be of the experts (dinov2, "),
}


@pytest.mark.parametrize("name", CALLS)
def test_bad_call(name, tmp_path):
    arguments, message = CALLS[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        cli.convert(tmp_path / "out", **arguments)


def test_text_encoder(official, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(OSError, match=r"no tokenizer of the text encoder at '/nowhere/bert': give .* by text_encoder"):
        tiny_checkpoint(official, tmp_path / "out", text_encoder="/nowhere/bert")
    special = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}
    BertTokenizer(vocab=special).save_pretrained(tmp_path)
    with pytest.raises(OSError, match="no tokenizer of the text encoder at"):
        tiny_checkpoint(official, tmp_path / "out", text_encoder=str(tmp_path))
    BertTokenizer(vocab={**special, "word": 5}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="text_encoder must have the 60 words of the checkpoint's, got 6"):
        tiny_checkpoint(official, tmp_path / "out", text_encoder=str(tmp_path))


def command(monkeypatch, *arguments):
    """The exit status of ``mova convert``, in this process."""
    monkeypatch.setattr(sys, "argv", ["mova", "convert", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code


def test_the_command(official, converted, bert, tmp_path, monkeypatch, capsys):
    output, back = tmp_path / "out", tmp_path / "back"
    line = [sys.executable, "-m", "mova", "convert", "--output", str(back), "--back", str(converted)]
    by_itself = subprocess.Popen(line, stderr=subprocess.DEVNULL)
    run = partial(command, monkeypatch)
    monkeypatch.setattr(cli, "from_official_checkpoint", tiny_checkpoint)
    arguments = ("--output", output, "--official", official, "--text-encoder", bert)
    assert run(*arguments, "--skip", *EXPERTS) == 0
    assert run(*arguments) == 2
    assert f"mova: output must not hold a model yet, got '{output}'" in capsys.readouterr().err
    files = []
    for name in ("sam", "vary"):
        save_file(tiny_experts.official_state(name), tmp_path / f"{name}.safetensors")
        files.append(f"{name}={tmp_path / name}.safetensors")
    assert run("--output", output, "--expert", *files) == 0
    model = MoVAPipeline.from_pretrained(str(output)).model
    assert model.experts.allowed == ("vary", "sam")
    assert all(model.experts[name].expert.name == name for name in ("sam", "vary"))

    assert run("--back", output, "--expert", "sam", "--output", tmp_path / "files") == 0
    official_sam = read_state(tmp_path / "sam.safetensors")
    found = read_state(tmp_path / "files" / "sam.safetensors")
    assert found.keys() == {f"image_encoder.{key}" for key in official_sam}
    assert all(torch.equal(found[f"image_encoder.{key}"], value) for key, value in official_sam.items())
    assert run("--back", output, "--expert", "bert", "--output", tmp_path / "files") == 2

    assert by_itself.wait() == 0
    assert read_state(back).keys() == read_state(official).keys()
