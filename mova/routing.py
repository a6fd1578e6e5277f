"""Routing as text: the prompt that offers experts to a language model, and the experts that its answer selects."""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase as LETTERS
from typing import TYPE_CHECKING

from ._checks import check, check_int, check_whole
from .experts import VisionExpert, resolve

if TYPE_CHECKING:
    from torch import Tensor

TEMPLATE = """\
The vision models listed below can each add details to what you see of this image. Pick those whose details help to \
answer the question, {topk} at most. Reply with their letters and commas between them, the most helpful first, or with \
"none" if no model helps.

{pool}

Question: {question}"""
_PLACES = ("router", "answer", "text")
_SURROGATE = re.compile("[\ud800-\udfff]")
_FIELDS = re.compile(r"\{(topk|pool|question)\}")


def is_unicode(text: str) -> bool:
    """Whether a tokenizer can read the text: it must not have half a surrogate pair."""
    return text.isascii() or not _SURROGATE.search(text)


@dataclass(frozen=True)
class RoutingPrompt:
    """The ``text`` for the language model, and the names of the ``pool`` in the order of their letters."""

    text: str
    pool: tuple[str, ...]

    @property
    def letters(self) -> dict[str, str]:
        """The name of the expert for each letter."""
        return dict(zip(LETTERS, self.pool, strict=False))

    def answer(self, experts: Iterable[str]) -> str:
        """Return the answer that selects these experts in this order, ``"A, D"`` or ``"none"``: a target for training.

        Raises:
            ValueError: an expert is not in the pool.
        """
        letter_of = {name: letter for letter, name in self.letters.items()}
        names = dict.fromkeys(member_names(experts, self.pool))
        return ", ".join(letter_of[name] for name in names) or "none"


def routing_prompt(
    question: str,
    experts: Iterable[str | VisionExpert],
    *,
    topk: int = 3,
    descriptions: Mapping[str, str] | None = None,
    seed: int | None = None,
    template: str = TEMPLATE,
) -> RoutingPrompt:
    """Make the prompt that asks which of ``experts`` would help with ``question``.

    The placeholder of the image goes before the text.

    Args:
        question: the user's own words.
        experts: the pool, 1 to 26 names or VisionExperts; the first becomes A. There are no two-letter names.
        topk: the most experts that the answer may name.
        descriptions: name to description; replaces the expert's own description.
        seed: shuffles the pool, in the same way for the same seed; the result's ``pool`` and ``letters`` have the
            order.
        template: the wording, with ``{pool}``, ``{question}`` and, if wanted, ``{topk}``. A template without ``{pool}``
            must list the models by their letters, in the order of ``experts``; without ``{question}`` the question is
            appended. The template of :func:`mova.official_template` belongs to ``mova.experts.OFFICIAL``.

    Raises:
        TypeError, ValueError: an argument breaks its rule, or a name is unknown or repeated.
    """
    check(isinstance(question, str), "question", "must be a string", question, TypeError)
    check(question.strip(), "question", "must not be empty", question)
    check(is_unicode(question), "question", "must be valid Unicode", question)
    check(isinstance(template, str), "template", "must be a string", template, TypeError)
    check_int("topk", topk, 1)
    pool = resolve(experts)
    check(len(pool) <= len(LETTERS), "experts", f"must be at most {len(LETTERS)}, one for each letter", len(pool))
    lines = {expert.name: expert.description for expert in pool}
    descriptions = {} if descriptions is None else descriptions
    check(isinstance(descriptions, Mapping), "descriptions", "must be a mapping", descriptions, TypeError)
    for name, line in descriptions.items():
        check(name in lines, "descriptions", f"must be for experts of the pool ({', '.join(lines)})", name)
        one_line = isinstance(line, str) and len(line.strip().splitlines()) == 1
        check(one_line, f"descriptions[{name!r}]", "must be one line of text", line)
        lines[name] = line.strip()
    if "{pool}" not in template:
        check(seed is None and not descriptions, "template", "must have {pool} for seed and descriptions", template)
        found = set(re.findall(r"\b[A-Z]\b", template))
        exact = found.issuperset(LETTERS[: len(pool)]) and LETTERS[len(pool) : len(pool) + 1] not in found
        check(exact, "template", f"must have {{pool}}, or list {len(pool)} models by their letters", template)
    if "{question}" not in template:
        template += "{question}"
    order = tuple(lines)
    if seed is not None:
        check_whole("seed", seed)
        order = tuple(random.Random(seed).sample(order, len(order)))
    listed = "\n".join(f"{letter}. {lines[name]}" for letter, name in zip(LETTERS, order, strict=False))
    values = {"topk": str(topk), "pool": listed, "question": question}
    # Replaced in one pass, since a question may contain "{pool}"; and not by str.format, since texts may have braces.
    return RoutingPrompt(_FIELDS.sub(lambda field: values[field[1]], template), order)


