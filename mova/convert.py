"""Checkpoints of others into this library's layout, and back: the official MoVA's, and each expert's own."""

# No "from __future__ import annotations": tyro reads the annotations of the command at run time.
import json
import re
import shutil
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, BertConfig, BertTokenizer, GenerationConfig, PreTrainedConfig

from mova_kernels.ops import rope2d_table

from ._checks import check, check_weights
from .checkpoint import read_state
from .configuration_mova import MoVAConfig
from .encoders import VisionEncoder
from .encoders.keys import from_official, from_public, to_official, to_public
from .experts import BASE, OFFICIAL, VisionExpert
from .modeling_mova import ROUTING_LORA, MoVAForConditionalGeneration
from .official import official_system_prompt, official_template
from .processing_mova import IMAGE_TOKEN, MoVAProcessor

Directory = Annotated[Path | None, tyro.conf.arg(metavar="PATH")]

TOWERS = (BASE, *OFFICIAL)  # in the official order
# Where a part's weights are in an official checkpoint; the first match counts.
_PREFIXES = {
    "text_encoder": "model.mm_projector.text_encoder.bert.",
    "adapter": "model.mm_projector.",
    **{tower.name: f"model.vision_tower.vision_tower_{i}." for i, tower in enumerate(TOWERS)},
    "language_model": "",
}
_BUFFERS = re.compile(r"rotary_emb\.inv_freq$|text_encoder\.bert\.embeddings\.position_ids$")  # of old transformers
_TABLES = ".rope.freqs_"  # the adapter's rotary tables, which official checkpoints repeat per attention
_EMBEDDINGS, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_KEPT = "official"  # beside the model: the small files of the checkpoint that it was made from
_OF_THE_FILE = {"architectures", "auto_map", "dtype", "model_type", "torch_dtype", "transformers_version"}
# That of Llama 3, in which the official model was trained; what comes before it is in _chat_template.
_LLAMA_3 = (
    "{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
_BOS, _END_OF_TURN = "<|begin_of_text|>", "<|eot_id|>"


def convert(
    output: Path,
    official: Directory = None,
    expert: tuple[str, ...] = (),
    code: Directory = None,
    text_encoder: Annotated[str | None, tyro.conf.arg(metavar="STR")] = None,
    skip: tuple[str, ...] = (),
    back: Directory = None,
) -> int:
    """Convert the official checkpoint, or single experts' own ones, into this library's layout; or back.

    Args:
        output: The new model's directory; with expert alone, a model's directory too, or one for the experts.
        official: The official checkpoint's directory.
        expert: name=path of an expert's own checkpoint (a file, or a directory of them), in the place of what the
            official one holds, or to add it to the model in output; with back its name, to write it alone.
        code: Your copy of the official code: its routing prompt and system prompt go into the model.
        text_encoder: Directory or hub name of the BERT whose tokenizer the official model uses; default what its
            config says.
        skip: Experts to leave out; the model does not use them until they are added by expert.
        back: A model of this library, to write as the official checkpoint that it was made from; or experts of it, to
            write under the names of their authors' files, as name.safetensors.
    """
    of_official = code is not None or text_encoder is not None or skip
    if back is not None:
        check(not (official or of_official), "back", "must be alone with output and expert", str(back))
        if not expert:
            to_official_checkpoint(back, output)
        for name in expert:
            to_public_checkpoint(back, name, output / f"{name}.safetensors")
        return 0
    check(official or expert, "official", "or expert or back must be given", None)
    check(official or not of_official, "code", "text_encoder and skip must be given with official only", None)
    own = dict(_name_and_path(pair) for pair in expert)
    if official is not None:
        from_official_checkpoint(official, output, code=code, text_encoder=text_encoder, skip=skip, own=own)
        return 0
    config = MoVAConfig.from_pretrained(output) if (output / "config.json").is_file() else MoVAConfig()
    check(config.expert_path is None, "output", "must hold its experts itself", config.expert_path)
    pool = {e.name: e for e in config.pool}
    for name, path in own.items():
        check(name in pool, "expert", f"must be one of the model's ({', '.join(pool)})", name)
        convert_expert(pool[name], path, output / "experts" / name, config.encoder_sizes.get(name))
    if config.experts_in_use is not None:
        config.experts_in_use = [name for name in pool if name in config.experts_in_use or name in own]
        config.save_pretrained(output)
    return 0


def convert_expert(expert: VisionExpert, source: Path, target: Path, sizes: Mapping[str, Any] | None = None) -> None:
    """Write the encoder of an expert's own checkpoint to ``target``, in the dtype of the file.

    Args:
        expert: an official one, or ``clip``.
        source: a file, or a directory of them.
        target: the directory for it, in a model ``experts/<name>``.
        sizes: where it differs from the released sizes (``MoVAConfig.encoder_sizes``).

    Raises:
        FileNotFoundError: there are no weights.
        ValueError: keys are missing, unexpected or of another shape.
    """
    state = from_public(expert.name, read_state(source), sizes)
    VisionEncoder.from_state(state, expert, sizes).save(target)


def from_official_checkpoint(
    source: Path,
    target: Path,
    *,
    code: Path | None = None,
    text_encoder: str | None = None,
    skip: Collection[str] = (),
    own: Mapping[str, Path] | None = None,
    towers: Sequence[VisionExpert] = TOWERS,
    encoder_sizes: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Write the official checkpoint in ``source`` as a model with a processor.

    No tensor is changed, nor is its dtype. Weights are mapped into memory and written shard by shard; what a larger
    vocabulary changes is held in memory. config.json is written last, when all went well.

    Args:
        source: directory with config.json, weights (safetensors or PyTorch's, in shards or not) and a tokenizer.
        target: the directory for it, without a model.
        code, text_encoder, skip: see :func:`convert`.
        own: name to the expert's own checkpoint, in the place of the tower in ``source``.
        towers: base encoder and experts; the config in ``source`` wins where it says otherwise.
        encoder_sizes: where they differ from the released sizes (``MoVAConfig.encoder_sizes``).

    Raises:
        OSError: a file is not there; the tokenizer of the text encoder cannot be had.
        ValueError: keys are missing, unexpected or of another shape, and the message has them; the rotary tables are
            not those of the config; a name is not that of an expert; ``target`` holds a model.
    """
    own = own or {}
    names = [tower.name for tower in towers]
    for argument, given in (("skip", skip), ("expert", own)):
        unknown = sorted(set(given) - set(names[1:]))
        check(not unknown, argument, f"must be of the experts ({', '.join(names[1:])})", unknown)
    _check_new(target)

    fields = _official_fields(source)
    # With an empty config, for transformers knows no mova_llama.
    tokenizer = AutoTokenizer.from_pretrained(source, config=PreTrainedConfig())
    parts = _split(read_state(source))
    absent = [name for name in names if not parts[name] and name not in {*skip, *own}]
    rule = "must hold all towers; give an expert's own checkpoint by expert (name=path), or skip it"
    check(not absent, "source", rule, f"none of {', '.join(absent)}")
    question_tokenizer = _question_tokenizer(text_encoder or fields.get("mm_projector_text_encoder"))
    bert = _bert_config(parts["text_encoder"])
    config = _config(fields, parts, tokenizer, bert, towers, encoder_sizes or {})
    processor = MoVAProcessor.for_config(
        config,
        tokenizer,
        question_tokenizer,
        system_prompt=None if code is None else official_system_prompt(code),
        routing_template=None if code is None else official_template(code),
        chat_template=_chat_template(tokenizer),
    )
    fits = len(question_tokenizer) == bert.vocab_size
    check(fits, "text_encoder", f"must have the {bert.vocab_size} words of the checkpoint's", len(question_tokenizer))

    _widen(parts["language_model"], fields["vocab_size"], config.text_config.vocab_size)
    _check_parts(config, parts)
    base, sizes = config.base_expert, config.encoder_sizes
    backbone = from_official(base.name, parts[base.name])
    VisionEncoder.from_state(backbone, base, sizes.get(base.name))  # for its checks

    for expert in config.pool:
        directory = target / "experts" / expert.name
        if expert.name in own:
            convert_expert(expert, own[expert.name], directory, sizes.get(expert.name))
        elif expert.name not in skip:
            state = from_official(expert.name, parts[expert.name])
            VisionEncoder.from_state(state, expert, sizes.get(expert.name)).save(directory)
    weights = {
        f"{part}.{key}": value
        for part in ("language_model", "text_encoder", "adapter")
        for key, value in parts[part].items()
        if _TABLES not in key
    }
    target.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(weights | {f"base.backbone.{key}": value for key, value in backbone.items()}, target)
    processor.save_pretrained(target)
    _generation_config(config, tokenizer).save_pretrained(target)
    _copy_small_files(source, target / _KEPT)
    if skipped := {*skip} - {*own}:
        config.experts_in_use = [name for name in names[1:] if name not in skipped]
    config.save_pretrained(target)


def to_official_checkpoint(source: Path, target: Path) -> None:
    """Write a model that :func:`from_official_checkpoint` made, trained further or not, under the official names.

    With it go the small files of the original checkpoint: config.json and the tokenizer, without this library's token
    for images. Rotary tables get the dtype of the adapter's positions.

    Args:
        source: the model's directory, with its experts or with ``expert_path`` in its config.
        target: the directory for it, without a model.

    Raises:
        FileNotFoundError: it was not made from an official checkpoint, or lacks an expert.
        ValueError: it has a routing LoRA, for which official checkpoints have no place; ``target`` holds a model.
    """
    kept = source / _KEPT
    if not (kept / "config.json").is_file():
        raise FileNotFoundError(
            f"no {_KEPT}/config.json in {source}: mova convert writes it, copy it when you save again"
        )
    has_lora = (source / ROUTING_LORA).is_dir()
    check(not has_lora, "source", "must have no routing LoRA: official checkpoints have no place for it", str(source))
    _check_new(target)
    rows = json.loads((kept / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    config = MoVAConfig.from_pretrained(source)
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in read_state(source).items():
        part, _, rest = key.partition(".")
        parts.setdefault(part, {})[rest] = value[:rows].clone() if rest in (_EMBEDDINGS, _HEAD) else value
    adapter = config.adapter_config
    cosines, sines = (
        table.to(parts["adapter"]["pos_embed"].dtype)
        for table in rope2d_table(adapter.resolution, adapter.head_channels)
    )
    for key in _expected(config)["adapter"]:
        if _TABLES in key:
            parts["adapter"][key] = (cosines if key.endswith("cos") else sines).clone()
    base, sizes = config.base_expert, config.encoder_sizes
    backbone = {key.removeprefix("backbone."): value for key, value in parts.pop("base").items()}
    with tempfile.TemporaryDirectory() as directory:
        # Through the encoder, whose save has one layout in all versions of transformers.
        VisionEncoder.from_state(backbone, base, sizes.get(base.name)).save(directory)
        parts[base.name] = to_official(base.name, read_state(Path(directory)))
        for expert in config.pool:
            state = read_state(Path(config.expert_path or source) / "experts" / expert.name)
            parts[expert.name] = to_official(expert.name, state, sizes.get(expert.name))
        target.mkdir(parents=True, exist_ok=True)
        state = {_PREFIXES[part] + key: value for part, tensors in parts.items() for key, value in tensors.items()}
        save_torch_state_dict(state, target)
    _copy_small_files(kept, target)


def to_public_checkpoint(source: Path, name: str, target: Path) -> None:
    """Write one expert of the model in ``source`` to the file ``target``, under the names of its authors' own file.

    Raises:
        FileNotFoundError: the model has no weights of it.
        ValueError: it has no such expert; ``target`` is there already.
    """
    config = MoVAConfig.from_pretrained(source)
    names = [expert.name for expert in config.pool]
    check(name in names, "expert", f"must be one of the model's ({', '.join(names)})", name)
    check(not target.exists(), "output", "must not hold it yet", str(target))
    state = read_state(Path(config.expert_path or source) / "experts" / name)
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in to_public(name, state).items()}, target)


def _check_new(target: Path) -> None:
    check(not (target / "config.json").exists(), "output", "must not hold a model yet", str(target))


def _name_and_path(pair: str) -> tuple[str, Path]:
    name, _, path = pair.partition("=")
    check(name and path, "expert", "must be name=path", pair)
    return name, Path(path)


def _copy_small_files(source: Path, target: Path) -> None:
    """Config and tokenizer, whatever its kind."""
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        if file.suffix in (".json", ".jinja", ".model", ".txt") and not file.name.endswith(".index.json"):
            shutil.copyfile(file, target / file.name)


def _official_fields(source: Path) -> dict[str, Any]:
    """The fields of the official config."""
    fields = json.loads((source / "config.json").read_text(encoding="utf-8"))
    kind = fields.get("model_type")
    check(kind == "mova_llama", "source", "must be an official MoVA, model_type mova_llama", kind)
    check("vocab_size" in fields, "source", "must have vocab_size in its config", None)
    feature = fields.get("mm_vision_select_feature", "patch")
    check(feature == "patch", "source", "must have mm_vision_select_feature patch", feature)
    return fields


def _split(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The checkpoint's tensors by part, without the part's prefix; without buffers of old versions."""
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in _PREFIXES}
    for key, value in state.items():
        if not _BUFFERS.search(key):
            part, prefix = next((part, prefix) for part, prefix in _PREFIXES.items() if key.startswith(prefix))
            parts[part][key[len(prefix) :]] = value
    return parts


def _expected(config: MoVAConfig) -> dict[str, dict[str, Tensor]]:
    """Tensors without values under the official names, of the parts that are checked by them."""
    with torch.device("meta"):
        model = MoVAForConditionalGeneration(config)
    return {
        "language_model": model.language_model.state_dict(),
        "text_encoder": model.text_encoder.state_dict(),
        "adapter": model.adapter.official_state_dict(),
    }


def _check_parts(config: MoVAConfig, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Names and shapes of all that is no vision tower, and the values of the rotary tables, which are not kept."""
    for part, expected in _expected(config).items():
        prefix, state = _PREFIXES[part], parts[part]
        check_weights(
            f"the {part.replace('_', ' ')} at its config's sizes",
            missing=[prefix + key for key in expected.keys() - state.keys() if _TABLES not in key],
            unexpected=[prefix + key for key in state.keys() - expected.keys()],
            wrong=[
                f"{prefix}{key} {tuple(state[key].shape)} instead of {tuple(expected[key].shape)}"
                for key in expected.keys() & state.keys()
                if expected[key].shape != state[key].shape
            ],
        )
    adapter = config.adapter_config
    tables = dict(zip(("cos", "sin"), rope2d_table(adapter.resolution, adapter.head_channels), strict=True))
    for key, value in parts["adapter"].items():
        if _TABLES in key:
            same = torch.allclose(value.float(), tables[key[-3:]], rtol=0, atol=2**-8)  # bf16 rounds by 2**-9
            check(same, "source", "must hold the rotary tables of its config", _PREFIXES["adapter"] + key)


def _widen(language_model: dict[str, Tensor], official_rows: int, rows: int) -> None:
    """Rows of zeros for the image's token, which is never looked up and never an answer."""
    for key in (_EMBEDDINGS, _HEAD):
        value = language_model.get(key)
        if value is not None:
            rule = f"must have as many rows in {key} as vocab_size in its config, {official_rows}"
            check(len(value) == official_rows, "source", rule, len(value))
            if rows > official_rows:
                language_model[key] = torch.cat([value, value.new_zeros(rows - official_rows, *value.shape[1:])])


def _config(
    fields: Mapping[str, Any],
    parts: Mapping[str, Mapping[str, Tensor]],
    tokenizer: Any,
    text_encoder: BertConfig,
    towers: Sequence[VisionExpert],
    encoder_sizes: Mapping[str, Mapping[str, Any]],
) -> MoVAConfig:
    """The config; adds the image's token to the tokenizer, whose number may lie beyond the official vocabulary."""
    tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    known = {*AutoConfig.for_model("llama").to_dict(), "rope_theta", "rope_scaling"} - _OF_THE_FILE
    text = {key: value for key, value in fields.items() if key in known and value is not None}
    text["vocab_size"] = max(fields["vocab_size"], image_token_id + 1)
    width = fields.get("mm_hidden_size", towers[0].channels)
    table = parts["adapter"].get(f"blocks.0.self_attn{_TABLES}cos")
    head_channels = 64 if table is None else table.shape[-1]
    base, *experts = _towers(fields, towers)
    sizes = dict(encoder_sizes)
    if base.image_size != towers[0].image_size:
        sizes[base.name] = {**sizes.get(base.name, {}), "image_size": base.image_size}
    config = MoVAConfig(
        {**text, "model_type": "llama"},
        text_encoder,
        base=replace(base, channels=width),
        experts=experts,
        encoder_sizes=sizes,
        adapter_heads=width // head_channels,
        adapter_layers=fields.get("num_projector_layers", 3),
        topk=fields.get("topk_experts", fields.get("topk", 3)),  # the official builder reads one and writes the other
        num_routing_tokens=fields.get("num_routing_tokens", 144),
        image_token_id=image_token_id,
        architectures=[MoVAForConditionalGeneration.__name__],
    )
    config.dtype = next((value.dtype for value in parts["language_model"].values()), None)
    return config


def _towers(fields: Mapping[str, Any], towers: Sequence[VisionExpert]) -> list[VisionExpert]:
    """Base encoder and experts as the official config has them."""
    base, *experts = towers
    side, layer = fields.get("image_feat_size", base.grid[0]), fields.get("mm_vision_select_layer", base.layer)
    channels = fields.get("expert_channels", [expert.channels for expert in experts])
    right = isinstance(channels, list) and len(channels) == len(experts)
    check(right, "source", f"must have {len(experts)} expert_channels in its config", channels)
    size = side * (base.image_size // base.grid[0])
    found = [replace(base, image_size=size, input_size=size, grid=(side, side), native_grid=(side, side), layer=layer)]
    for expert, width in zip(experts, channels, strict=True):
        changes: dict[str, Any] = {"channels": width}
        if expert.name in ("dinov2", "biomedclip"):  # they are given the base encoder's image
            seen = expert.input_size
            if expert.name == "dinov2":
                changes["layer"] = layer
                seen = min(seen, size)  # larger images are made smaller, smaller ones are left
                cells = seen // (expert.input_size // expert.native_grid[0])
                changes |= {"grid": (cells, cells), "native_grid": (cells, cells)}
            changes |= {"image_size": size, "input_size": seen, "resize": None if seen == size else "bilinear"}
        found.append(replace(expert, **changes))
    return found


def _bert_config(state: Mapping[str, Tensor]) -> BertConfig:
    """The sizes of a BERT, whose heads are 64 wide in all published ones."""
    words, positions = "embeddings.word_embeddings.weight", "embeddings.position_embeddings.weight"
    inner = "encoder.layer.0.intermediate.dense.weight"
    absent = [_PREFIXES["text_encoder"] + key for key in (words, positions, inner) if key not in state]
    check_weights("the text encoder", missing=absent)
    width = state[words].shape[-1]
    return BertConfig(
        vocab_size=len(state[words]),
        hidden_size=width,
        num_hidden_layers=len({key.split(".")[2] for key in state if key.startswith("encoder.layer.")}),
        num_attention_heads=max(1, width // 64),
        intermediate_size=len(state[inner]),
        max_position_embeddings=len(state[positions]),
    )


def _question_tokenizer(name: str | None) -> BertTokenizer:
    name = name or "bert-large-uncased"
    error: Exception | None = None
    try:
        tokenizer = BertTokenizer.from_pretrained(name)
        # Where no file is found it may come without words, and without an error.
        if not set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
            return tokenizer
    except (OSError, ValueError) as reason:
        error = reason
    raise OSError(
        f"no tokenizer of the text encoder at {name!r}: give the directory or hub name of the BERT by text_encoder "
        "(bert-large-uncased's, officially)"
    ) from error


def _chat_template(tokenizer: Any) -> str | None:
    """That of the official code, for a tokenizer with Llama 3's tokens; None: the tokenizer's own.

    The official template begins with the token for the beginning, and the official code keeps the one that a tokenizer
    may add by itself: then its prompts begin with two.
    """
    if _END_OF_TURN not in tokenizer.get_vocab():
        return None
    adds_one = tokenizer("x")["input_ids"][0] == tokenizer.convert_tokens_to_ids(_BOS)
    return _BOS * (2 if adds_one else 1) + _LLAMA_3


def _generation_config(config: MoVAConfig, tokenizer: Any) -> GenerationConfig:
    """Greedy, never the image's placeholder, to the end of the turn."""
    vocabulary = tokenizer.get_vocab()
    ends = [vocabulary[token] for token in dict.fromkeys((_END_OF_TURN, tokenizer.eos_token)) if token in vocabulary]
    return GenerationConfig(
        do_sample=False,
        suppress_tokens=[config.image_token_id],
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
    )
