"""Checkpoints of others into this library's layout, and back: the official MoVA's, and each expert's own."""

# No "from __future__ import annotations": tyro reads the annotations of the command at run time.
import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, BertConfig, BertTokenizer

from ._checks import check
from .configuration import MoVAConfig
from .encoders import VisionEncoder
from .encoders.keys import from_official, from_public, to_official
from .experts import BASE, OFFICIAL, VisionExpert, get
from .modeling import MoVAForConditionalGeneration
from .official import official_system_prompt, official_template
from .processing import IMAGE_TOKEN, MoVAProcessor

TOWERS = (BASE.name, *(expert.name for expert in OFFICIAL))  # the official order
_ADAPTER, _BERT = "model.mm_projector.", "model.mm_projector.text_encoder.bert."
_TOWER = "model.vision_tower.vision_tower_"  # and the tower's number
_VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")
_CONFIG = "official_config.json"
# What the official config holds beside the language model's own fields.
_NOT_TEXT = {
    "architectures", "auto_map", "dtype", "expert_channels", "freeze_mm_mlp_adapter", "ft_vision_tower",
    "ft_vision_tower_last_n_layer", "image_aspect_ratio", "image_crop_resolution", "image_feat_size",
    "image_grid_pinpoints", "image_split_resolution", "model_type", "num_projector_layers", "num_routing_tokens",
    "tokenizer_model_max_length", "tokenizer_padding_side", "topk", "topk_experts", "torch_dtype",
    "transformers_version", "tune_mm_mlp_adapter", "use_mm_proj",
}  # fmt: skip
# That of Llama 3, in which the official model was trained; its tokenizer's own may lack it.
_LLAMA_3 = (
    "<|begin_of_text|>{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def convert(
    output: Path,
    official: Path | None = None,
    expert: tuple[str, ...] = (),
    code: Path | None = None,
    text_encoder: str | None = None,
    skip: tuple[str, ...] = (),
    back: Path | None = None,
) -> int:
    """Convert the official checkpoint, or single experts' own ones, into this library's layout; or back.

    Args:
        output: The new model's directory.
        official: The official checkpoint's directory.
        expert: name=path of an expert's own checkpoint (a file, or a directory of them), in the place of what the
            official one holds, or to add it to the model in output.
        code: Your copy of the official code: its routing prompt and system prompt go into the model.
        text_encoder: Directory or hub name of the BERT whose tokenizer the official model uses; default what its
            config says.
        skip: Experts to leave out; the model can then not use them.
        back: A model of this library, to write as an official checkpoint.
    """
    if back is not None:
        check(official is None and not expert, "back", "must be alone with output", str(back))
        to_official_checkpoint(back, output)
        return 0
    check(official is not None or expert, "official", "or expert or back must be given", None)
    own = {}
    for pair in expert:
        name, _, path = pair.partition("=")
        check(path, "expert", "must be name=path", pair)
        own[name] = Path(path)
    if official is not None:
        from_official_checkpoint(official, output, code=code, text_encoder=text_encoder, skip=(*skip, *own))
    config = MoVAConfig.from_pretrained(output) if (output / "config.json").is_file() else None
    for name, file in own.items():
        expert_ = get(name) if config is None else {e.name: e for e in config.pool}.get(name)
        check(expert_ is not None, "expert", "must be one of the model's", name)
        sizes = {} if config is None else config.encoder_sizes.get(name, {})
        convert_expert(expert_, file, output / "experts" / name, sizes)  # type: ignore[arg-type]
    return 0


def convert_expert(expert: VisionExpert, source: Path, target: Path, sizes: Mapping[str, Any] | None = None) -> None:
    """Write the encoder of an expert's own checkpoint to ``target``.

    Raises:
        ValueError: keys are missing or unexpected.
    """
    state = from_public(expert.name, read_state(source))
    VisionEncoder.from_state(state, expert, sizes).save(target)