@dataclass(frozen=True)
class Prompts:
    """One question in its three forms: for the ``router``, for the ``answer``, and as the adapter's ``text`` input."""

    router: RoutingPrompt
    answer: str
    text: str


def prompts(
    questions: str | Sequence[str],
    experts: Iterable[str | VisionExpert],
    *,
    topk: int = 3,
    suffix: str = "",
    suffix_in: Iterable[str] = ("answer",),
    template: str = TEMPLATE,
    descriptions: Mapping[str, str] | None = None,
    seed: int | None = None,
) -> Prompts:
    """Make all three forms of a question. The placeholder of the image goes before ``router`` and ``answer``.

    The router and the answer get the last question. The text encoder gets all of them: "question 0: ", the question in
    lower case and an empty line, then the same for question 1, and so on.

    Args:
        questions: the user's own words; of a conversation a list with the question of every round.
        suffix: an instruction ("Answer with one word.") on a line of its own after the last question.
        suffix_in: the forms that get the suffix, of "router", "answer" and "text"; the official scripts do not agree.
        experts, topk, template, descriptions, seed: as for :func:`routing_prompt`.

    Raises:
        TypeError, ValueError: an argument breaks its rule, there is no question, or a question is empty.
    """
    rounds = [questions] if isinstance(questions, str) else questions
    check(isinstance(rounds, list | tuple), "questions", "must be a string or a list of strings", questions, TypeError)
    check(rounds, "questions", "must not be empty", questions)
    for i, question in enumerate(rounds):
        check(isinstance(question, str), f"questions[{i}]", "must be a string", question, TypeError)
        check(question.strip(), f"questions[{i}]", "must not be empty", question)
    check(isinstance(suffix, str), "suffix", "must be a string", suffix, TypeError)
    is_list = isinstance(suffix_in, Iterable) and not isinstance(suffix_in, str)
    check(is_list, "suffix_in", "must be a sequence of names", suffix_in, TypeError)
    places = tuple(suffix_in)
    check(set(places).issubset(_PLACES), "suffix_in", f"must be of {', '.join(_PLACES)}", places)
    last = {place: f"{rounds[-1]}\n{suffix}" if suffix and place in places else rounds[-1] for place in _PLACES}
    router = routing_prompt(last["router"], experts, topk=topk, descriptions=descriptions, seed=seed, template=template)
    text = "".join(f"question {i}: {q.lower()}\n\n" for i, q in enumerate([*rounds[:-1], last["text"]]))
    return Prompts(router, last["answer"], text)


# Latin words with their hyphens and apostrophes; other scripts separate, as in "选择A和D".
_LATIN = "[0-9A-Za-zÀ-ɏ]+"
_WORD = re.compile(f"{_LATIN}(?:['\u2019-]{_LATIN})*")
_NONE = re.compile(r"\W*(none|nothing|n/?a)\b", re.IGNORECASE)
_JOINS = ("and", "or")
# Follows an "A" or "I" that is a word, as in "A chart reader" and "I think"; not a letter, as in "A and C", "A is
# best".
_GOES_ON = re.compile(r"[ \t]+(?!(?:and|or|is|for|because|plus|then|with|only)\b)[a-zà-ÿ]")


