"""The routing pass: the language model is asked in words which experts fit an image and its question.

This module stands below the model and the processor, which both use it. So it takes them as they are given: ``model``
is a MoVAForConditionalGeneration, ``processor`` is its MoVAProcessor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ._checks import check
from .configuration_mova import MoVAConfig
from .experts import VisionExpert
from .generating import check_positions, length_limits
from .images import PreparedImage
from .routing import TEMPLATE, Prompts, parse_routing, prompts

ROUTER_TOKENS = 16  # the length of the router's answer, as in the official code
ANSWER_TOKENS = 128  # the length of an answer when nobody says how long it may be


@dataclass(frozen=True)
class Route:
    """The ``experts`` of a sample, best first; the router's ``answer``, and the ``letters`` that it was offered.

    Experts that were chosen by hand have no answer (None) and no letters.
    """

    experts: tuple[str, ...]
    answer: str | None = None
    letters: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RoutingRequest:
    """Stands in the place of ``routing`` among the model's arguments: the model is to pick the experts itself.

    Args:
        processor: the model's.
        images: M of them.
        questions: for each image the questions of its conversation so far.
    """

    processor: Any
    images: Sequence[PreparedImage]
    questions: Sequence[Sequence[str]]


class Router:
    """Asks the language model of a MoVA which experts to use, and lets it write texts about images."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor

    def prompts(self, questions: Sequence[Any], **wording: Any) -> list[Prompts]:
        """Word each question for this model; the router is offered only the experts that may be used.

        Args:
            questions: each a string, or the questions of a conversation so far.
            wording: of ``mova.prompts``: suffix, suffix_in, descriptions.
        """
        pool = [self.model.experts.specs[name] for name in self.model.experts.allowed]
        template = self.processor.routing_template or TEMPLATE
        return [prompts(q, pool, topk=self.processor.topk, template=template, **wording) for q in questions]

    def ask(self, asked: Sequence[Prompts], tokens: Tensor) -> list[Route]:
        """Ask for the experts of M images.

        Args:
            asked: M questions, worded by :meth:`prompts`.
            tokens: (M, num_routing_tokens, hidden_size), the model's ``routing_tokens``.
        """
        with self.model.routing_pass():
            texts = [p.router.text for p in asked]
            answers = self.generate(
                texts, tokens, max_new_tokens=ROUTER_TOKENS, min_new_tokens=0, do_sample=False, stop_strings=None
            )
        topk = self.processor.topk
        return [
            Route(parse_routing(answer, p.router.pool, topk=topk), answer, p.router.letters)
            for answer, p in zip(answers, asked, strict=True)
        ]

    def generate(self, texts: Sequence[str], image_tokens: Tensor, **generate: Any) -> list[str]:
        """Let the language model continue M conversations of one turn, each with its image.

        Args:
            texts: M turns of the user.
            image_tokens: (M, T, hidden_size).
            generate: arguments of transformers' ``generate``.
        """
        conversations = [self.processor.conversation(text) for text in texts]
        tokens = self.processor.tokenize(conversations, image_tokens.shape[1])
        if self.model.generation_config.pad_token_id is None:
            generate.setdefault("pad_token_id", self.processor.tokenizer.pad_token_id)
        generate.setdefault("tokenizer", self.processor.tokenizer)  # transformers needs it for stop_strings
        tokens = {name: value.to(self.model.device) for name, value in tokens.items()}
        length = tokens["input_ids"].shape[1]
        check_positions(self.model.config.text_config, length)
        generate |= length_limits(generate, self.model.generation_config, length, ANSWER_TOKENS)
        result = self.model.generate(**tokens, image_features=image_tokens, num_return_sequences=1, **generate)
        new = getattr(result, "sequences", result)[:, length:]
        return [text.strip() for text in self.processor.tokenizer.batch_decode(new, skip_special_tokens=True)]

    @torch.no_grad()
    def route(self, images: Sequence[PreparedImage], questions: Sequence[Sequence[str]]) -> list[Route]:
        """Encode M images for the router, each different one once, and ask for the experts of each."""
        asked = self.prompts(questions)
        different = {image.key: image for image in images}
        rows = [list(different).index(image.key) for image in images]
        expert = self.model.config.base_expert
        with self.model.lock:
            base = self.model.base_features(torch.stack([image.view(expert) for image in different.values()]))
            return self.ask(asked, self.model.routing_tokens(base)[rows])


def route_requested(model: Any, request: RoutingRequest | list[Any]) -> dict[str, Any]:
    """Ask the router, and prepare the inputs of the experts that it picks.

    Args:
        model: in eval mode.
        request: one request, or a list of those of a batch.

    Returns:
        routing, expert_pixel_values, question_ids and question_mask of ``get_image_features``.

    Raises:
        TypeError: the list holds something else than requests.
        ValueError: the model is in training mode, in which dropout would change the choice.
    """
    requests = request if isinstance(request, list) else [request]
    for each in requests:
        is_one = isinstance(each, RoutingRequest)
        rule = "must be a bool tensor, or the request that the processor makes of a chat"
        check(is_one, "routing", rule, type(each), TypeError)
    check(not model.training, "model", "must be in eval mode to pick experts (model.eval(), or give experts)", "train")
    processor = requests[0].processor
    images = [image for each in requests for image in each.images]
    questions = [list(asked) for each in requests for asked in each.questions]
    check_processor(processor, model.config)
    routes = Router(model, processor).route(images, questions)
    return processor.routed(images, [route.experts for route in routes], gate_texts(processor, questions))


def gate_texts(processor: Any, questions: Sequence[Sequence[str]]) -> list[str]:
    """Return the text that the adapter's gates read of each conversation's questions."""
    return [prompts(list(asked), processor.pool, topk=processor.topk).text for asked in questions]


def check_processor(processor: Any, config: MoVAConfig) -> None:
    """Raise if the processor belongs to another model."""
    words, vocabulary = len(processor.question_tokenizer), config.text_encoder_config.vocab_size
    fits = words <= vocabulary
    check(fits, "processor", f"must have a question_tokenizer of the text encoder's {vocabulary} words", words)
    token, places = config.image_token_id, config.num_image_tokens
    found = processor.image_token_id
    check(found == token, "processor", f"must number the image token as the model does ({token})", found)
    found = processor.num_image_tokens
    check(found == places, "processor", f"must make as many image tokens as the model ({places})", found)
    own = (VisionExpert(**processor.base), *processor.pool)
    known = (config.base_expert, *config.pool)
    names = [expert.name for expert in known]
    found = [expert.name for expert in own]
    check(found == names, "processor", f"must have the model's experts in their order ({', '.join(names)})", found)
    for one, other in zip(own, known, strict=True):
        same = replace(one, description=other.description, checkpoint=other.checkpoint) == other
        check(same, "processor", f"must have the model's {other.name} ({other})", one)
