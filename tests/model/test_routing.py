"""Routing as text: prompts, answers as language models write them, the official parser, overrides, bad input."""

from __future__ import annotations

import random
import re
import warnings

import pytest

from mova import (
    Prompts,
    VisionExpert,
    parse_routing,
    parse_routing_official,
    prompts,
    routing_mask,
    routing_prompt,
    selection,
)
from mova.experts import OFFICIAL

NAMES = tuple(e.name for e in OFFICIAL)
POOL = tuple("abcdefg")  # names as good as any: the expected letters are written in capitals below
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def letters_of(names, pool=POOL):
    return "".join(LETTERS[pool.index(name)] for name in names)


def many(n):
    """n experts whose descriptions give no letter away."""
    grey = (0.5, 0.5, 0.5)
    return [VisionExpert(f"e{i}", f"does task {i}", 32, grey, grey, (2, 2), 8) for i in range(n)]


# What the official parser was seen to make of an answer, and what was meant.
TABLE = {
    "A, D": ("AD", "AD"),
    "none": ("", ""),
    "None": ("", ""),
    "": ("", None),
    "A,B,C,D": ("ABC", "ABCD"),
    "A D E": ("ADE", "ADE"),
    "ABCDEFG": ("ABCDEFG", None),
    "a, d": ("", "AD"),
    "Based on the image, A": ("AB", "A"),
    "NONE": ("E", ""),
    "Answer: D": ("AD", "D"),
    "A,A,A,B": ("A", "AB"),
}
# What else language models write. None: it names nothing, which is worth a warning.
ANSWERS = {
    "D, A": "DA",
    "D": "D",
    "d": "D",
    "a": "A",
    "A.": "A",
    "(A) and (D)": "AD",
    "[A, B, C]": "ABC",
    "**A**, _D_": "AD",
    "'A', 'D'": "AD",
    "A & D": "AD",
    "A/D": "AD",
    "- G\n- B": "GB",
    "A. B. C.": "ABC",
    "\uff21": None,  # a full-width A
    "A、D": "AD",
    "选择A和D。": "AD",
    "  \n A, D</s>": "AD",
    "A, D<|eot_id|>": "AD",
    "a or d": "AD",
    "A and Z": "A",
    "Z": None,
    "A-D": None,
    "1, 2": None,
    "AD": None,
    "I think that E would do, perhaps F": "EF",
    "A good choice is D": "D",
    "Sure. A model for charts such as E.": "E",
    "A is best": "A",
    "A and C are best": "AC",
    "A, because of the objects": "A",
    "The model A sees objects": "A",
    "D. A": "DA",
    "I'd take D": "D",
    "I'm, d": None,
    "The best is model D (D sees text)": "D",
    "Vitamin-D deficiency in an X-ray: F": "F",
    "Because Everything Can Fail": None,
    "None of A, B or C": "",
    "none.": "",
    "'none'": "",
    "N/A": "",
    "Nothing fits": "",
    "Answer: none": "",
    "Router answer: D, none of the others": "D",
    "no idea": None,
    "\ud800\x00": None,
}


@pytest.mark.parametrize("answer", TABLE)
def test_official_parser(answer):
    row = parse_routing_official(answer)
    assert row == [letter in TABLE[answer][0] for letter in "ABCDEFG"]


@pytest.mark.parametrize("answer", [*TABLE, *ANSWERS])
def test_parser(answer):
    expected = TABLE[answer][1] if answer in TABLE else ANSWERS[answer]
    if expected is None:
        with pytest.warns(UserWarning, match="names no expert, so none is used"):
            assert parse_routing(answer, POOL) == ()
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert letters_of(parse_routing(answer, POOL)) == expected


def test_topk_keeps_the_first_named():
    assert letters_of(parse_routing("D, D, A, C, B", POOL, topk=3)) == "DAC"
    assert letters_of(parse_routing("D", POOL, topk=3)) == "D"


