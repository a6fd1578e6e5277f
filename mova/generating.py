"""transformers' ``generate`` with images: the prompt is embedded once, and each step gets its part of it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig

from ._checks import check, check_int

IMAGE_ARGUMENTS = ("pixel_values", "routing", "expert_pixel_values", "question_ids", "question_mask", "image_features")


_NO_TEXT = (
    "return_dict_in_generate", "output_scores", "output_logits", "output_attentions", "output_hidden_states"
)  # fmt: skip


def generate_arguments(generate: Mapping[str, Any]) -> dict[str, Any]:
    """Check arguments of transformers' ``generate`` for a caller who wants one text for each prompt.

    A ``generation_config`` is replaced by the arguments that it sets; arguments beside it take precedence.

    Raises:
        TypeError: ``generate`` has no such argument (a ``custom_generate`` may have any).
        ValueError: ``num_return_sequences`` is above 1, or an output is asked for that is not a text.
    """
    config = generate.get("generation_config")
    is_config = config is None or isinstance(config, GenerationConfig)
    check(is_config, "generation_config", "must be a GenerationConfig", config, TypeError)
    beside = {name: value for name, value in generate.items() if name != "generation_config" and value is not None}
    arguments = {**({} if config is None else _set_by(config, beside)), **beside}
    known = {name for name in vars(GenerationConfig()) if not name.startswith("_")} | {"tokenizer"}
    known |= set(inspect.signature(GenerationMixin.generate).parameters) | {"assistant_tokenizer", "trust_remote_code"}
    known -= {"self", "inputs", "kwargs"}
    for name in generate:
        ok = name in known or "custom_generate" in generate
        check(ok, name, "must be an argument of transformers' generate", generate[name], TypeError)
    several = arguments.pop("num_return_sequences", None)
    check(several in (None, 1), "num_return_sequences", "must be 1: there is one answer for each image", several)
    for name in _NO_TEXT:
        check(not arguments.get(name), name, "must be False: an answer is a text, see model.generate", True)
    check_values(arguments)
    return arguments


def check_values(arguments: Mapping[str, Any]) -> None:
    """Refuse values that transformers uses in computations before it checks them.

    Args:
        arguments: of ``generate``, or the fields of a generation config.

    Raises:
        TypeError, ValueError: a count is not an int of at least 1, or ``stop_strings`` is neither a string nor a list
            of strings.
    """
    stop = arguments.get("stop_strings")
    strings = [stop] if isinstance(stop, str) else stop
    fits = stop is None or (isinstance(strings, list | tuple) and strings and all(isinstance(s, str) for s in strings))
    check(fits, "stop_strings", "must be a string or a list of strings", stop, TypeError)
    for name in ("num_beams", "num_return_sequences", "prefill_chunk_size"):
        if arguments.get(name) is not None:
            check_int(name, arguments[name], 1)


def _set_by(config: GenerationConfig, beside: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that a config sets, without the limits of a kind (max or min) that ``beside`` sets, too."""
    found = {name: value for name, value in config.to_diff_dict().items() if value is not None}
    found.pop("transformers_version", None)
    for which in ("max", "min"):
        pair = {f"{which}_new_tokens", f"{which}_length"}
        if pair & beside.keys():
            found = {name: value for name, value in found.items() if name not in pair}
        elif pair <= found.keys():
            del found[f"{which}_length"]
    return found


def length_limits(
    arguments: Mapping[str, Any], config: GenerationConfig, prompt: int, default: int
) -> dict[str, int | None]:
    """Decide the limits of an answer's length, as arguments that leave ``generate`` nothing to choose or to warn of.

    The longest length is ``max_new_tokens`` or ``max_length`` of the arguments, else of the model's generation config,
    else ``default`` new tokens. ``max_length`` counts the padded prompt with its image tokens. The shortest length is
    found in the same way, with 0 as default; if only the config sets it, it is cut to the longest length.

    Raises:
        TypeError, ValueError: a limit is not an int, both limits of a kind are given, or they leave no room.
    """
    most = _limit("max", arguments, prompt)
    if most is None:
        most = _limit("max", _limits_of(config, "max"), prompt)
    most = prompt + default if most is None else most
    check(most > prompt, "max_length", f"must be above the {prompt} tokens of the prompt, images included", most)
    least = _limit("min", arguments, prompt)
    if least is None:
        least = min(_limit("min", _limits_of(config, "min"), prompt) or 0, most)
    check(least <= most, "min_length", f"must be at most the longest length, {most} with the prompt", least)
    return {"max_length": most, "max_new_tokens": None, "min_length": least, "min_new_tokens": None}


