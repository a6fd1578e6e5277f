"""The dimensions of a whole model: language model, text encoder, base encoder, experts and adapter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig

from mova_kernels import MoVAdapterConfig

from ._checks import check, check_int
from .experts import BASE, OFFICIAL, VisionExpert, resolve

_FIELDS = {field.name for field in fields(VisionExpert)}


class MoVAConfig(PretrainedConfig):
    """Configuration of :class:`MoVAForConditionalGeneration`; without arguments, the released model's dimensions.

    Args:
        text_config: the language model's, any that ``AutoModelForCausalLM`` knows; default Llama 3 8B.
        text_encoder_config: config of the BERT that reads the question for the adapter's gates; default BERT-large.
        base: the encoder that sees every image, a VisionExpert or its fields.
        experts: the experts in the order of the adapter's columns: names, VisionExperts or their fields.
        encoder_sizes: name to those sizes of an encoder that differ from the released ones (fields of transformers'
            configs).
        adapter_heads, adapter_layers, topk: of :class:`mova_kernels.MoVAdapterConfig`; its other fields follow from
            these.
        num_routing_tokens: how many image tokens the router sees; its root must divide the side of the answer's tokens.
        freeze_text_encoder: no gradient for the text encoder and no dropout in it. (The official default trains it.)
        image_token_id: the placeholder of an image token in ``input_ids``, below the vocabulary's size; default its
            last.
        experts_in_use: names; the router offers no other, and others need no weights. None: all.
        routing_lora: whether the model has a LoRA for the routing pass, in its folder ``routing``.
        expert_path: a directory or a hub repository that has ``experts/<name>``; None: they lie with the model.

    Raises:
        TypeError, ValueError: a field breaks its rule; the message names it.
    """

    model_type = "mova"
    sub_configs = {"text_config": AutoConfig, "text_encoder_config": AutoConfig}  # noqa: RUF012  # as transformers' own

    def __init__(
        self,
        text_config: PretrainedConfig | Mapping[str, Any] | None = None,
        text_encoder_config: PretrainedConfig | Mapping[str, Any] | None = None,
        base: VisionExpert | Mapping[str, Any] = BASE,
        experts: Iterable[str | VisionExpert | Mapping[str, Any]] = OFFICIAL,
        encoder_sizes: Mapping[str, Mapping[str, Any]] | None = None,
        adapter_heads: int = 16,
        adapter_layers: int = 3,
        topk: int = 3,
        num_routing_tokens: int = 144,
        freeze_text_encoder: bool = True,
        image_token_id: int | None = None,
        experts_in_use: Iterable[str] | None = None,
        routing_lora: bool = False,
        expert_path: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.text_config = _sub_config(text_config, "llama", _LLAMA_3_8B)
        self.text_encoder_config = _sub_config(text_encoder_config, "bert", _BERT_LARGE)
        self.base = _fields(resolve([_expert(base)])[0])
        self.experts = [_fields(expert) for expert in resolve(_expert(e) for e in experts)]
        self.encoder_sizes = {name: dict(sizes) for name, sizes in (encoder_sizes or {}).items()}
        self.adapter_heads, self.adapter_layers, self.topk = adapter_heads, adapter_layers, topk
        self.num_routing_tokens = num_routing_tokens
        self.freeze_text_encoder = freeze_text_encoder
        vocabulary = self.text_config.vocab_size
        self.image_token_id = vocabulary - 1 if image_token_id is None else image_token_id
        self.experts_in_use = None if experts_in_use is None else list(experts_in_use)
        self.routing_lora, self.expert_path = routing_lora, expert_path
        kwargs.setdefault("tie_word_embeddings", getattr(self.text_config, "tie_word_embeddings", False))
        super().__init__(**kwargs)

        for name in ("freeze_text_encoder", "routing_lora"):
            check(isinstance(getattr(self, name), bool), name, "must be a bool", getattr(self, name), TypeError)
        is_path = expert_path is None or isinstance(expert_path, str)
        check(is_path, "expert_path", "must be a string or None", expert_path, TypeError)
        check_int("image_token_id", self.image_token_id, 0)
        in_vocabulary = self.image_token_id < vocabulary
        check(in_vocabulary, "image_token_id", f"must be below the vocabulary's {vocabulary}", self.image_token_id)
        known = {self.base["name"], *(expert["name"] for expert in self.experts)}
        check(known.issuperset(self.encoder_sizes), "encoder_sizes", f"must be of {sorted(known)}", encoder_sizes)
        check(len(known) == 1 + len(self.experts), "base", "must have another name than the experts", self.base["name"])
        names = [expert["name"] for expert in self.experts]
        in_use = self.experts_in_use is None or set(self.experts_in_use) <= set(names)
        check(in_use, "experts_in_use", f"must be of the experts ({', '.join(names)})", experts_in_use)
        check_int("num_routing_tokens", num_routing_tokens, 1)
        side, answer_side = round(num_routing_tokens**0.5), self.adapter_config.resolution // 2
        fits = side * side == num_routing_tokens and answer_side % side == 0
        rule = f"must be a square whose root divides the answer's {answer_side} x {answer_side} tokens"
        check(fits, "num_routing_tokens", rule, num_routing_tokens)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As in transformers; if the file is JSON but no object, the error names it.

        Raises:
            OSError: there is no config.json, or it is not JSON.
            ValueError: it holds another kind of JSON.
        """
        path = pretrained_model_name_or_path
        try:
            fields, rest = super().get_config_dict(path, **kwargs)
        except (TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"config.json of {path} must hold a JSON object") from error
        check(isinstance(fields, dict), f"config.json of {path}", "must hold a JSON object", type(fields).__name__)
        if not fields.keys() - {"_commit_hash"}:
            raise FileNotFoundError(f"no config.json with fields in {path}")
        return fields, rest

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers, but a saved config must have every field: the defaults belong to the released 8B model.

        Raises:
            TypeError, ValueError: a field is missing, or breaks its rule; the message names it.
        """
        check(isinstance(config_dict, Mapping), "config_dict", "must be a mapping", config_dict, TypeError)
        kind = config_dict.get("model_type")
        check(kind == cls.model_type, "model_type", f"must be {cls.model_type!r}", kind)
        for name in ("text_config", "text_encoder_config"):
            value = config_dict.get(name)
            given = isinstance(value, PretrainedConfig) or (isinstance(value, Mapping) and value.get("model_type"))
            check(given, name, "must be the config of a model, with its model_type", value)
        for name in ("base", "experts"):
            check(config_dict.get(name), name, "must be given in a saved config", config_dict.get(name))
        dtype = config_dict.get("dtype", config_dict.get("torch_dtype"))
        is_dtype = (
            dtype is None
            or isinstance(dtype, torch.dtype)
            or (isinstance(dtype, str) and isinstance(getattr(torch, dtype, None), torch.dtype))
        )
        check(is_dtype, "dtype", "must be the name of a dtype", dtype)
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; if a value has a wrong type or breaks its rule, the error names the file.

        Raises:
            OSError: there is no config.json, or it is not JSON.
            ValueError: it is not the config of a MoVA.
        """
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except OSError:
            raise
        except Exception as error:  # configs raise errors of any kind for values of a wrong type
            raise ValueError(f"config.json of {pretrained_model_name_or_path} cannot be used: {error}") from error

    @property
    def base_expert(self) -> VisionExpert:
        """The encoder that sees every image."""
        return VisionExpert(**self.base)

    @property
    def pool(self) -> tuple[VisionExpert, ...]:
        """The experts in the order of the adapter's columns."""
        return tuple(VisionExpert(**expert) for expert in self.experts)

    @property
    def adapter_config(self) -> MoVAdapterConfig:
        """The adapter's dimensions."""
        base = self.base_expert
        check(base.grid[0] == base.grid[1], "base", "must have a square grid", base.grid)
        return MoVAdapterConfig(
            in_channels=base.channels,
            out_channels=self.text_config.hidden_size,
            num_heads=self.adapter_heads,
            num_layers=self.adapter_layers,
            topk=self.topk,
            resolution=base.grid[0],
            text_channels=self.text_encoder_config.hidden_size,
            expert_channels=tuple(expert.channels for expert in self.pool),
        )

    @property
    def num_image_tokens(self) -> int:
        """How many tokens of an image the language model sees when it answers."""
        return self.adapter_config.num_output_tokens


_LLAMA_3_8B = {
    "vocab_size": 128257,  # 128256, and the placeholder of images
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "rms_norm_eps": 1e-5,
}
_BERT_LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
}


def _sub_config(given: PretrainedConfig | Mapping[str, Any] | None, kind: str, default: dict[str, Any]) -> Any:
    if isinstance(given, PretrainedConfig):
        return given
    values = dict(default if given is None else given)
    return AutoConfig.for_model(values.pop("model_type", kind), **values)


def _fields(expert: VisionExpert) -> dict[str, Any]:
    """Turn an expert into the fields that JSON can hold."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(expert).items()}


def _expert(given: Any) -> Any:
    """Make a VisionExpert of its fields; names and VisionExperts are returned as they are, for ``resolve``."""
    if not isinstance(given, Mapping):
        return given
    unknown = sorted(set(given) - _FIELDS)
    check(not unknown, "experts", f"must have the fields of a VisionExpert ({', '.join(sorted(_FIELDS))})", unknown)
    return VisionExpert(**given)