def test_pronoun_in_a_large_pool():
    pool = tuple(LETTERS.lower())
    assert letters_of(parse_routing("I would say H, or I", pool), pool) == "HI"
    assert letters_of(parse_routing("I, x", pool), pool) == "IX"
    assert letters_of(parse_routing("h, \u0131, \u017f", pool), pool) == "H", "the capitals of the others are I and S"


@pytest.mark.parametrize("size", range(1, 27))
def test_perfect_answers_come_back(size):
    """Every pool size, shuffled or not; every expert alone, and random selections in random order."""
    pool, rng = many(size), random.Random(size)
    for seed in (None, 0, 1):
        prompt = routing_prompt("Why?", pool, seed=seed)
        assert sorted(prompt.pool) == sorted(e.name for e in pool)
        picks = [[name] for name in prompt.pool] + [rng.sample(prompt.pool, rng.randint(1, size)) for _ in range(10)]
        for pick in picks:
            assert list(parse_routing(prompt.answer(pick), prompt.pool)) == pick
        assert prompt.answer([prompt.pool[0]] * 2) == "A"
        assert prompt.answer([]) == "none" and parse_routing("none", prompt.pool) == ()


@pytest.mark.parametrize("seed", [None, 0, 7])
def test_each_letter_stands_before_its_own_description(seed):
    prompt = routing_prompt("Where is the dog?", NAMES, seed=seed)
    listed = dict(re.findall(r"^([A-Z])\. (.+)$", prompt.text, re.MULTILINE))
    descriptions = {e.name: e.description for e in OFFICIAL}
    assert listed == {letter: descriptions[name] for letter, name in prompt.letters.items()}
    assert "".join(listed) == "ABCDEFG"
    assert prompt.text.endswith("Question: Where is the dog?") and "3 at most" in prompt.text


def test_order_is_the_callers_unless_shuffled():
    assert routing_prompt("Q", ["sam", "dinov2"]).letters == {"A": "sam", "B": "dinov2"}
    orders = {routing_prompt("Q", NAMES, seed=seed).pool for seed in range(50)}
    assert len(orders) > 40
    assert routing_prompt("Q", NAMES, seed=3) == routing_prompt("Q", NAMES, seed=3)
    state = random.getstate()
    routing_prompt("Q", NAMES, seed=3)
    assert random.getstate() == state, "the global generator was used"


def test_own_descriptions_follow_their_expert():
    prompt = routing_prompt("Q", NAMES, descriptions={"sam": "Cuts things out."}, seed=1)
    letter = {name: letter for letter, name in prompt.letters.items()}["sam"]
    assert f"\n{letter}. Cuts things out.\n" in prompt.text


def test_own_template_in_one_pass():
    prompt = routing_prompt("{pool}?", many(2), topk=2, template="{x} {} {topk}\n{pool}\n{question} {question}")
    assert prompt.text == "{x} {} 2\nA. does task 0\nB. does task 1\n{pool}? {pool}?"


OFFICIAL_LIKE = "Pick:\n" + "\n".join(f"{letter}. thing" for letter in "ABCDEFG") + "\nQ:\n"


def test_three_texts_of_one_question():
    made = prompts("What is THIS?", NAMES, topk=2, seed=1, descriptions={"sam": "Cuts."})
    router = routing_prompt("What is THIS?", NAMES, topk=2, seed=1, descriptions={"sam": "Cuts."})
    assert made == Prompts(router, "What is THIS?", "question 0: what is this?\n\n")
    assert prompts(["What is THIS?"], NAMES, template="{pool}").router.text.endswith("What is THIS?")


def test_t40_suffix_goes_where_it_is_wanted():
    places = ("router", "answer", "text")
    for chosen in [(), *((p,) for p in places), places]:
        made = prompts("Why?", NAMES, suffix="Use ONE word.", suffix_in=chosen)
        has = {"router": made.router.text, "answer": made.answer, "text": made.text.replace("use one", "Use ONE")}
        assert {place for place in places if "?\nUse ONE word." in has[place]} == set(chosen)
    assert made.text == "question 0: why?\nuse one word.\n\n"
    assert prompts("Why?", NAMES, suffix="Use ONE word.").answer == "Why?\nUse ONE word."
    assert prompts("Why?", NAMES, suffix_in=places).answer == "Why?"