def from_official_checkpoint(
    source: Path,
    target: Path,
    *,
    code: Path | None = None,
    text_encoder: str | None = None,
    skip: Iterable[str] = (),
    encoder_sizes: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Write the official checkpoint in ``source`` as a model with a processor; needs memory for all of it.

    Args:
        source: directory with config.json, weights (safetensors or PyTorch's, in shards or not) and a tokenizer.
        target: the new directory.
        code, text_encoder, skip: see :func:`convert`.
        encoder_sizes: where towers differ from the released sizes (``MoVAConfig.encoder_sizes``).

    Raises:
        FileNotFoundError: a part is not there.
        ValueError: keys are missing or unexpected; the message has them.
    """
    given = json.loads((source / "config.json").read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    state = read_state(source)
    check(_VOCABULARY[0] in state, "source", f"must have {_VOCABULARY[0]}", str(source))
    rows = max(len(state[_VOCABULARY[0]]), image_token_id + 1)
    bert = {key[len(_BERT) :]: state.pop(key) for key in list(state) if key.startswith(_BERT)}
    bert.pop("embeddings.position_ids", None)  # an index buffer of old versions
    config = _config(given, rows, image_token_id, _bert_config(bert), encoder_sizes or {})

    parts = {f"text_encoder.{key}": value for key, value in bert.items()}
    towers: dict[str, dict[str, Tensor]] = {name: {} for name in TOWERS}
    for key, value in state.items():
        tower, _, rest = key.removeprefix(_TOWER).partition(".")
        if key.startswith(_ADAPTER):
            if ".rope.freqs_" not in key:
                parts["adapter." + key[len(_ADAPTER) :]] = value
        elif key.startswith(_TOWER) and tower.isdigit() and int(tower) < len(TOWERS):
            towers[TOWERS[int(tower)]][rest] = value
        elif key in _VOCABULARY and len(value) < rows:  # the image's place is never looked up: any values will do
            parts[f"language_model.{key}"] = torch.cat([value, value.new_zeros(rows - len(value), value.shape[1])])
        else:
            parts[f"language_model.{key}"] = value
    absent = [name for name, tower_state in towers.items() if not tower_state and name not in skip]
    check(not absent, "source", f"must hold all towers (or give their own by expert, or skip them): {TOWERS}", absent)

    base = config.base_expert
    sizes = config.encoder_sizes
    encoder = VisionEncoder.from_state(from_official(base.name, towers[base.name]), base, sizes.get(base.name))
    parts |= {f"base.{key}": value for key, value in encoder.state_dict().items()}
    config.expert_path = "."  # the experts are written one by one below, not by save_pretrained
    model = MoVAForConditionalGeneration.from_pretrained(None, config=config, state_dict=parts, dtype="auto")
    _set_generation(model, tokenizer)
    model.save_pretrained(target)
    config.expert_path = None
    config.save_pretrained(target)
    for expert in config.pool:
        if expert.name not in skip:
            tower_state = from_official(expert.name, towers.pop(expert.name))
            made = VisionEncoder.from_state(tower_state, expert, sizes.get(expert.name))
            made.save(target / "experts" / expert.name)
    shutil.copyfile(source / "config.json", target / _CONFIG)

    is_llama_3 = "<|eot_id|>" in tokenizer.get_vocab()
    question_tokenizer = BertTokenizer.from_pretrained(
        text_encoder or given.get("mm_projector_text_encoder", "bert-large-uncased")
    )
    MoVAProcessor.for_config(
        config,
        tokenizer,
        question_tokenizer,
        system_prompt=None if code is None else official_system_prompt(code),
        routing_template=None if code is None else official_template(code),
        chat_template=_LLAMA_3 if is_llama_3 else None,
    ).save_pretrained(target)


def to_official_checkpoint(source: Path, target: Path) -> None:
    """Write a model that :func:`from_official_checkpoint` made, trained further or not, under the official names.

    Raises:
        FileNotFoundError: it was not made from an official checkpoint, or lacks an expert.
    """
    path = source / _CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"source must be a model that was converted from an official one, got {source}")
    given = json.loads(path.read_text(encoding="utf-8"))
    model = MoVAForConditionalGeneration.from_pretrained(source, dtype="auto")
    rows = given["vocab_size"]
    state = {
        key: value[:rows] if key in _VOCABULARY else value for key, value in model.language_model.state_dict().items()
    }
    state |= {_ADAPTER + key: value for key, value in model.adapter.official_state_dict().items()}
    state |= {_BERT + key: value for key, value in model.text_encoder.state_dict().items()}
    for i, name in enumerate(TOWERS):
        encoder = model.base if i == 0 else model.experts[name]
        with tempfile.TemporaryDirectory() as directory:
            encoder.save(directory)
            tower = to_official(name, load_file(Path(directory) / "model.safetensors"))
        state |= {f"{_TOWER}{i}.{key}": value for key, value in tower.items()}
    target.mkdir(parents=True, exist_ok=True)
    # Tables that all attentions share are written once for each, as the official code does.
    save_torch_state_dict({key: value.clone().contiguous() for key, value in state.items()}, target)
    shutil.copyfile(path, target / "config.json")
    AutoTokenizer.from_pretrained(source).save_pretrained(target)


def read_state(source: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint: a file, or all weight files of a directory; pickles only of plain tensors.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a file holds no tensors by name, or two files the same name.
    """
    found: Any
    files = [source]
    if source.is_dir():
        files = sorted(source.glob("*.safetensors")) or sorted(source.glob("pytorch_model*.bin"))
    if not files or not all(file.is_file() for file in files):
        raise FileNotFoundError(f"no weights (*.safetensors, pytorch_model*.bin, or a file) in {source}")
    state: dict[str, Tensor] = {}
    for file in files:
        if file.suffix == ".safetensors":
            found = load_file(file)
        else:
            found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            for wrapper in ("state_dict", "model", "module"):
                if isinstance(found, dict) and isinstance(found.get(wrapper), dict):
                    found = found[wrapper]
        tensors = isinstance(found, dict) and found and all(isinstance(value, Tensor) for value in found.values())
        check(tensors, "source", "must hold tensors by name", str(file))
        twice = sorted(state.keys() & found.keys())
        check(not twice, "source", "must have each name in one file", twice[:5])
        state |= found
    return state


def _config(
    given: Mapping[str, Any],
    vocabulary: int,
    image_token_id: int,
    text_encoder: BertConfig,
    encoder_sizes: Mapping[str, Mapping[str, Any]],
) -> MoVAConfig:
    text = {key: value for key, value in given.items() if key not in _NOT_TEXT and not key.startswith("mm_")}
    kind = given["model_type"].removeprefix("mova_")
    side, layer = given.get("image_feat_size", 48), given.get("mm_vision_select_layer", -2)
    base = replace(
        BASE, image_size=14 * side, input_size=14 * side, grid=(side, side), native_grid=(side, side), layer=layer
    )
    channels = given.get("expert_channels", [expert.channels for expert in OFFICIAL])
    experts = [replace(expert, channels=c) for expert, c in zip(OFFICIAL, channels, strict=True)]
    experts[0] = replace(experts[0], layer=layer)
    hidden = encoder_sizes.get(BASE.name, {}).get("hidden_size", base.channels)
    return MoVAConfig(
        {**text, "model_type": kind, "vocab_size": vocabulary},
        text_encoder,
        base=replace(base, channels=hidden),
        experts=experts,
        encoder_sizes=encoder_sizes,
        adapter_heads=hidden // 64,
        adapter_layers=given.get("num_projector_layers", 3),
        topk=given.get("topk_experts", given.get("topk", 3)),
        num_routing_tokens=given.get("num_routing_tokens", 144),
        image_token_id=image_token_id,
    )


def _bert_config(state: Mapping[str, Tensor]) -> BertConfig:
    """The sizes of a BERT, whose heads are 64 wide in all published ones."""
    words = state.get("embeddings.word_embeddings.weight")
    check(words is not None, "source", "must hold the text encoder", "no word embeddings")
    layers = {key.split(".")[2] for key in state if key.startswith("encoder.layer.")}
    width = words.shape[1]  # type: ignore[union-attr]
    return BertConfig(
        vocab_size=len(words),  # type: ignore[arg-type]
        hidden_size=width,
        num_hidden_layers=len(layers),
        num_attention_heads=max(1, width // 64),
        intermediate_size=len(state["encoder.layer.0.intermediate.dense.weight"]),
        max_position_embeddings=len(state["embeddings.position_embeddings.weight"]),
    )


def _set_generation(model: MoVAForConditionalGeneration, tokenizer: Any) -> None:
    """Greedy, never the image's placeholder, to the end of the turn."""
    ends = ("<|eot_id|>", tokenizer.eos_token)
    vocabulary = tokenizer.get_vocab()
    config = model.generation_config
    config.do_sample, config.suppress_tokens = False, [model.config.image_token_id]
    config.eos_token_id = [vocabulary[token] for token in dict.fromkeys(ends) if token in vocabulary]
