"""Model folders that are incomplete or damaged: every file of one, deleted, cut off or of another shape."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from mova import MoVAForConditionalGeneration, MoVAPipeline, cli
from mova.convert.official_config import question_tokenizer
from mova.demo import small_model
from mova.demo.pictures import pictures

IMAGES, QUESTIONS = [p.image for p in pictures()[:2]], [p.question for p in pictures()[:2]]
EXPERTS = [["deplot"], ["sam", "vary"]]
FILES = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "question_tokenizer/tokenizer.json",
    "question_tokenizer/tokenizer_config.json",
    "experts/sam/config.json",
    "experts/sam/model.safetensors",
    "experts/biomedclip/config.json",
]
DAMAGES = {
    "deleted": Path.unlink,
    "cut off": lambda file: os.truncate(file, file.stat().st_size // 2),
    "emptied": lambda file: file.write_bytes(b""),
    "a list": lambda file: file.write_text("[1]"),
    "a string": lambda file: file.write_text('"x"'),
    "null": lambda file: file.write_text("null"),
    "no text": lambda file: file.write_bytes(b"\xff\xfe\x00"),
    "deep": lambda file: file.write_text("[" * 100_000),
}
HARMLESS = {("generation_config.json", "deleted")}  # transformers makes it from the config


@pytest.fixture
def copy(saved_model, tmp_path):
    return shutil.copytree(saved_model, tmp_path / "copy")


@pytest.fixture(scope="module")
def expected():
    return small_model().fuse(IMAGES, QUESTIONS, EXPERTS)


def load(directory):
    return MoVAPipeline.from_pretrained(str(directory))


def test_the_list_of_files_is_that_of_a_saved_model(saved_model):
    kinds = {path.relative_to(saved_model).as_posix() for path in saved_model.rglob("*") if path.is_file()}
    assert {name for name in kinds if not name.startswith("experts/")} <= {*FILES, "chat_template.jinja"}
    assert set(FILES) <= kinds


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_an_error_that_names_it(copy, expected, name, damage):
    DAMAGES[damage](copy / name)
    if (name, damage) in HARMLESS:
        assert torch.equal(load(copy).fuse(IMAGES, QUESTIONS, EXPERTS).tokens, expected.tokens)
        return
    with pytest.raises((ValueError, OSError)) as found:
        load(copy)
    named = (Path(name).parent if damage == "deleted" else Path(name)).as_posix()
    assert str(copy) in str(found.value) and named.removeprefix(".") in str(found.value)


WRONG = [  # a file, the way to a field, a value of another type or beyond its rule
    ("config.json", ("text_config", "hidden_size"), "wide"),
    ("config.json", ("text_config", "num_hidden_layers"), [2]),
    ("config.json", ("text_config", "vocab_size"), "512"),
    ("config.json", ("text_config",), 3),
    ("config.json", ("text_config",), {}),
    ("config.json", ("text_config",), None),
    ("config.json", ("text_encoder_config",), {}),
    ("config.json", ("experts",), []),
    ("config.json", ("base",), None),
    ("config.json", ("model_type",), "llama"),
    ("config.json", ("dtype",), -1),
    ("config.json", ("dtype",), "wide"),
    ("config.json", ("dtype",), "torch.float16"),
    ("config.json", ("text_encoder_config", "hidden_size"), None),
    ("config.json", ("topk",), "3"),
    ("config.json", ("adapter_heads",), 0),
    ("config.json", ("adapter_layers",), 1.5),
    ("config.json", ("num_routing_tokens",), "16"),
    ("config.json", ("image_token_id",), "3"),
    ("config.json", ("routing_lora",), "no"),
    ("config.json", ("freeze_text_encoder",), "false"),
    ("config.json", ("experts",), "sam"),
    ("config.json", ("experts",), {"sam": 1}),
    ("config.json", ("experts", 0, "grid"), 3),
    ("config.json", ("experts", 0, "channels"), "48"),
    ("config.json", ("base", "image_size"), None),
    ("config.json", ("encoder_sizes",), [1]),
    ("config.json", ("encoder_sizes", "sam"), 7),
    ("config.json", ("experts_in_use",), ["bert"]),
    ("config.json", ("experts_in_use",), 3),
    ("config.json", ("expert_path",), 3),
    ("processor_config.json", ("num_image_tokens",), "64"),
    ("processor_config.json", ("topk",), "3"),
    ("processor_config.json", ("experts",), 3),
    ("processor_config.json", ("experts", 0, "grid"), "x"),
    ("processor_config.json", ("base",), []),
    ("processor_config.json", ("system_prompt",), 3),
    ("processor_config.json", ("routing_template",), 3),
    ("processor_config.json", ("question_words",), 96),
    ("generation_config.json", ("max_new_tokens",), "many"),
    ("generation_config.json", ("eos_token_id",), "two"),
    ("generation_config.json", ("num_beams",), 0),
    ("generation_config.json", ("num_beams",), 2.5),
    ("generation_config.json", ("stop_strings",), 5),
    ("generation_config.json", ("stop_strings",), []),
    ("experts/sam/config.json", ("hidden_size",), "wide"),
    ("experts/sam/config.json", ("hidden_size",), 64),
    ("experts/sam/config.json", ("num_hidden_layers",), None),
]


@pytest.mark.parametrize(("name", "way", "value"), WRONG, ids=lambda x: str(x).replace("/", "-"))
def test_a_field_of_another_type_is_an_error_that_names_the_file(copy, name, way, value):
    fields = json.loads((copy / name).read_text())
    inner = fields
    for key in way[:-1]:
        inner = inner[key]
    inner[way[-1]] = value
    (copy / name).write_text(json.dumps(fields))
    with pytest.raises((ValueError, OSError)) as found:
        load(copy)
    assert str(copy) in str(found.value)


@pytest.mark.parametrize("folder", ["", "experts/sam"])
@pytest.mark.parametrize("damage", ["cut off", "deleted", "no weight_map", "a list", "names a list", "empty", "alone"])
def test_shards_and_their_index(copy, folder, damage):
    directory = copy / folder
    model = MoVAForConditionalGeneration.from_pretrained(copy)
    assert model.experts["sam"] is not None
    shutil.rmtree(copy / "experts" / "sam")
    (copy / "model.safetensors").unlink()
    model.save_pretrained(copy, max_shard_size="20KB")
    load(copy)
    index = directory / "model.safetensors.index.json"
    file = sorted(directory.glob("*-of-*.safetensors"))[1]
    if damage in ("cut off", "deleted"):
        DAMAGES[damage](file)
    else:
        file = index
        maps = {
            "no weight_map": {},
            "a list": [1],
            "names a list": {"weight_map": {"a": [1]}},
            "empty": {"weight_map": {}},
        }
        if damage == "alone":  # without metadata, which transformers wants of a model
            maps[damage] = {"weight_map": json.loads(index.read_text())["weight_map"]}
        index.write_text(json.dumps(maps[damage]))
        if damage == "alone" and folder:
            load(copy)
            return
    with pytest.raises((ValueError, OSError), match=file.name.replace(".", r"\.")) as found:
        load(copy)
    assert str(directory) in str(found.value)


PICKLES = {
    "text": b"hello",
    "a memo": b"\x80\x02h\x05.",
    "a list": [torch.zeros(2)],
    "numbers as names": {1: torch.zeros(2)},
    "no tensors": {"a": 3},
    "nothing": b"",
}


@pytest.mark.parametrize("folder", ["", "experts/sam"])
@pytest.mark.parametrize("content", PICKLES)
def test_a_pickle_that_holds_no_weights(copy, folder, content):
    (copy / folder / "model.safetensors").unlink()
    file, found = copy / folder / "pytorch_model.bin", PICKLES[content]
    file.write_bytes(found) if isinstance(found, bytes) else torch.save(found, file)
    with pytest.raises(ValueError, match=re.escape(str(file))):
        load(copy)


@pytest.mark.parametrize("load_it", [AutoModelForImageTextToText.from_pretrained, AutoConfig.from_pretrained, load])
def test_a_config_without_its_parts_is_not_that_of_the_released_model(copy, load_it):
    (copy / "config.json").write_text('{"model_type": "mova"}')
    with pytest.raises(ValueError, match="text_config must be the config of a model"):
        load_it(copy)


def test_a_damaged_chat_template(copy):
    (copy / "chat_template.jinja").write_text("{{ broken")
    with pytest.raises(ValueError, match=f"the chat template in {re.escape(str(copy))} cannot be used"):
        load(copy)


def test_a_missing_folder_of_the_question_tokenizer(copy):
    shutil.rmtree(copy / "question_tokenizer")
    with pytest.raises(FileNotFoundError, match="question_tokenizer"):
        load(copy)


@pytest.mark.parametrize("fault", ["another size", "the language model's", "special tokens alone"])
def test_another_question_tokenizer_than_the_one_that_was_saved(copy, fault):
    from transformers import BertTokenizer

    target = copy / "question_tokenizer"
    if fault == "the language model's":
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(copy / name, target / name)
    else:
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(["a", "b"] if fault == "another size" else [])]
        BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(target)
    with pytest.raises(ValueError, match=r"question_tokenizer must .*copy"):
        load(copy)


def test_a_tokenizer_with_more_words_than_the_text_encoder():
    from transformers import BertTokenizer

    pipeline = small_model()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(200))]
    pipeline.processor.question_tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    with pytest.raises(ValueError, match=r"question_tokenizer of the text encoder's 96 words, got 205"):
        MoVAPipeline(pipeline.model, pipeline.processor)


def test_a_processor_of_another_model(copy):
    fields = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**fields, "image_token_id": 9}))
    with pytest.raises(ValueError, match=r"must number the image token as the model does \(9\), got 3"):
        load(copy)


PROCESSORS = {
    "experts in another order": (lambda f: f["experts"].reverse(), "must have the model's experts in their order"),
    "another mean": (lambda f: f["experts"][0].update(mean=[0.5, 0.5, 0.5]), "must have the model's dinov2"),
    "another base": (lambda f: f["base"].update(std=[0.5, 0.5, 0.5]), "must have the model's clip"),
    "fewer image tokens": (lambda f: f.update(num_image_tokens=16), "must make as many image tokens as the model"),
}


@pytest.mark.parametrize("fault", PROCESSORS)
def test_a_processor_of_other_encoders(copy, fault):
    change, message = PROCESSORS[fault]
    file = copy / "processor_config.json"
    fields = json.loads(file.read_text())
    change(fields)
    file.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=message):
        load(copy)


def test_a_processor_with_other_descriptions_is_the_models(copy):
    file = copy / "processor_config.json"
    fields = json.loads(file.read_text())
    fields["experts"][0]["description"] = "Sees everything."
    file.write_text(json.dumps(fields))
    load(copy)


@pytest.mark.parametrize("command", ["answer", "info"])
@pytest.mark.parametrize("damage", ["a list", "cut off", "a string", "no text"])
def test_on_the_command_line_there_is_no_traceback(copy, capsys, command, damage):
    DAMAGES[damage](copy / "config.json")
    more = ["--image", "x.png", "--question", "Why?"] if command == "answer" else []
    with pytest.raises(SystemExit) as code:
        cli.main([command, "--model", str(copy), *more])
    assert code.value.code == cli.FAILED
    err = capsys.readouterr().err
    assert "config.json" in err and "Traceback" not in err


def test_converting_without_the_words_of_the_text_encoder(tmp_path):
    with pytest.raises(OSError, match="no tokenizer of the text encoder at"):
        question_tokenizer(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(OSError, match="no tokenizer of the text encoder at"):
        question_tokenizer(str(tmp_path))
