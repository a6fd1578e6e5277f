"""The stages from images to the embeddings of a prompt; the model classes share them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import check
from ._wrapped import compute_device, compute_dtype
from .ranks import runs_every_part, with_zero_times


class ImageFeatures:
    """Encodes images, fuses them with their experts, and puts the result in the place of the prompt's placeholders.

    Each stage can be used by itself. B_e is the number of images that selected expert e, M the number of images.
    """

    config: Any
    language_model: Any
    base: Any
    text_encoder: Any
    adapter: Any
    experts: Any

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.language_model.get_input_embeddings()

    # Under accelerate's offload the weights are on no device, so these properties say where the parts compute.

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
        """The dtype in which the adapter computes."""
        return compute_dtype(self.adapter)

    def base_features(self, pixel_values: Tensor) -> Tensor:
        """Encode images (M, 3, S, S) that are prepared for the base encoder into (M, L, C)."""
        return self.base(pixel_values.to(self.base_device, self.adapter_dtype)).to(**self._at_adapter())

    def _at_adapter(self) -> dict[str, Any]:
        return {"device": self.adapter_device, "dtype": self.adapter_dtype}

    def text_features(self, question_ids: Tensor, question_mask: Tensor) -> Tensor:
        """Encode (M, T) tokens of questions and their mask into (M, text_channels), the hidden state at [CLS]."""
        device = compute_device(self.text_encoder)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.freeze_text_encoder):
            hidden = self.text_encoder(question_ids.to(device), attention_mask=question_mask.to(device))[0]
        return hidden[:, 0].to(**self._at_adapter())

    def fuse(self, base: Tensor, experts: Mapping[str, Tensor], routing: Tensor, text: Tensor | None) -> Tensor:
        """Fuse the features of base encoder and experts into the image tokens for the language model.

        Args:
            base: (M, L, C) of :meth:`base_features`.
            experts: name to the (B_e, T_e, C_e) tokens of the images that selected it, in their order.
            routing: (M, N) bool; a tensor on the CPU saves a synchronisation.
            text: (M, text_channels); may be None if no image selected an expert.

        Returns:
            (M, num_image_tokens, hidden_size).

        Raises:
            TypeError, ValueError: those of :class:`mova_kernels.MoVAdapter`.
        """
        pool = self.config.pool
        features = [experts.get(expert.name) for expert in pool]
        return self.adapter(base, features, routing, text, grids=[expert.grid for expert in pool])

    def routing_tokens(self, base: Tensor) -> Tensor:
        """Make the router's image tokens (M, num_routing_tokens, hidden_size) from base features (M, L, C).

        They are fused without experts, and pooled.
        """
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
            routing: (M, N) bool; None: no experts. MoVAForConditionalGeneration also takes the request that the
                processor makes of a chat, and picks the experts first.
            expert_pixel_values: name to the prepared images that selected this expert, in their order. The names must
                be in the order of the model's experts: otherwise the processor belongs to another model.
            question_ids, question_mask: (M, T), for the text encoder; may be None if no image selected an expert.

        Returns:
            (M, num_image_tokens, hidden_size).
        """
        if not (routing is None or isinstance(routing, Tensor)):
            return self.get_image_features(pixel_values, **self._requested(routing))
        base = self.base_features(pixel_values)
        expert_pixel_values = expert_pixel_values or {}
        if routing is None:
            routing = torch.zeros(base.shape[0], len(self.config.experts), dtype=torch.bool)
            check(not expert_pixel_values, "routing", "must be given with expert_pixel_values", None)
        routing = routing.cpu()
        features = {}
        selected = [name for name, column in zip(self.experts.specs, routing.T, strict=True) if column.any()]
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
        elif runs_every_part(cast(torch.nn.Module, self)):
            token = torch.zeros(1, 1, dtype=torch.long)
            text = self.text_features(token, torch.ones_like(token))  # the adapter reads nothing of it
        return self.fuse(base, features, routing, text)

    def _requested(self, request: Any) -> dict[str, Any]:
        """Return the other arguments of :meth:`get_image_features` for a request in the place of ``routing``."""
        rule = "must be a bool tensor (only MoVAForConditionalGeneration picks the experts itself)"
        raise TypeError(f"routing {rule}, got {type(request)!r}")

    def embed(
        self, input_ids: Tensor | None, image_features: Tensor | None, inputs_embeds: Tensor | None = None
    ) -> Tensor:
        """Embed (B, T) tokens as (B, T, hidden_size); image features replace the placeholders in their order.

        Args:
            input_ids: the tokens; None: ``inputs_embeds`` (B, T, hidden_size) are their embeddings.
            image_features: (M, num_image_tokens, hidden_size); None: no images.

        Raises:
            ValueError: there are more or fewer placeholders than image tokens, or image features have another width
                than embeddings.
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
        """Return the given features, or compute the features of the given images.

        It is an error to give an argument that would be ignored.

        Args:
            images: pixel_values and the other arguments of :meth:`get_image_features`, each of which may be None.
        """
        if images["pixel_values"] is not None:
            check(image_features is None, "image_features", "must be None, or pixel_values must", "both")
            return self.get_image_features(**images)
        check(not images["expert_pixel_values"], "pixel_values", "must be given with expert_pixel_values", None)
        return image_features

    def _embed_prompt(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        image_features: Tensor | None,
        images: Mapping[str, Any],
        cached: int,
    ) -> Tensor:
        """Embed one step of the language model; ``cached`` tokens were embedded in earlier steps."""
        check((input_ids is None) != (inputs_embeds is None), "input_ids", "or inputs_embeds must be given", input_ids)
        image_features = self._image_features(image_features, images)
        unused = None  # computed before the embeddings, as images are: the order is the same for all processes
        if image_features is None and runs_every_part(cast(torch.nn.Module, self)) and not cached:
            unused = self.get_image_features(self.base.blank())
        embedded = self.embed(input_ids, image_features, inputs_embeds)
        return embedded if unused is None else with_zero_times(embedded, unused)