def check_positions(config: PretrainedConfig, prompt: int) -> None:
    """Refuse a prompt with more tokens, image tokens included, than the language model has positions.

    The answer would be nonsense, and the memory grows with the square of the length. The configs of models with scaled
    rotary positions have no such limit.

    Raises:
        ValueError: the prompt is too long.
    """
    positions = getattr(config, "max_position_embeddings", None)
    is_scaled = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default") != "default"
    if positions is not None and not is_scaled:
        rule = f"must make prompts of at most {positions} tokens, image tokens included (max_position_embeddings)"
        check(prompt <= positions, "questions", rule, prompt)


def _limit(which: str, given: Mapping[str, Any], prompt: int) -> int | None:
    """Return the limit of the whole sequence that ``given`` sets, or None."""
    new, whole = given.get(f"{which}_new_tokens"), given.get(f"{which}_length")
    for name, value in ((f"{which}_new_tokens", new), (f"{which}_length", whole)):
        if value is not None:
            check_int(name, value, 1 if which == "max" else 0)
    check(new is None or whole is None, f"{which}_length", f"must be None with {which}_new_tokens", whole)
    return whole if new is None else prompt + new


def _limits_of(config: GenerationConfig, which: str) -> dict[str, Any]:
    """Return the limit of a config; if it sets both, the limit of new tokens counts, as in transformers."""
    new = getattr(config, f"{which}_new_tokens", None)
    return {f"{which}_new_tokens": new} if new is not None else {f"{which}_length": getattr(config, f"{which}_length")}


