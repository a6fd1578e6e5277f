"""The model: a language model that sees images through the MoV-Adapter and picks the vision experts itself."""

# No "from __future__ import annotations": transformers reads the annotation of "config" at run time.
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from mova_kernels import MoVAdapter

from ._checks import check, check_weights
from ._lock import Lock, locked, locked_with_lora
from .checkpoint import check_model_directory
from .configuration_mova import MoVAConfig
from .encoders import VisionEncoder
from .generating import PromptGenerationMixin, cache_length, check_values
from .hub import UploadsFolders, elsewhere, folder, loading_arguments, pinned
from .image_features import ImageFeatures
from .pool import ExpertPool
from .router import route_requested
from .routing_lora import LORA_KEYS, ROUTING_LORA, RoutingLoRA


class MoVAPreTrainedModel(RoutingLoRA, UploadsFolders, PreTrainedModel):
    """Saves and loads a model together with its experts and its routing LoRA, each of which has its own folder."""

    config: MoVAConfig
    config_class = MoVAConfig
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["MoVAdapter", "VisionEncoder"]  # noqa: RUF012  # transformers adds those of the submodules
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _keys_to_ignore_on_load_unexpected = [LORA_KEYS]  # noqa: RUF012  # loaded from a folder of their own

    def _freeze(self) -> None:
        for parameter in self.base.unused_parameters():  # DDP would wait for their gradients, which never come
            parameter.requires_grad_(False)
        if self.config.freeze_text_encoder:
            self.text_encoder.requires_grad_(False)

    def train(self, mode: bool = True) -> "MoVAPreTrainedModel":
        """As in PyTorch, but a frozen text encoder stays in eval mode, so that no dropout changes its features."""
        super().train(mode)
        if self.config.freeze_text_encoder:
            self.text_encoder.eval()
        return self

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, Any] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """As in transformers, and also write the routing LoRA and the experts; so does ``push_to_hub``.

        If ``config.expert_path`` names another place of the experts, they are left out: they are frozen, so one copy is
        enough. ``variant`` and ``max_shard_size`` apply to the experts, too.

        Raises:
            FileNotFoundError: an expert in use has no weights; then nothing is uploaded.
            ValueError: ``save_directory`` is a file.
        """
        directory = Path(save_directory)
        check(not directory.is_file(), "save_directory", "must not be a file", str(directory))
        state = self.state_dict() if state_dict is None else state_dict
        # The folders come first, since transformers may upload right after it has written the model's own files.
        if self.config.routing_lora and is_main_process:
            self._save_routing_lora(directory / ROUTING_LORA, state)
        if self.config.expert_path is None and is_main_process:
            self.experts.save(directory, variant=kwargs.get("variant"), max_shard_size=kwargs.get("max_shard_size"))
        super().save_pretrained(
            directory,
            is_main_process=is_main_process,
            state_dict=self._saved_state(state),
            push_to_hub=push_to_hub,
            **kwargs,
        )

    def _folders(self) -> list[str]:
        experts = () if self.config.expert_path else self.experts.specs
        lora = [ROUTING_LORA] if self.config.routing_lora else []
        return [*(f"experts/{name}" for name in experts), *lora]

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        model = super()._from_config(config, **kwargs)
        if is_deepspeed_zero3_enabled():  # transformers has suppressed the initialisation of modules
            model.adapter.reset_parameters()
        return model

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, but missing and unexpected keys are errors. Experts load when they are first used.

        The files of the experts in use are checked now: they must exist and be complete. All files come from the
        present commit of a hub repository. ``revision``, ``token``, ``subfolder``, ``variant``, ``cache_dir``,
        ``local_files_only`` and ``force_download`` apply to the experts and the routing LoRA, too. Experts of
        ``expert_path`` are in another repository, for which revision, subfolder and variant do not count.

        Raises:
            OSError: a file does not exist.
            ValueError: weights are missing or unknown to the model, or a file is damaged; the message names them.
        """
        path = pretrained_model_name_or_path
        wants_info = kwargs.pop("output_loading_info", False)
        arguments, variant = loading_arguments(kwargs), kwargs.get("variant")
        if path is not None:
            arguments = pinned(path, arguments)
            kwargs |= arguments
            check_model_directory(Path(path) / arguments.get("subfolder", ""), variant)
        kwargs["ignore_mismatched_sizes"] = True  # mismatched sizes become an error below
        # Tensors that are made in inference mode can be neither moved nor trained with outside of it.
        with torch.inference_mode(False):
            model, info = super().from_pretrained(path, *args, output_loading_info=True, **kwargs)
            wrong = [str(key) for key in info["mismatched_keys"]]
            check_weights(f"the model {path}", info["missing_keys"], info["unexpected_keys"], wrong)
            model._freeze()
            own = model.config.expert_path is None
            source = path if own else model.config.expert_path
            model.experts.source = None if source is None else str(source)
            model.experts.hub_arguments = arguments if own else elsewhere(arguments)
            model.experts.variant = variant if own else None
            model.experts.check_files()
            if model.config.routing_lora:
                model.load_routing_lora(folder(str(path), ROUTING_LORA, arguments))
        return (model, info) if wants_info else model


class LanguageModelWithoutHead(PreTrainedModel):
    """A language model without its head. Its weights have the same names as in the model with the head."""

    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        model = AutoModel.from_config(config)
        self.base_model_prefix = model.base_model_prefix
        setattr(self, self.base_model_prefix, model)
        # The files of a saved model also have the head.
        self._keys_to_ignore_on_load_unexpected = [rf"^language_model\.(?!{self.base_model_prefix}\.)"]
        self.post_init()

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.base_model.get_input_embeddings()

    def set_input_embeddings(self, value: torch.nn.Module) -> None:
        self.base_model.set_input_embeddings(value)

    def forward(self, **kwargs: Any) -> BaseModelOutputWithPast:
        """As the language model's own forward, which returns hidden states."""
        return self.base_model(**kwargs)