def parse_routing(answer: str, pool: Sequence[str | VisionExpert], *, topk: int | None = None) -> tuple[str, ...]:
    """Return the names of the experts that ``answer`` selects, in its order, each once, at most ``topk``.

    A letter counts if it stands alone; a lower-case letter counts only if the answer has nothing but letters, since
    ``a`` is a word. Letters outside the pool are ignored. An answer that begins with "none", "nothing" or "n/a" selects
    nothing. An answer without letters selects nothing, too, with a warning. Every string is accepted.

    Args:
        answer: what the language model wrote.
        pool: names or VisionExperts in the order of their letters (:attr:`RoutingPrompt.pool`).
        topk: the most names that are returned; None: all.

    Raises:
        TypeError, ValueError: ``answer`` is not a string, ``pool`` is empty or repeats a name, ``topk`` is below 1.
    """
    check(isinstance(answer, str), "answer", "must be a string", answer, TypeError)
    names = pool_names(pool)
    check(len(names) <= len(LETTERS), "pool", f"must have at most {len(LETTERS)} entries", len(names))
    member = dict(zip(LETTERS, names, strict=False))
    if topk is not None:
        check_int("topk", topk, 1)
    if _NONE.match(answer):
        return ()
    words = list(_WORD.finditer(answer))
    if all(len(word[0]) == 1 or word[0].lower() in _JOINS for word in words):
        found = [word[0].upper() for word in words if word[0].isascii()]
    else:
        found = [word[0] for i, word in enumerate(words) if not _is_word(answer, word, words[i - 1] if i else None)]
    selected = tuple(dict.fromkeys(member[letter] for letter in found if letter in member))
    if not selected and not re.search(r"\bnone\b", answer, re.IGNORECASE):
        warnings.warn(f"the router's answer names no expert, so none is used: {answer[:80]!r}", stacklevel=2)
    return selected[:topk]


def _is_word(answer: str, word: re.Match[str], previous: re.Match[str] | None) -> bool:
    """Whether an A or I in a sentence is the article or the pronoun."""
    starts = previous is None or any(c in ".!?\n" for c in answer[previous.end() : word.start()])
    return (word[0] == "I" or (word[0] == "A" and starts)) and _GOES_ON.match(answer, word.end()) is not None


def parse_routing_official(answer: str, num_experts: int = 7) -> list[bool]:
    """Parse an answer as the official code does, mistakes included; returns a row in the order of the letters.

    Any capital in the first three comma-separated pieces selects an expert, so "Based on A" selects B, too.
    """
    check(isinstance(answer, str), "answer", "must be a string", answer, TypeError)
    check(num_experts in range(1, len(LETTERS) + 1), "num_experts", f"must be 1 to {len(LETTERS)}", num_experts)
    pieces = "".join(answer.split(",")[:3])
    return [letter in pieces for letter in LETTERS[:num_experts]]


def selection(experts: str | Iterable[str | VisionExpert], pool: Sequence[str | VisionExpert]) -> list[bool]:
    """Return the routing row of one sample, one entry for each expert of ``pool``.

    Args:
        experts: "all", "none", or the names of the selected experts.
        pool: in the model's order.

    Raises:
        TypeError, ValueError: ``experts`` is another string, or has a name that is not in the pool.
    """
    ordered = pool_names(pool)
    if isinstance(experts, str):
        check(experts in ("all", "none"), "experts", "must be 'all', 'none' or a sequence of names", experts)
        return [experts == "all"] * len(ordered)
    chosen = member_names(experts, ordered)
    return [name in chosen for name in ordered]


def routing_mask(
    selections: Sequence[str | Iterable[str | VisionExpert]], pool: Sequence[str | VisionExpert]
) -> Tensor:
    """Return the routing (B, N) bool of ``mova_kernels.MoVAdapter``: the :func:`selection` of every sample."""
    import torch

    is_batch = isinstance(selections, Sequence) and not isinstance(selections, str)
    check(is_batch, "selections", "must be a sequence with one entry for each sample", selections, TypeError)
    rows = [selection(experts, pool) for experts in selections]
    return torch.tensor(rows, dtype=torch.bool).reshape(len(rows), len(pool_names(pool)))


def pool_names(pool: Sequence[str | VisionExpert]) -> list[str]:
    """Return the names of a pool, which need not be registered; they must be different."""
    check(isinstance(pool, list | tuple), "pool", "must be a list or tuple of names or VisionExperts", pool, TypeError)
    names = [_name("pool", e) for e in pool]
    check(names, "pool", "must not be empty", names)
    check(len(set(names)) == len(names), "pool", "must not repeat a name", names)
    return names


def member_names(experts: Iterable[str | VisionExpert], pool: Sequence[str]) -> list[str]:
    """Return the names of experts, which must be in the pool."""
    is_list = isinstance(experts, Iterable) and not isinstance(experts, str)
    check(is_list, "experts", "must be a sequence of names", experts, TypeError)
    names = [_name("experts", e) for e in experts]
    for name in names:
        check(name in pool, "experts", f"must be in the pool ({', '.join(pool)})", name)
    return names


def _name(argument: str, expert: object) -> str:
    name = expert.name if isinstance(expert, VisionExpert) else expert
    check(isinstance(name, str), argument, "must hold names or VisionExperts", expert, TypeError)
    return name  # type: ignore[return-value]