class PromptGenerationMixin(GenerationMixin):
    """``generate``'s steps for a model whose ``forward`` takes ``prompt_embeds``.

    The prompt with its images is embedded before any loop starts. So the images are encoded once, whatever loop
    follows: beams, assistants, chunks, or one of the caller's own. ``inputs_embeds`` of transformers is not enough: it
    stands for the whole first step, which in assisted decoding has candidates behind the prompt, and it cannot be
    chunked.
    """

    if TYPE_CHECKING:
        config: Any

        def embed(self, *args: Any) -> Tensor: ...

        def get_input_embeddings(self) -> torch.nn.Module: ...

    def _prompt(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        image_features: Tensor | None,
        kwargs: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Return the arguments that tell the steps the embedded prompt."""
        embeds = kwargs.get("inputs_embeds")
        if kwargs.get("cache_implementation") == "paged":  # transformers' generate_batch takes tokens only
            text = input_ids is not None and image_features is None and not self._places(input_ids)
            check(text, "cache_implementation", "must not be 'paged' with images or inputs_embeds", "paged")
            return {}
        if embeds is not None:
            embeds = self.embed(None, image_features, embeds)
            if input_ids is None or input_ids.shape != embeds.shape[:2]:
                chunk = self._setting("prefill_chunk_size", kwargs)
                check(chunk is None, "prefill_chunk_size", "must be None with inputs_embeds alone", chunk)
                return {"inputs_embeds": embeds, "prompt_embeds": embeds[:, :0]}
            return {"inputs_embeds": None, "prompt_embeds": embeds}
        if input_ids is None:
            check(image_features is None, "input_ids", "or inputs_embeds must be given with images", None)
            return {}
        past, length = cache_length(kwargs), input_ids.shape[1]
        if past and attention_mask is not None and attention_mask.shape[1] != length:
            return {"prompt_embeds": self.embed(input_ids, image_features), "prompt_start": past}
        check(past < length, "input_ids", f"must be longer than the cache ({past} tokens) that they begin with", length)
        new = input_ids[:, past:]
        if past and self._places(new) == _count(image_features):
            cached = self.get_input_embeddings()(input_ids[:, :past])  # only fill their places; no step reads them
            return {"prompt_embeds": torch.cat([cached, self.embed(new, image_features)], 1)}
        return {"prompt_embeds": self.embed(input_ids, image_features)}

    def _ends(self, input_ids: Tensor | None, attention_mask: Tensor | None, kwargs: Mapping[str, Any]) -> bool:
        """Whether every row ends with a token. Without a mask, padding is recognised as transformers does it."""
        if attention_mask is not None:
            return attention_mask.dim() != 2 or not attention_mask.shape[1] or bool(attention_mask[:, -1].all())
        padding, last = self._setting("pad_token_id", kwargs), self._setting("eos_token_id", kwargs)
        is_last = padding in last if isinstance(last, list | tuple) else padding == last
        if input_ids is None or padding is None or is_last or not input_ids.numel():
            return True
        return not (input_ids[:, -1] == padding).any()

    def _setting(self, name: str, kwargs: Mapping[str, Any]) -> Any:
        """Find an argument's value as ``generate`` does: given, of a given generation config, or of the model's."""
        if name in kwargs:
            return kwargs[name]
        configs = kwargs.get("generation_config"), self.generation_config
        found = (getattr(config, name, None) for config in configs)
        return next((value for value in found if value is not None), None)

    def _places(self, input_ids: Tensor) -> int:
        return int((input_ids == self.config.image_token_id).sum())

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        inputs_embeds: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_start: int = 0,
        cache: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Prepare a step as transformers does, and add the embedded part of the prompt that the step's tokens cover.

        Args:
            input_ids: (B, T) all tokens so far; or a chunk of the prompt, or the newest tokens alone.
            prompt_embeds: (B, n, hidden_size), the embedded prompt.
            prompt_start: the number of tokens in a cache before the prompt.
            cache, past_key_values: two names of one argument; the second is that of transformers before 5.24, which
                looks for it in this signature.
        """
        kwargs |= {k: v for k, v in (("cache", cache), ("past_key_values", past_key_values)) if v is not None}
        step = super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        ids = step["input_ids"]
        if ids is None:  # the first step, if inputs_embeds are given
            return step
        if prompt_embeds is None:
            if kwargs.get("use_cache", True) and not kwargs.get("is_first_iteration"):
                step = {name: value for name, value in step.items() if name not in IMAGE_ARGUMENTS}
            return step
        tokens = ids.shape[1]
        start = input_ids.shape[1] - tokens
        if input_ids.shape[1] < prompt_embeds.shape[1]:
            past = cache_length(kwargs)
            start = past - prompt_start
            mask = kwargs.get("attention_mask")
            fits = start >= prompt_embeds.shape[1] or mask is None or mask.shape[1] == past + tokens
            check(fits, "prefill_chunk_size", "must be None if the cache is not empty (transformers before 5.24)", past)
        step["prompt_embeds"] = prompt_embeds[:, start : start + tokens]
        return step

    def _embed_step(self, input_ids: Tensor, prompt_embeds: Tensor) -> Tensor:
        """Embed the (B, T) tokens of a step as (B, T, hidden_size); the first n are given as ``prompt_embeds``."""
        known = prompt_embeds.shape[1]
        if known == input_ids.shape[1]:
            return prompt_embeds
        embedded = self.get_input_embeddings()(input_ids[:, known:])
        return torch.cat([prompt_embeds.to(embedded), embedded], 1) if known else embedded

    def _get_candidate_generator(self, *, model_kwargs: dict[str, Any], **kwargs: Any) -> Any:
        """Make transformers' candidate generator; an assistant without images reads placeholders as plain tokens."""
        rule = "must come with input_ids of the same length when candidates are tried"
        check(model_kwargs.get("inputs_embeds") is None, "inputs_embeds", rule, "inputs_embeds alone")
        cached = cache_length(model_kwargs)
        check(not cached, "past_key_values", "must be empty when candidates are tried", f"{cached} tokens")
        early = kwargs["generation_config"].assistant_early_exit
        check(early is None, "assistant_early_exit", "must be None: use assistant_model", early)
        prompt, assistant = model_kwargs.get("prompt_embeds"), kwargs.get("assistant_model")
        seen = {k: v for k, v in model_kwargs.items() if k not in ("prompt_embeds", "prompt_start")}
        if isinstance(assistant, PromptGenerationMixin) and prompt is not None:
            ids = kwargs["input_ids"][:, : prompt.shape[1]]
            features = prompt[ids == self.config.image_token_id]
            seen["prompt_embeds"] = assistant.embed(ids, features[None] if len(features) else None)
        return super()._get_candidate_generator(model_kwargs=seen, **kwargs)


def cache_length(kwargs: Mapping[str, Any]) -> int:
    """Count the tokens in the cache, whose name is past_key_values before transformers 5.24."""
    cache: Any = kwargs.get("cache")
    cache = kwargs.get("past_key_values") if cache is None else cache
    return int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0


def _count(image_features: Tensor | None) -> int:
    return 0 if image_features is None else image_features.shape[0] * image_features.shape[1]
