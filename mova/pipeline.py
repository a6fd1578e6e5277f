"""From images and questions to answers: route, encode, fuse, answer; features are kept between questions."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._checks import check
from ._lock import Lock, locked
from .cache import FeatureCache
from .generating import generate_arguments
from .hub import loading_arguments, pinned
from .images import PreparedImage
from .inspection import attention_maps, recorded
from .modeling_mova import MoVAForConditionalGeneration
from .processing_mova import MoVAProcessor, per_image
from .router import Route, Router, check_processor
from .routing import Prompts, routing_mask


@dataclass(frozen=True)
class Fusion:
    """The fused image ``tokens`` (B, T, hidden_size) and the ``gates`` (B, num_layers, N).

    The gates are the weight of each expert in each block, in the order of the model's pool.
    """

    tokens: Tensor
    gates: Tensor


@dataclass(frozen=True)
class Answer:
    """The ``text``, its ``route``, and this sample's row of the :class:`Fusion`."""

    text: str
    route: Route
    gates: Tensor
    tokens: Tensor


class MoVAPipeline:
    """Two passes: the language model picks the experts of each image, only these run, then it answers.

    The result of a sample does not depend on the rest of its batch. Features are kept by the content of the image, the
    question and the expert: a second question about an image runs no encoder again.

    Threads may share a pipeline, and pipelines may share a model. Each stage of a request holds the model's lock, so
    one thread computes while others open their images.

    Args:
        model: put into eval mode. Call :meth:`clear` after its weights have changed.
        processor: the model's.
        cache_bytes: budget of the kept features, which stay on the device on which they were computed.

    Raises:
        ValueError: the processor is another model's.
    """

    def __init__(
        self, model: MoVAForConditionalGeneration, processor: MoVAProcessor, *, cache_bytes: int = 1 << 30
    ) -> None:
        check_processor(processor, model.config)
        self.model, self.processor = model.eval(), processor
        self.cache = FeatureCache(cache_bytes)

    @classmethod
    def from_pretrained(cls, path: str, *, cache_bytes: int = 1 << 30, **kwargs: Any) -> MoVAPipeline:
        """Load model and processor from a directory or hub repository; the model gets ``kwargs``, too."""
        hub = pinned(path, loading_arguments(kwargs))
        processor = MoVAProcessor.from_pretrained(path, **hub)
        model = MoVAForConditionalGeneration.from_pretrained(path, **kwargs | hub)
        return cls(model, processor, cache_bytes=cache_bytes)

    @property
    def _router(self) -> Router:
        return Router(self.model, self.processor)  # not kept: users replace the model

    @property
    def lock(self) -> Lock:
        """The lock of the model."""
        return self.model.lock

    def clear(self) -> None:
        """Drop all kept features."""
        self.cache.clear()

    @torch.no_grad()
    def route(self, images: Sequence[Any], questions: Sequence[Any], **wording: Any) -> list[Route]:
        """Ask the language model which experts fit each image and question.

        Args:
            images: B PIL images, paths or bytes.
            questions: B questions, each a string or the questions of a conversation so far.
            wording: of ``mova.prompts``: suffix, suffix_in, descriptions.
        """
        return self._route(*self._samples(images, questions, wording))

    @torch.no_grad()
    def fuse(self, images: Sequence[Any], questions: Sequence[Any], experts: Any) -> Fusion:
        """Fuse images with given experts into image tokens; ``experts`` is as in :meth:`answer`."""
        samples, asked = self._samples(images, questions, {})
        return self._fuse(samples, asked, self._routes(samples, asked, experts))

    @torch.no_grad()
    def attention_maps(
        self, image: Any, question: Any, point: tuple[int, int], *, experts: Any = None, block: int = -1
    ) -> dict[str, Tensor]:
        """Compute where a token of an image looks in each expert; ``mova.visualize.attention_figure`` draws it.

        Args:
            image, question, experts: one image and question, as in :meth:`answer`.
            point: (row, column) of the token on the base grid.
            block: of the adapter.

        Returns:
            expert to (R, R) fp32, the mean over the heads, which sums to 1.
        """
        samples, asked = self._samples([image], [question], {})
        base, features, routing, text = self._features(samples, asked, self._routes(samples, asked, experts))
        pool = self.model.config.pool
        (found,) = attention_maps(
            self.model.adapter,
            base,
            [features.get(expert.name) for expert in pool],
            routing,
            text,
            point,
            block=block,
            grids=[expert.grid for expert in pool],
        )
        return {pool[e].name: weights for e, weights in found.items()}

    @torch.no_grad()
    def answer(
        self,
        images: Sequence[Any],
        questions: Sequence[Any],
        *,
        experts: Any = None,
        suffix: str = "",
        suffix_in: Sequence[str] = ("answer",),
        max_new_tokens: int | None = None,
        **generate: Any,
    ) -> list[Answer]:
        """Answer one question about each image.

        Args:
            images: B PIL images, paths or bytes.
            questions: B questions.
            experts: None: the router picks. "all", "none" or a list of names: these experts for all images. A list of B
                such entries, None included: one entry for each image.
            suffix, suffix_in: see ``mova.prompts``.
            max_new_tokens: longest length of an answer. None: ``max_length`` if it is given, else the limit of the
                model's generation config, else 128.
            generate: further arguments of transformers' ``generate`` (``num_beams``, ``do_sample``, ``streamer``, ...).
                The ``num_return_sequences`` of the generation config is ignored: each image has one answer.

        Raises:
            TypeError, ValueError: an argument breaks its rule; an image cannot be read.
        """
        generate = generate_arguments({"max_new_tokens": max_new_tokens, **generate})
        samples, asked = self._samples(images, questions, {"suffix": suffix, "suffix_in": suffix_in})
        routes = self._routes(samples, asked, experts)
        fusion = self._fuse(samples, asked, routes)
        texts = self._router.generate([p.answer for p in asked], fusion.tokens, **generate)
        return [Answer(*row) for row in zip(texts, routes, fusion.gates, fusion.tokens, strict=True)]

    def _samples(
        self, images: Sequence[Any], questions: Sequence[Any], wording: Mapping[str, Any]
    ) -> tuple[list[PreparedImage], list[Prompts]]:
        for name, value in (("images", images), ("questions", questions)):
            check(isinstance(value, list | tuple), name, "must be a list", value, TypeError)
        check(images, "images", "must not be empty", images)
        check(len(images) == len(questions), "questions", f"must be {len(images)}, one for each image", len(questions))
        asked = self._router.prompts(questions, **wording)
        opened = [image if isinstance(image, PreparedImage) else PreparedImage(image) for image in images]
        return opened, asked

    def _routes(self, samples: Sequence[PreparedImage], asked: Sequence[Prompts], experts: Any) -> list[Route]:
        """Return the route of each sample: the entry in ``experts``, or the router's choice if the entry is None."""
        pool = [expert.name for expert in self.processor.pool]
        entries = [None] * len(samples) if experts is None else per_image(experts, len(samples), pool)
        open_ = [i for i, entry in enumerate(entries) if entry is None]
        routed = iter(self._route([samples[i] for i in open_], [asked[i] for i in open_]) if open_ else ())
        mask = routing_mask(["none" if entry is None else entry for entry in entries], pool).tolist()
        by_hand = [Route(tuple(name for name, on in zip(pool, row, strict=True) if on)) for row in mask]
        return [next(routed) if entry is None else route for entry, route in zip(entries, by_hand, strict=True)]

    @locked
    def _route(self, samples: Sequence[PreparedImage], asked: Sequence[Prompts]) -> list[Route]:
        base = self._base(samples)
        tokens = self._rows(
            [("router", None, sample.key) for sample in samples],
            lambda rows: self.model.routing_tokens(base[rows]),
        )
        return self._router.ask(asked, tokens)

    @locked
    def _fuse(self, samples: Sequence[PreparedImage], asked: Sequence[Prompts], routes: Sequence[Route]) -> Fusion:
        with recorded(self.model.adapter) as record:
            tokens = self.model.fuse(*self._features(samples, asked, routes))
        return Fusion(tokens, record.gates)

    @locked
    def _features(
        self, samples: Sequence[PreparedImage], asked: Sequence[Prompts], routes: Sequence[Route]
    ) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor | None]:
        """Return the arguments of the model's ``fuse``; an expert encodes exactly the images that use it."""
        base, pool = self._base(samples), self.model.config.pool
        routing = routing_mask([route.experts for route in routes], pool)
        features = {}
        for expert, column in zip(pool, routing.T, strict=True):
            chosen = [samples[i] for i in column.nonzero().flatten().tolist()]
            if chosen:

                def encode(rows: list[int], expert=expert, chosen=chosen) -> Tensor:
                    pixels = torch.stack([chosen[i].view(expert) for i in rows])
                    return self.model.experts.encode(expert.name, pixels, base)

                where = self.model.experts.placement(expert.name)
                features[expert.name] = self._rows([("expert", expert, where, s.key) for s in chosen], encode)
        return base, features, routing, self._text(asked, routing.any(1).tolist(), base)

    def _base(self, samples: Sequence[PreparedImage]) -> Tensor:
        expert = self.model.config.base_expert

        def encode(rows: list[int]) -> Tensor:
            return self.model.base_features(torch.stack([samples[i].view(expert) for i in rows]))

        return self._rows([("base", expert, sample.key) for sample in samples], encode)

    def _text(self, asked: Sequence[Prompts], needed: Sequence[bool], base: Tensor) -> Tensor | None:
        """Return (B, text_channels) features of the questions; samples without experts have zeros."""
        texts = [p.text for p, is_needed in zip(asked, needed, strict=True) if is_needed]
        if not texts:
            return None

        def encode(rows: list[int]) -> Tensor:
            # One by one, since padding changes the rounding: a result must not depend on the rest of the batch.
            encoded = [self.processor.tokenize_questions([texts[i]]) for i in rows]
            return torch.cat([self.model.text_features(**one) for one in encoded])

        found = self._rows([("text", None, text) for text in texts], encode)
        text = base.new_zeros(len(asked), found.shape[1])
        text[[i for i, is_needed in enumerate(needed) if is_needed]] = found
        return text

    def _rows(self, keys: Sequence[Hashable], compute: Callable[[list[int]], Tensor]) -> Tensor:
        """Return one row for each key. Missing rows are computed in one call, with the first index of each missing key.

        A key begins with the kind of its row ("base", "expert", "router" or "text"), since an expert may have any name.
        """
        dtype, device = self.model.adapter_dtype, self.model.adapter_device
        full = [(key, dtype, device) for key in keys]
        found = {key: self.cache.get(key) for key in dict.fromkeys(full)}
        missing = [full.index(key) for key, row in found.items() if row is None]
        if missing:
            for i, row in zip(missing, compute(missing), strict=True):
                found[full[i]] = row
                self.cache.put(full[i], row)
        return torch.stack([found[key] for key in full])  # type: ignore[misc]
