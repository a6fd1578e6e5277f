"""Turns images and questions into the model's arguments: pixels for each encoder, tokens with places for images."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import BatchFeature, GenerationConfig
from transformers.processing_utils import ProcessorMixin

from ._checks import check, check_int
from ._lock import Lock
from .chat import IMAGE_TOKEN, chat_images, chat_questions, check_chats, message_text
from .checkpoint import read_json
from .configuration_mova import MoVAConfig
from .experts import VisionExpert
from .hub import UploadsFolders, loading_arguments, small_files
from .image_processing_mova import MoVAImageProcessor, flat_images
from .images import PreparedImage
from .router import RoutingRequest, gate_texts
from .routing import routing_mask

_QUESTIONS = "question_tokenizer"  # the folder of the text encoder's tokenizer
# Held during a tokenizer's call, which first sets padding and truncation of the tokenizer: threads must not mix.
_TOKENIZING = Lock()
# The arguments of the processor's call that apply_chat_template hands on.
_OF_THE_CALL = (
    "experts", "questions", "padding", "padding_side", "pad_to_multiple_of", "truncation", "max_length",
    "add_special_tokens",
)  # fmt: skip
# The template for a tokenizer without one.
CHAT_TEMPLATE = (
    "{{ bos_token or '' }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}\n\n"
    "{% elif message['role'] == 'user' %}USER: {{ message['content'] }}\n"
    "{% else %}ASSISTANT: {{ message['content'] }}{{ eos_token or '' }}\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


class MoVAProcessor(UploadsFolders, ProcessorMixin):
    """Prepares images and tokenises texts; saved and loaded with the model, known to ``AutoProcessor``.

    Args:
        tokenizer: the language model's, with :data:`IMAGE_TOKEN` as one token (:meth:`for_config` adds it).
        question_tokenizer: the text encoder's.
        base, experts: the VisionExperts as the model's config has them.
        num_image_tokens: number of language model tokens for an image.
        num_routing_tokens: number of tokens for an image in the routing pass.
        topk: the most experts that the router may name.
        system_prompt: comes before every conversation; None: the template's own.
        routing_template: the router's wording (``mova.routing_prompt``'s ``template``); None: this library's.
        question_words: the size that ``question_tokenizer`` must have, known to a saved processor; None: any.

    Raises:
        TypeError, ValueError: an argument breaks its rule.
    """

    def __init__(
        self,
        tokenizer: Any,
        question_tokenizer: Any,
        base: Mapping[str, Any],
        experts: Sequence[Mapping[str, Any]],
        num_image_tokens: int = 576,
        num_routing_tokens: int = 144,
        topk: int = 3,
        system_prompt: str | None = None,
        routing_template: str | None = None,
        chat_template: str | None = None,
        question_words: int | None = None,
    ) -> None:
        counts = {"num_image_tokens": num_image_tokens, "num_routing_tokens": num_routing_tokens, "topk": topk}
        for name, value in counts.items():
            check_int(name, value, 1)
        for name, wording in (("system_prompt", system_prompt), ("routing_template", routing_template)):
            is_text = wording is None or isinstance(wording, str)
            check(is_text, name, "must be a string or None", wording, TypeError)
        for expert in (base, *experts):
            VisionExpert(**expert)  # raises if a field is wrong
        self.base, self.experts = dict(base), [dict(expert) for expert in experts]
        self.num_image_tokens, self.num_routing_tokens, self.topk = num_image_tokens, num_routing_tokens, topk
        self.system_prompt, self.routing_template = system_prompt, routing_template
        self.image_token = IMAGE_TOKEN
        super().__init__(tokenizer, question_tokenizer, chat_template=chat_template)
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        is_one = self.image_token_id is not None and self.image_token_id != tokenizer.unk_token_id
        check(is_one, "tokenizer", f"must have {IMAGE_TOKEN} as a token", tokenizer.name_or_path)
        self.question_words = _check_words(question_tokenizer, question_words)
        tokenizer.padding_side = "left"  # a batch is continued at its right end
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        for name, value in (("tokenizer", tokenizer), ("question_tokenizer", question_tokenizer)):
            check(value.pad_token is not None, name, "must have a pad_token", None)

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        """As in transformers."""
        self.question_words = len(self.question_tokenizer)
        return super().save_pretrained(os.fspath(save_directory), push_to_hub, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """As in transformers, and with the image processor, which ``AutoImageProcessor`` looks for here."""
        return {**super().to_dict(), "image_processor": self.image_processor.to_dict()}

    def _folders(self) -> list[str]:
        return [_QUESTIONS, "additional_chat_templates"]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, but a damaged file or a tokenizer without its words is an error.

        Raises:
            OSError: a file does not exist.
            ValueError: a file is damaged, or a tokenizer is not the saved one; the message names the file or the
                tokenizer.
        """
        path = pretrained_model_name_or_path
        arguments = loading_arguments(kwargs)
        # transformers does not pass every argument to both tokenizers, and replaces a missing tokenizer by the other.
        directory = small_files(path, arguments)
        subfolder = arguments.pop("subfolder", "")
        _check_processor_files(directory / subfolder)
        options = {key: value for key, value in kwargs.items() if key not in arguments}
        try:
            processor = super().from_pretrained(directory, *args, **options)
            processor.conversation("?")  # raises if the chat template is damaged
            return processor
        except OSError:
            raise
        except TemplateError as error:
            raise ValueError(f"the chat template in {path} cannot be used: {error}") from error
        except Exception as error:  # tokenizers raise errors of any kind for damaged files
            raise ValueError(f"the processor in {path} cannot be loaded: {error}") from error

    @classmethod
    def for_config(cls, config: MoVAConfig, tokenizer: Any, question_tokenizer: Any, **kwargs: Any) -> MoVAProcessor:
        """Make the processor of a model; :data:`IMAGE_TOKEN` is added to the tokenizer if it is missing.

        Raises:
            ValueError: the token's number is not ``config.image_token_id``.
        """
        tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
        given = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        same = given == config.image_token_id
        check(same, "tokenizer", f"must number {IMAGE_TOKEN} as the model does ({config.image_token_id})", given)
        return cls(
            tokenizer,
            question_tokenizer,
            base=config.base,
            experts=config.experts,
            num_image_tokens=config.num_image_tokens,
            num_routing_tokens=config.num_routing_tokens,
            topk=config.topk,
            **kwargs,
        )

    @property
    def image_processor(self) -> MoVAImageProcessor:
        """The image processor of the base encoder; ``__call__`` prepares the images of the experts."""
        return MoVAImageProcessor(self.base)

    @property
    def pool(self) -> tuple[VisionExpert, ...]:
        """The experts in the order of the adapter's columns."""
        return tuple(VisionExpert(**expert) for expert in self.experts)

    def conversation(self, question: str, *, images: int = 1) -> str:
        """Format a user's turn, images first, in the chat template, up to the place where the answer begins."""
        check(IMAGE_TOKEN not in question, "question", f"must not contain {IMAGE_TOKEN}", question)
        return self.apply_chat_template([{"role": "user", "content": f"{IMAGE_TOKEN}\n" * images + question}])

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        chat_template: str | None = None,
        *,
        add_generation_prompt: bool = True,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str = "pt",
        processor_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Format messages, or a list of conversations, as text; or with ``tokenize`` as the model's arguments.

        A content may be a list of ``{"type": "image"}`` and ``{"type": "text", "text": ...}``. The template has the
        special tokens before the text, so ``__call__`` adds none.

        Args:
            conversation: messages, or a list of conversations. With ``tokenize`` each image part must have its image,
                under "image" or "path" (a PIL image, a path or bytes), "url" or "base64".
            chat_template, add_generation_prompt: as in transformers.
            tokenize: return tokens instead of text.
            return_dict: with ``tokenize``, return all arguments of ``model.generate(**inputs)`` instead of
                ``input_ids`` alone. The model then picks the experts of each image itself, as :class:`MoVAPipeline`
                does, unless ``experts`` is given.
            return_tensors, processor_kwargs: of ``__call__``, whose arguments may also stand beside them: ``padding``,
                ``max_length``, ``experts``, ``questions``, ...
            kwargs: further variables of the template.

        Raises:
            TypeError, ValueError: a part is neither image nor text, or ``__call__`` raises it.
        """
        is_list = isinstance(conversation, list | tuple)
        check(is_list, "conversation", "must be a list", type(conversation).__name__, TypeError)
        check(conversation, "conversation", "must not be empty", conversation)
        masked = kwargs.pop("return_assistant_tokens_mask", False)
        check(not masked, "return_assistant_tokens_mask", "must be False", masked)
        batched = isinstance(conversation[0], list | tuple)
        chats: list[Any] = list(conversation) if batched else [conversation]
        check_chats(chats)
        given = {key: kwargs.pop(key) for key in _OF_THE_CALL if key in kwargs} | dict(processor_kwargs or {})
        _check_not_generating(kwargs)
        template = self._template(chat_template)
        texts = []
        for chat in chats:
            messages = [{**message, "content": message_text(message)} for message in chat]
            if self.system_prompt is not None and messages[0]["role"] != "system":
                messages.insert(0, {"role": "system", "content": self.system_prompt})
            texts.append(
                self.tokenizer.apply_chat_template(
                    messages,
                    chat_template=template,
                    add_generation_prompt=add_generation_prompt,
                    tokenize=False,
                    **kwargs,
                )
            )
        if not tokenize:
            return texts if batched else texts[0]
        images, questions = [], []
        for chat in chats:
            images += (found := chat_images(chat))
            questions += [chat_questions(chat)] * len(found)
        if images and given.get("experts") is not None:
            given.setdefault("questions", gate_texts(self, questions))
        inputs = self(images or None, texts, return_tensors=return_tensors, **given)
        if not return_dict:
            return inputs["input_ids"]
        if images and "routing" not in inputs:
            gate_texts(self, questions)  # raises if a question is wrong, before the model runs
            inputs["routing"] = RoutingRequest(self, images, questions)
        return inputs

    def _template(self, given: str | None) -> str:
        """Return the chat template: the given one. Of several by name, ``given`` or "default" names it."""
        own = self.chat_template or self.tokenizer.chat_template or CHAT_TEMPLATE
        if not isinstance(own, Mapping):
            return given or own
        if given is None:
            check("default" in own, "chat_template", f"must be one of {', '.join(own)}", None)
        return own.get("default" if given is None else given, given)

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        *,
        experts: str | Sequence[str | Iterable[str]] | None = None,
        questions: str | Sequence[str] | None = None,
        padding: bool | str = True,
        truncation: bool | None = None,
        max_length: int | None = None,
        return_tensors: str = "pt",
        **tokenizer: Any,
    ) -> BatchFeature:
        """Make the arguments of ``model(**inputs)`` and ``model.generate(**inputs, ...)``.

        Args:
            images: one or a list, or a list of lists, one for each text: PIL images, paths or bytes; in the order of
                the placeholders in ``text``.
            text: one or a list of B, with :data:`IMAGE_TOKEN` where an image belongs (see :meth:`conversation`).
            experts: "all", "none" or a list of names, for all M images; or a list of M such entries. None: no experts.
            questions: the text for the adapter's gates, one for each image (``mova.prompts(...).text``); needed if an
                image uses experts.
            padding, max_length: as in transformers.
            truncation: whether longer texts are cut on the right; an image is never cut. None: True if ``max_length``
                is given.
            return_tensors: "pt" only.
            tokenizer: of transformers' tokenizers: ``padding_side``, ``pad_to_multiple_of``, ``add_special_tokens``
                (default False, since the template has them).

        Returns:
            input_ids, attention_mask (B, T), left-padded; with images also pixel_values (M, 3, S, S), and with experts
            routing (M, N), expert_pixel_values {name: images that use it}, question_ids and question_mask (M, T_q).

        Raises:
            TypeError, ValueError: the arguments do not fit together, or an image would be cut.
        """
        check(return_tensors == "pt", "return_tensors", "must be 'pt'", return_tensors)
        _check_not_generating(tokenizer)
        unknown = sorted(set(tokenizer) - {"padding_side", "pad_to_multiple_of", "add_special_tokens"})
        check(not unknown, "an argument", f"must be one of {', '.join(_OF_THE_CALL)}", unknown, TypeError)
        check(
            isinstance(text, str | list | tuple) and text, "text", "must be a text or a list of texts", text, TypeError
        )
        texts = [text] if isinstance(text, str) else list(text)  # type: ignore[arg-type]
        opened = [image if isinstance(image, PreparedImage) else PreparedImage(image) for image in flat_images(images)]
        places = [t.count(IMAGE_TOKEN) for t in texts]
        total = sum(places)
        check(total == len(opened), "images", f"must be {total}, as many as {IMAGE_TOKEN} in text", len(opened))
        if isinstance(images, list | tuple) and any(isinstance(entry, list | tuple) for entry in images):
            counts = [len(entry) if isinstance(entry, list | tuple) else 1 for entry in images]
            check(
                counts == places, "images", f"must be lists of {places}, as many as {IMAGE_TOKEN} in each text", counts
            )
        wanted = {"padding": padding, "truncation": truncation, **tokenizer}
        inputs = dict(self.tokenize(texts, self.num_image_tokens, max_length, **wanted))
        if opened:
            base = VisionExpert(**self.base)
            inputs["pixel_values"] = torch.stack([image.view(base) for image in opened])
        if experts is not None:
            names = [expert.name for expert in self.pool]
            inputs |= self.routed(opened, per_image(experts, len(opened), names), questions)
        return BatchFeature(inputs)

    def tokenize(
        self,
        texts: Sequence[str],
        image_tokens: int,
        max_length: int | None = None,
        *,
        padding: bool | str = True,
        truncation: bool | None = None,
        **tokenizer: Any,
    ) -> dict[str, Tensor]:
        """Make input_ids and attention_mask (B, T), left-padded; each placeholder becomes ``image_tokens`` tokens."""
        expected = [text.count(IMAGE_TOKEN) * image_tokens for text in texts]
        wide = [text.replace(IMAGE_TOKEN, IMAGE_TOKEN * image_tokens) for text in texts]
        cuts = max_length is not None if truncation is None else truncation
        with _TOKENIZING:
            encoded = self.tokenizer(
                wide,
                padding=padding,
                truncation=cuts,
                max_length=max_length if cuts or padding == "max_length" else None,
                return_tensors="pt",
                **{"add_special_tokens": False, **tokenizer},
            )
        found = (encoded["input_ids"] == self.image_token_id).sum(1).tolist()
        for row, (kept, wanted) in enumerate(zip(found, expected, strict=True)):
            check(kept == wanted, "max_length", f"must leave text[{row}] its {wanted} image tokens", max_length)
        return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}

    def tokenize_questions(self, questions: Sequence[str]) -> dict[str, Tensor]:
        """Make question_ids and question_mask (M, T_q), padded on the right and cut at 512 tokens."""
        limit = min(512, self.question_tokenizer.model_max_length)
        how = {"padding": True, "padding_side": "right", "truncation": True, "max_length": limit}
        with _TOKENIZING:
            encoded = self.question_tokenizer(list(questions), return_tensors="pt", **how)
        return {"question_ids": encoded["input_ids"], "question_mask": encoded["attention_mask"]}

    def routed(self, images: Sequence[PreparedImage], chosen: Sequence[Any], questions: Any) -> dict[str, Any]:
        """Make routing, expert_pixel_values, question_ids and question_mask from the experts of each image."""
        pool = self.pool
        mask = routing_mask(chosen, pool)
        pixels = {
            expert.name: torch.stack([images[i].view(expert) for i in column.nonzero().flatten().tolist()])
            for expert, column in zip(pool, mask.T, strict=True)
            if column.any()
        }
        found: dict[str, Any] = {"routing": mask, "expert_pixel_values": pixels}
        if mask.any():
            asked = [questions] * len(images) if isinstance(questions, str) else questions
            check(asked is not None, "questions", "must be given when an image uses experts", questions)
            check(len(asked) == len(images), "questions", f"must be one for each of {len(images)} images", len(asked))
            found |= self.tokenize_questions(asked)
        return found


def _check_not_generating(arguments: Iterable[str]) -> None:
    """Refuse arguments of ``generate``, which transformers' pipelines pass to the processor: they would be lost."""
    known = vars(GenerationConfig())
    found = sorted(name for name in arguments if name in known and not name.startswith("_"))
    rule = "is for generate (of a pipeline of transformers: generate_kwargs={...})"
    check(not found, "an argument", rule, found, TypeError)


