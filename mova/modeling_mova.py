"""The model: a language model that sees images through the MoV-Adapter, whose experts it picks itself."""

# No "from __future__ import annotations": transformers reads the annotation of "config" at run time.
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_outputs import CausalLMOutputWithPast

from mova_kernels import MoVAdapter

from ._checks import check, check_weights
from ._lock import Lock, locked, locked_with_lora
from ._wrapped import compute_device, compute_dtype
from .chat import RoutingRequest, route_requested
from .checkpoint import check_files, read_json, weight_files
from .configuration_mova import MoVAConfig
from .encoders import VisionEncoder
from .generating import PromptGenerationMixin, cache_length, check_values
from .hub import UploadsFolders, elsewhere, folder, loading_arguments, pinned
from .pool import ExpertPool
from .ranks import runs_every_part, with_zero_times
from .routing_lora import LORA_KEYS, ROUTING_LORA, RoutingLoRA


class MoVAForConditionalGeneration(RoutingLoRA, UploadsFolders, PreTrainedModel, PromptGenerationMixin):
    """Language model, base encoder, text encoder, MoV-Adapter; and the experts, loaded when they are asked.

    Images come prepared (:class:`MoVAProcessor` does it), each with the experts that it selected; to let the model pick
    them, use :class:`MoVAPipeline`. The experts are frozen, and so is the text encoder unless the config frees it.

    Attributes:
        experts: the :class:`ExpertPool`: ``model.experts.place("sam", device="cpu")``, ``model.experts.only([...])``.
        lock: held by a thread that generates or routes; re-entrant.
    """

    config: MoVAConfig
    config_class = MoVAConfig
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["MoVAdapter", "VisionEncoder"]  # noqa: RUF012  # as in transformers; children add theirs
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _keys_to_ignore_on_load_unexpected = [LORA_KEYS]  # noqa: RUF012  # they are loaded from their own folder

    def __init__(self, config: MoVAConfig) -> None:
        super().__init__(config)
        base = config.base_expert
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.base = VisionEncoder(base, config.encoder_sizes.get(base.name))
        self.text_encoder = AutoModel.from_config(config.text_encoder_config, add_pooling_layer=False)
        self.adapter = MoVAdapter(config.adapter_config)
        self.experts = ExpertPool(config.pool, config.encoder_sizes, config.experts_in_use)
        self.lock = Lock()
        self.base.requires_grad_(True)
        self._freeze()
        self.post_init()

    def _freeze(self) -> None:
        for parameter in self.base.unused_parameters():  # trainable, they would wait for gradients that never come
            parameter.requires_grad_(False)
        if self.config.freeze_text_encoder:
            self.text_encoder.requires_grad_(False)

    def train(self, mode: bool = True) -> "MoVAForConditionalGeneration":
        """As always, but a frozen text encoder stays in eval mode: its dropout would make its features random."""
        super().train(mode)
        if self.config.freeze_text_encoder:
            self.text_encoder.eval()
        return self

    # What transformers asks of a model with a language model inside.

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: torch.nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value: torch.nn.Module) -> None:
        self.language_model.set_output_embeddings(value)

    # The stages, each usable by itself; B_e is the number of images that selected expert e, M that of images.

    def base_features(self, pixel_values: Tensor) -> Tensor:
        """(M, 3, S, S) prepared for the base encoder -> (M, L, C)."""
        return self.base(pixel_values.to(self.base_device, self.adapter_dtype)).to(**self._at_adapter())

    # Where the parts compute, and in what: under accelerate's offload the weights themselves are on no device.

    @property
    def device(self) -> torch.device:
        """Where the language model computes."""
        return compute_device(self.language_model)

    @property
    def base_device(self) -> torch.device:
        """Where the base encoder computes."""
        return compute_device(self.base)

    @property
    def adapter_device(self) -> torch.device:
        """Where the adapter computes."""
        return compute_device(self.adapter)

    @property
    def adapter_dtype(self) -> torch.dtype:
        """What the adapter computes in."""
        return compute_dtype(self.adapter)

    def _at_adapter(self) -> dict[str, Any]:
        return {"device": self.adapter_device, "dtype": self.adapter_dtype}

    def text_features(self, question_ids: Tensor, question_mask: Tensor) -> Tensor:
        """(M, T) tokens of the questions and their mask -> (M, text_channels), the hidden state at [CLS]."""
        device = compute_device(self.text_encoder)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.freeze_text_encoder):
            hidden = self.text_encoder(question_ids.to(device), attention_mask=question_mask.to(device))[0]
        return hidden[:, 0].to(**self._at_adapter())

    def fuse(self, base: Tensor, experts: Mapping[str, Tensor], routing: Tensor, text: Tensor | None) -> Tensor:
        """The image tokens for the language model.

        Args:
            base: (M, L, C) of :meth:`base_features`.
            experts: name to the (B_e, T_e, C_e) tokens of the images that selected it, in their order.
            routing: (M, N) bool, best on the host.
            text: (M, text_channels), may be None if nothing is selected.

        Returns:
            (M, num_image_tokens, hidden_size).

        Raises:
            TypeError, ValueError: those of :class:`mova_kernels.MoVAdapter`.
        """
        pool = self.config.pool
        features = [experts.get(expert.name) for expert in pool]
        return self.adapter(base, features, routing, text, grids=[expert.grid for expert in pool])

    def routing_tokens(self, base: Tensor) -> Tensor:
        """(M, L, C) -> (M, num_routing_tokens, hidden_size): what the router sees, without experts, pooled."""
        none = torch.zeros(base.shape[0], len(self.config.experts), dtype=torch.bool)
        tokens = self.fuse(base, {}, none, None)
        side = round(self.config.num_routing_tokens**0.5)
        answer_side = round(tokens.shape[1] ** 0.5)
        grid = tokens.transpose(1, 2).unflatten(2, (answer_side, answer_side))
        return F.avg_pool2d(grid, answer_side // side).flatten(2).transpose(1, 2)

    def get_image_features(
        self,
        pixel_values: Tensor,
        routing: Tensor | None = None,
        expert_pixel_values: Mapping[str, Tensor] | None = None,
        question_ids: Tensor | None = None,
        question_mask: Tensor | None = None,
    ) -> Tensor:
        """Encode and fuse: each expert runs once, on exactly the images that selected it.

        Where torch.distributed has several processes, the text encoder runs even if nothing is selected (see
        :mod:`mova.ranks`).

        Args:
            pixel_values: (M, 3, S, S).
            routing: (M, N) bool; None: no experts; or what the processor made of a chat: the router picks them first.
            expert_pixel_values: name to the prepared images that selected this expert, in their order; the names in
                the order of the model's experts, which tells a processor of another model.
            question_ids, question_mask: (M, T), for the text encoder; may be None if nothing is selected.

        Returns:
            (M, num_image_tokens, hidden_size).
        """
        if isinstance(routing, RoutingRequest | list):
            return self.get_image_features(pixel_values, **route_requested(self, routing))
        base = self.base_features(pixel_values)
        expert_pixel_values = expert_pixel_values or {}
        if routing is None:
            routing = torch.zeros(base.shape[0], len(self.config.experts), dtype=torch.bool)
            check(not expert_pixel_values, "routing", "must be given with expert_pixel_values", None)
        routing = routing.cpu()
        features = {}
        selected = [name for name, column in zip(self.experts.experts, routing.T, strict=True) if column.any()]
        prepared = [name for name, pixels in expert_pixel_values.items() if len(pixels)]
        rule = f"must have those that are selected, in the order of the model's experts ({', '.join(selected)})"
        check(prepared == selected, "expert_pixel_values", rule, prepared)
        for name in selected:
            features[name] = self.experts.encode(name, expert_pixel_values[name], base)
        text = None
        if routing.any():
            given = question_ids is not None and question_mask is not None
            check(given, "question_ids", "must be given, with question_mask, when an image selected an expert", None)
            text = self.text_features(question_ids, question_mask)  # type: ignore[arg-type]
        elif runs_every_part(self):
            token = torch.zeros(1, 1, dtype=torch.long)
            text = self.text_features(token, torch.ones_like(token))  # nothing of it gets into the result
        return self.fuse(base, features, routing, text)

    def embed(
        self, input_ids: Tensor | None, image_features: Tensor | None, inputs_embeds: Tensor | None = None
    ) -> Tensor:
        """(B, T) tokens -> (B, T, hidden_size), image features in the place of placeholders, in their order.

        Args:
            input_ids: the tokens; or None, then ``inputs_embeds`` (B, T, hidden_size) are their embeddings.
            image_features: (M, num_image_tokens, hidden_size); None: no images.

        Raises:
            ValueError: there are more or fewer placeholders than image tokens, or these are not as wide as embeddings.
        """
        embeddings = self.get_input_embeddings()
        if input_ids is not None:
            embedded, where = embeddings(input_ids), input_ids == self.config.image_token_id
        elif image_features is None:
            return cast(Tensor, inputs_embeds)
        else:
            embedded = cast(Tensor, inputs_embeds)
            placeholder = embeddings(torch.full((1,), self.config.image_token_id, device=embedded.device))
            where = (embedded == placeholder.to(embedded)).all(-1)
        self._check_places(where, image_features, embedded.shape[-1])
        if image_features is None:
            return embedded
        return embedded.masked_scatter(where[..., None].to(embedded.device), image_features.to(embedded))

    def _check_places(self, where: Tensor, image_features: Tensor | None, width: int) -> None:
        given = 0
        if image_features is not None:
            shape = tuple(image_features.shape)
            check(len(shape) == 3 and shape[2] == width, "image_features", f"must be of shape (M, T, {width})", shape)
            given = shape[0] * shape[1]
        rule = f"must have one placeholder for each of {given} image tokens"
        if torch.compiler.is_compiling():
            torch._assert_async(where.sum() == given, f"input_ids {rule}")
        else:
            found = int(where.sum())
            check(found == given, "input_ids", rule, found)

    def _image_features(self, image_features: Tensor | None, images: Mapping[str, Any]) -> Tensor | None:
        """Those that are given, or of the images that are; an argument that would be ignored is an error."""
        if images["pixel_values"] is not None:
            check(image_features is None, "image_features", "must be None, or pixel_values must", "both")
            return self.get_image_features(**images)
        check(not images["expert_pixel_values"], "pixel_values", "must be given with expert_pixel_values", None)
        return image_features

    @locked_with_lora
    def forward(
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
        """One step of the language model; all arguments that are not of images are those of transformers.

        With a cache of keys and values, the images are those whose placeholders are in this step's ``input_ids``. Where
        torch.distributed has several processes, a batch of text alone runs the parts for images as well, on a blank one
        (see :mod:`mova.ranks`).

        Args:
            pixel_values, routing, expert_pixel_values, question_ids, question_mask: see :meth:`get_image_features`.
            image_features: (M, num_image_tokens, hidden_size) instead of them.
            labels: (B, T), -100 where there is no loss; images and prompts usually.
            prompt_embeds: of :meth:`generate`'s steps, (B, n, hidden_size): what the first n tokens are embedded as;
                the others were generated, and a placeholder among them is a token like any other.

        Raises:
            ValueError: there are more or fewer placeholders than image tokens, whatever the cache.
        """
        check((input_ids is None) != (inputs_embeds is None), "input_ids", "or inputs_embeds must be given", input_ids)
        if prompt_embeds is not None:
            inputs_embeds = self._embed_step(cast(Tensor, input_ids), prompt_embeds)
        else:
            images = {
                "pixel_values": pixel_values,
                "routing": routing,
                "expert_pixel_values": expert_pixel_values,
                "question_ids": question_ids,
                "question_mask": question_mask,
            }
            image_features = self._image_features(image_features, images)
            unused = None  # computed before the embeddings, as images are: the order is the same for all processes
            if image_features is None and runs_every_part(self) and not cache_length(kwargs):
                unused = self.get_image_features(self.base.blank())
            inputs_embeds = self.embed(input_ids, image_features, inputs_embeds)
            if unused is not None:
                inputs_embeds = with_zero_times(inputs_embeds, unused)
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

        Images are encoded and fused once, whatever the number of beams. Arguments of images: see :meth:`forward`. With
        a cache of an earlier part of ``input_ids``, the images are those of all of them, or of the new part.

        Returns:
            As in transformers: (B, T + new) tokens, or its output object.

        Raises:
            ValueError: there are more or fewer placeholders than image tokens; a way of generating cannot have images.
        """
        images = {
            "pixel_values": pixel_values,
            "routing": routing,
            "expert_pixel_values": expert_pixel_values,
            "question_ids": question_ids,
            "question_mask": question_mask,
        }
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

    # Saving and loading: the experts have folders of their own beside the model.

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, Any] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """transformers' ``save_pretrained``, with the routing LoRA and the experts; so is ``push_to_hub``.

        The experts are left out if ``config.expert_path`` names where they lie (frozen, they need one copy).
        ``variant`` and ``max_shard_size`` hold for them, too.

        Raises:
            FileNotFoundError: an expert in use has no weights; nothing is uploaded then.
            ValueError: ``save_directory`` is a file.
        """
        directory = Path(save_directory)
        check(not directory.is_file(), "save_directory", "must not be a file", str(directory))
        state = self.state_dict() if state_dict is None else state_dict
        # Before the model's own files, which transformers may upload at once.
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
        experts = () if self.config.expert_path else self.experts.experts
        lora = [ROUTING_LORA] if self.config.routing_lora else []
        return [*(f"experts/{name}" for name in experts), *lora]

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        model = super()._from_config(config, **kwargs)
        if is_deepspeed_zero3_enabled():  # there, transformers keeps modules from initialising themselves
            model.adapter.reset_parameters()
        return model

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """transformers' ``from_pretrained``; missing and unexpected keys are errors, experts load when first asked.

        Whether the files of the experts in use are there and whole is checked now. All files come from the commit that
        a hub repository has now; ``revision``, ``token``, ``subfolder``, ``variant``, ``cache_dir``,
        ``local_files_only`` and ``force_download`` hold for the experts and the routing LoRA, too (those of
        ``expert_path`` lie in a repository of their own, without revision, subfolder and variant).

        Raises:
            OSError: a file is not there.
            ValueError: weights are missing or unknown to the model, or a file is damaged; the message names it.
        """
        path = pretrained_model_name_or_path
        wants_info = kwargs.pop("output_loading_info", False)
        arguments, variant = loading_arguments(kwargs), kwargs.get("variant")
        if path is not None:
            arguments = pinned(path, arguments)
            kwargs |= arguments
            _check_directory(Path(path) / arguments.get("subfolder", ""), variant)
        kwargs["ignore_mismatched_sizes"] = True  # they are errors below, with the missing ones
        # Tensors made in inference mode could neither be moved nor trained with outside of it.
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


def _check_directory(directory: Path, variant: str | None) -> None:
    """Raise where a file of a model's directory is damaged or cut off, and name it: transformers does not always."""
    if not (directory / "config.json").is_file():
        return  # on the hub, or no model: transformers says so
    read_json(directory / "config.json")
    if (directory / "generation_config.json").exists():
        _check_generation(directory / "generation_config.json")
    for index in directory.glob("*.index*.json"):
        check(isinstance(read_json(index).get("metadata"), dict), f"metadata in {index}", "must be an object", None)
    check_files(weight_files(directory, variant))


def _check_generation(file: Path) -> None:
    """Raise where a generation config has a value of another type: transformers reports some of them, without the file,
    when it generates."""
    fields = read_json(file)
    try:
        check_values(fields)
        GenerationConfig.from_dict(fields)
    except Exception as error:  # whatever a comparison makes of a value of another type
        raise ValueError(f"{file} cannot be used: {error}") from error
    for name, value in fields.items():
        if name.endswith("_token_id") and value is not None:
            numbers = value if isinstance(value, list) else [value]
            fits = all(isinstance(number, int) and not isinstance(number, bool) for number in numbers)
            check(fits, f"{name} in {file}", "must be an int or ints", value)