def test_rounds():
    made = prompts(("Who?", "What?", "Why?"), NAMES, suffix="Be brief.", suffix_in=("answer", "text"))
    assert made.router == routing_prompt("Why?", NAMES)
    assert made.answer == "Why?\nBe brief."
    assert made.text == "question 0: who?\n\nquestion 1: what?\n\nquestion 2: why?\nbe brief.\n\n"


BAD_PROMPTS = {
    "empty": ((" ", NAMES), {}, ValueError, "questions[0] must not be empty, got ' '"),
    "empty round": ((["Who?", ""], NAMES), {}, ValueError, "questions[1] must not be empty, got ''"),
    "no round": (([], NAMES), {}, ValueError, "questions must not be empty, got []"),
    "type": ((None, NAMES), {}, TypeError, "questions must be a string or a list of strings, got None"),
    "round": (([3], NAMES), {}, TypeError, "questions[0] must be a string, got 3"),
    "suffix": (("Q", NAMES), {"suffix": None}, TypeError, "suffix must be a string, got None"),
    "string": (("Q", NAMES), {"suffix_in": "answer"}, TypeError, "suffix_in must be a sequence of names, got 'answer'"),
    "place": (("Q", NAMES), {"suffix_in": ["x"]}, ValueError, "suffix_in must be of router, answer, text, got ('x',)"),
    "pool": (("Q", []), {}, ValueError, "experts must not be empty, got []"),
}


@pytest.mark.parametrize("name", BAD_PROMPTS)
def test_bad_prompts(name):
    arguments, options, kind, message = BAD_PROMPTS[name]
    with pytest.raises(kind, match=re.escape(message)):
        prompts(*arguments, **options)


def test_fixed_letters_fit_the_pool():
    for pool in (NAMES[:6], [*NAMES, *many(1)]):
        with pytest.raises(ValueError, match=re.escape(f"template must have {{pool}}, or list {len(pool)} models")):
            routing_prompt("Q", pool, template=OFFICIAL_LIKE)
    for changes in ({"seed": 0}, {"descriptions": {"sam": "x"}}):
        with pytest.raises(ValueError, match=re.escape("template must have {pool} for seed and descriptions, got")):
            routing_prompt("Q", NAMES, template=OFFICIAL_LIKE, **changes)


def test_any_string_is_parsed():
    """Only members, each once, at most topk; and no string takes long."""
    rng = random.Random(0)
    pieces = [
        *ANSWERS,
        *TABLE,
        *LETTERS,
        "and",
        "none",
        ", ",
        ".",
        "\n",
        " ",
        "'",
        "-",
        "é",
        "\u2019",
        "\0",
        "{",
        "(",
        "\\",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2000):
            answer = "".join(rng.choices(pieces, k=rng.randint(0, 8)))
            answer += "".join(chr(rng.choice([rng.randrange(128), rng.randrange(0x110000)])) for _ in range(5))
            pool = POOL[: rng.randint(1, 7)]
            selected = parse_routing(answer, pool)
            assert set(selected) <= set(pool) and len(set(selected)) == len(selected)
            assert parse_routing(answer, pool, topk=2) == selected[:2]
            row = parse_routing_official(answer, len(pool))
            # Beside lower-case lists, nothing is selected whose letter does not occur.
            assert all(LETTERS[pool.index(name)] in answer.upper() for name in selected) and len(row) == len(pool)
        for long in ("A " * 50000 + "x", ". A good" * 20000, "a'" * 50000, "none" * 20000, "-" * 100000, "A-" * 50000):
            parse_routing(long, POOL)


def test_selection():
    assert selection("all", NAMES) == [True] * 7
    assert selection("none", NAMES) == selection([], NAMES) == selection((), OFFICIAL) == [False] * 7
    expected = [name in ("dinov2", "sam") for name in NAMES]
    assert selection(["sam", "dinov2"], NAMES) == selection([OFFICIAL[6], "dinov2", "sam"], OFFICIAL) == expected