def per_image(experts: Any, count: int, pool: Sequence[str]) -> list[Any]:
    """Return one entry for each of ``count`` images; "all", "none" and a list of names are for all images."""
    is_list = isinstance(experts, list | tuple)
    check(isinstance(experts, str) or is_list, "experts", "must be 'all', 'none' or a list", experts, TypeError)
    if isinstance(experts, str) or all(isinstance(e, str) and e in pool for e in experts):
        return [experts] * count
    check(len(experts) == count, "experts", f"must be names ({', '.join(pool)}) or {count} entries", experts)
    return list(experts)


def _check_words(tokenizer: Any, expected: int | None) -> int:
    """Check the text encoder's tokenizer and return its size. It loads even without its vocabulary file."""
    found, where = tokenizer.get_vocab(), tokenizer.name_or_path
    check(IMAGE_TOKEN not in found, "question_tokenizer", "must be the text encoder's, not the language model's", where)
    has_words = not set(found) <= set(tokenizer.all_special_tokens)
    check(has_words, "question_tokenizer", f"must have words, not special tokens alone (in {where})", len(found))
    fits = expected is None or len(tokenizer) == expected
    check(fits, "question_tokenizer", f"must have the {expected} words that it was saved with (in {where})", len(found))
    return len(tokenizer)


def _check_processor_files(directory: Path) -> None:
    """Raise an error that names the missing or damaged file of a processor's directory."""
    if not (directory / "processor_config.json").is_file():
        return  # no processor: transformers reports it
    for name in ("processor_config.json", "config.json"):  # a tokenizer reads the model's config, too
        if (directory / name).exists():
            read_json(directory / name)
    for folder in (directory, directory / _QUESTIONS):
        for name in ("tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json"):
            if (folder / name).exists():
                read_json(folder / name)
        if not (folder / "tokenizer_config.json").is_file():
            raise FileNotFoundError(f"no tokenizer_config.json in {folder}")