class MoVAModel(ImageFeatures, MoVAPreTrainedModel):
    """The language model with images and without its head: its output is ``last_hidden_state``.

    It cannot generate, so it cannot pick the experts of an image: give them to the processor.

    Attributes:
        experts: the :class:`ExpertPool`: ``model.experts.place("sam", device="cpu")``, ``model.experts.only([...])``.
    """

    def __init__(self, config: MoVAConfig) -> None:
        super().__init__(config)
        base = config.base_expert
        self.language_model = self._new_language_model(config.text_config)
        self.base = VisionEncoder(base, config.encoder_sizes.get(base.name))
        self.text_encoder = AutoModel.from_config(config.text_encoder_config, add_pooling_layer=False)
        self.adapter = MoVAdapter(config.adapter_config)
        self.experts = ExpertPool(config.pool, config.encoder_sizes, config.experts_in_use)
        self.lock = Lock()
        self.base.requires_grad_(True)
        self._freeze()
        self.post_init()

    @staticmethod
    def _new_language_model(config: PretrainedConfig) -> torch.nn.Module:
        return LanguageModelWithoutHead(config)

    def set_input_embeddings(self, value: torch.nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    @locked_with_lora
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        pixel_values: Tensor | None = None,
        routing: Tensor | None = None,
        expert_pixel_values: Mapping[str, Tensor] | None = None,
        question_ids: Tensor | None = None,
        question_mask: Tensor | None = None,
        image_features: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """One step of the language model; its arguments are those of :class:`MoVAForConditionalGeneration`.

        Returns:
            As in transformers: ``last_hidden_state`` (B, T, hidden_size), ``past_key_values``, and so on.
        """
        images = _images(pixel_values, routing, expert_pixel_values, question_ids, question_mask)
        return self.language_model(
            inputs_embeds=self._embed_prompt(input_ids, inputs_embeds, image_features, images, cache_length(kwargs)),
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            **kwargs,
        )


class MoVAForConditionalGeneration(MoVAModel, PromptGenerationMixin):
    """Language model, base encoder, text encoder, MoV-Adapter, and the experts, which load when they are first used.

    Its arguments are what :class:`MoVAProcessor` makes of texts, images and the experts of each image. To let the model
    pick the experts, use :class:`MoVAPipeline` or the processor's ``apply_chat_template``. The experts are frozen; so
    is the text encoder, unless ``config.freeze_text_encoder`` is False.

    Attributes:
        experts: the :class:`ExpertPool`: ``model.experts.place("sam", device="cpu")``, ``model.experts.only([...])``.
        lock: a re-entrant lock that a thread holds while it generates or routes.
    """

    @staticmethod
    def _new_language_model(config: PretrainedConfig) -> torch.nn.Module:
        return AutoModelForCausalLM.from_config(config)

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value: torch.nn.Module) -> None:
        self.language_model.set_output_embeddings(value)

    def _requested(self, request: Any) -> dict[str, Any]:
        return route_requested(self, request)

    @locked_with_lora
    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        pixel_values: Tensor | None = None,
        routing: Tensor | None = None,
        expert_pixel_values: Mapping[str, Tensor] | None = None,
        question_ids: Tensor | None = None,
        question_mask: Tensor | None = None,
        image_features: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """One step of the language model; arguments that are not about images are those of transformers.

        With a cache of keys and values, give the images whose placeholders are in this step's ``input_ids``. If
        torch.distributed has several processes, a batch of text alone encodes a blank image (see :mod:`mova.ranks`).

        Args:
            pixel_values, routing, expert_pixel_values, question_ids, question_mask: see :meth:`get_image_features`.
            image_features: (M, num_image_tokens, hidden_size), instead of the images.
            labels: (B, T), -100 at tokens without a loss, usually images and prompts.
            prompt_embeds: (B, n, hidden_size), the embeddings of the first n tokens in a step of :meth:`generate`. The
                other tokens were generated, and a placeholder among them is a token like any other.

        Raises:
            ValueError: there are more or fewer placeholders than image tokens, with or without a cache.
        """
        if prompt_embeds is not None:
            inputs_embeds = self._embed_step(cast(Tensor, input_ids), prompt_embeds)
        else:
            images = _images(pixel_values, routing, expert_pixel_values, question_ids, question_mask)
            inputs_embeds = self._embed_prompt(input_ids, inputs_embeds, image_features, images, cache_length(kwargs))
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    @locked
    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        routing: Tensor | None = None,
        expert_pixel_values: Mapping[str, Tensor] | None = None,
        question_ids: Tensor | None = None,
        question_mask: Tensor | None = None,
        image_features: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Continue ``input_ids`` (left-padded); ``kwargs`` are those of transformers' ``generate``.

        Images are encoded and fused once, whatever the number of beams. For the arguments of images see
        :meth:`forward`. With a cache of an earlier part of ``input_ids``, give the images of the whole prompt or of its
        new part.

        Returns:
            As in transformers: (B, T + new) tokens, or its output object.

        Raises:
            ValueError: there are more or fewer placeholders than image tokens, or the chosen way of generating does not
                work with images.
        """
        images = _images(pixel_values, routing, expert_pixel_values, question_ids, question_mask)
        is_mask = attention_mask is None or isinstance(attention_mask, Tensor)
        check(is_mask, "attention_mask", "must be a tensor", type(attention_mask).__name__, TypeError)
        check_values(kwargs)
        if input_ids is None:
            input_ids = kwargs.pop("inputs", None)
        ends = self._ends(input_ids, attention_mask, kwargs)
        check(ends, "attention_mask", "must be 1 in its last column: pad on the left", "padding on the right")
        image_features = self._image_features(image_features, images)
        if "prompt_embeds" not in kwargs:
            kwargs |= self._prompt(input_ids, attention_mask, image_features, kwargs)
        return super().generate(input_ids=input_ids, attention_mask=attention_mask, **kwargs)


def _images(
    pixel_values: Tensor | None,
    routing: Tensor | None,
    expert_pixel_values: Mapping[str, Tensor] | None,
    question_ids: Tensor | None,
    question_mask: Tensor | None,
) -> dict[str, Any]:
    """Collect the arguments of ``get_image_features`` by name."""
    return {
        "pixel_values": pixel_values,
        "routing": routing,
        "expert_pixel_values": expert_pixel_values,
        "question_ids": question_ids,
        "question_mask": question_mask,
    }