def test_columns_follow_the_model_not_the_letters():
    prompt = routing_prompt("Q", NAMES, seed=5)
    assert prompt.pool != NAMES
    for name in NAMES:
        assert selection(parse_routing(prompt.answer([name]), prompt.pool), NAMES) == [name == n for n in NAMES]


def test_routing_mask():
    import torch

    mask = routing_mask(["all", ["vary"], "none"], NAMES)
    assert mask.dtype == torch.bool
    assert mask.tolist() == [[True] * 7, [False, True] + [False] * 5, [False] * 7]
    assert routing_mask([], NAMES).shape == (0, 7)


CALLS = {
    "question: empty": (routing_prompt, (" ", NAMES), ValueError, "question must not be empty, got ' '"),
    "question: type": (routing_prompt, (None, NAMES), TypeError, "question must be a string, got None"),
    "prompt: 27": (routing_prompt, ("Q", many(27)), ValueError, "experts must be at most 26, one for each letter"),
    "prompt: unknown": (routing_prompt, ("Q", ["sam", "x"]), ValueError, "name must be a registered expert (dinov2, "),
    "prompt: repeated": (routing_prompt, ("Q", ["sam", "sam"]), ValueError, "experts must not repeat a name, got"),
    "answer: type": (parse_routing, (None, POOL), TypeError, "answer must be a string, got None"),
    "answer: official": (parse_routing_official, (b"A",), TypeError, "answer must be a string, got b'A'"),
    "official: 27": (parse_routing_official, ("A", 27), ValueError, "num_experts must be 1 to 26, got 27"),
    "pool: empty": (parse_routing, ("A", ()), ValueError, "pool must not be empty, got []"),
    "pool: string": (parse_routing, ("A", "abc"), TypeError, "pool must be a list or tuple of names or VisionExperts"),
    "pool: repeated": (parse_routing, ("A", ["x", "x"]), ValueError, "pool must not repeat a name, got ['x', 'x']"),
    "pool: numbers": (parse_routing, ("A", [1]), TypeError, "pool must hold names or VisionExperts, got 1"),
    "pool: 27": (parse_routing, ("A", many(27)), ValueError, "pool must have at most 26 entries, got 27"),
    "select: string": (selection, ("sam", NAMES), ValueError, "experts must be 'all', 'none' or a sequence of"),
    "select: unknown": (selection, (["x"], NAMES), ValueError, "experts must be in the pool (dinov2, vary, codetr, "),
    "select: None": (selection, (None, NAMES), TypeError, "experts must be a sequence of names, got None"),
    "select: row": (selection, ([True], NAMES), TypeError, "experts must hold names or VisionExperts, got True"),
    "mask: string": (routing_mask, ("all", NAMES), TypeError, "selections must be a sequence with one entry for each"),
    "answer: other": (routing_prompt("Q", ["sam"]).answer, (["vary"],), ValueError, "experts must be in the pool (s"),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_bad_call(name):
    call, arguments, kind, message = CALLS[name]
    with pytest.raises(kind, match=re.escape(message)):
        call(*arguments)


OPTIONS = {
    "topk": ({"topk": 0}, ValueError, "topk must be at least 1, got 0"),
    "seed": ({"seed": "x"}, TypeError, "seed must be an int, got 'x'"),
    "template: type": ({"template": 3}, TypeError, "template must be a string, got 3"),
    "template: no pool": ({"template": "{question}"}, ValueError, "template must have {pool}, or list 7 models"),
    "descriptions: type": ({"descriptions": ["x"]}, TypeError, "descriptions must be a mapping, got ['x']"),
    "descriptions: name": ({"descriptions": {"x": "y"}}, ValueError, "descriptions must be for experts of the pool"),
    "descriptions: lines": (
        {"descriptions": {"sam": "a\nb"}},
        ValueError,
        "descriptions['sam'] must be one line of text, got 'a\\nb'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_bad_option(name):
    options, kind, message = OPTIONS[name]
    with pytest.raises(kind, match=re.escape(message)):
        routing_prompt("Q", NAMES, **options)
