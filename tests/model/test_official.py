"""The official texts are read from files of the same build as the official ones; hostile files are refused, not run."""

from __future__ import annotations

import re

import pytest

from mova import official_system_prompt, official_template, routing_prompt
from mova.experts import OFFICIAL

HELPS = [f"Helps with task {i}." for i in range(7)]
BUILT = f"""\
SECONDS = 30
NOTHING = -100
OTHER = '''
Not this one.'''

text = "Pick some.\\nChoices:"

helpers = [
    {", ".join(map(repr, HELPS))},
]
marks = ["A", "B", "C", "D", "E", "F", "G"]

for i in range(len(helpers)):
    text = text + "\\n" + marks[i] + ". " + helpers[i]
ROUTING_PROMPT = text + "\\n\\nAsked:\\n"
"""
WORDS = (
    "Pick some.\nChoices:"
    + "".join(f"\n{mark}. {line}" for mark, line in zip("ABCDEFG", HELPS, strict=True))
    + "\n\nAsked:\n"
)


def constants(tmp_path, content):
    file = tmp_path / "mova" / "constants.py"
    file.parent.mkdir()
    file.write_text(content, encoding="utf-8")
    return file


@pytest.mark.parametrize("content", [BUILT, f"ROUTING_PROMPT = {WORDS!r}", f"ROUTING_PROMPT = 'old'\n{BUILT}"])
def test_wording(content, tmp_path):
    file = constants(tmp_path, content)
    names = {}
    exec(content, names)
    for path in (tmp_path, file, str(file)):
        template = official_template(path)
        assert template == names["ROUTING_PROMPT"] == WORDS
    prompt = routing_prompt("Why?\n", OFFICIAL, template=template)
    assert prompt.text == WORDS + "Why?\n" and prompt.pool == tuple(e.name for e in OFFICIAL)


RUNS = "open('ran', 'w').close()"
LETTERS = "a = ['x', 'y']\n"
REFUSED = {
    "import": ("import os\nROUTING_PROMPT = 'x'", "line 1 has another Import"),
    "system": ("ROUTING_PROMPT = 'x'\n__import__('os').system('touch ran')", "line 2 has another Expr"),
    "call": (f"x = {RUNS}\nROUTING_PROMPT = 'x'", "line 1 has another Call"),
    "call in a list": (f"ROUTING_PROMPT = [{RUNS}, 'x'][1]", "another Call"),
    "call in a loop": (
        f"{LETTERS}for i in range(len(a)):\n    {RUNS}\nROUTING_PROMPT = 'x'",
        "line 3 has another Expr",
    ),
    "call in a subscript": (f"{LETTERS}ROUTING_PROMPT = a[{RUNS}]", "another Call"),
    "default": (f"def f(x={RUNS}): pass\nROUTING_PROMPT = 'x'", "another FunctionDef"),
    "annotation": (f"ROUTING_PROMPT: {RUNS} = 'x'", "another AnnAssign"),
    "walrus": ("ROUTING_PROMPT = (x := 'x')", "another NamedExpr"),
    "format": ("x = 'y'\nROUTING_PROMPT = f'{x}'", "another JoinedStr"),
    "comprehension": (f"{LETTERS}ROUTING_PROMPT = [x for x in a][0]", "another ListComp"),
    "long loop": ("for i in range(10**9):\n    x = 'y'\nROUTING_PROMPT = 'x'", "another BinOp"),
    "long literal loop": ("for i in range(1000000000):\n    x = 'y'\nROUTING_PROMPT = 'x'", "another Constant"),
    "endless": ("while True:\n    x = 'y'", "another While"),
    "loop in a loop": (
        f"{LETTERS}for i in range(len(a)):\n    for j in range(len(a)):\n        x = a[j]",
        "line 3 has another For",
    ),
    "loop over a list": (f"{LETTERS}for x in a:\n    y = x", "line 2 has another For"),
    "loop over a text": ("a = 'xy'\nfor i in range(len(a)):\n    x = 'y'", "line 2 has another Call"),
    "else": (f"{LETTERS}for i in range(len(a)):\n    x = 'y'\nelse:\n    x = 'z'", "another For"),
    "condition": ("x = 'x'\nif x:\n    x = 'y'\nROUTING_PROMPT = x", "line 2 has another If"),
    "mutation": (f"{LETTERS}a[0] = 'z'\nROUTING_PROMPT = a[0]", "line 2 has another Assign"),
    "method": (f"{LETTERS}a.append('z')\nROUTING_PROMPT = a[0]", "line 2 has another Expr"),
    "two targets": ("a = b = 'x'", "another Assign"),
    "unpacking": ("a, b = ['x', 'y']", "another Assign"),
    "multiplied": ("ROUTING_PROMPT = 'x' * 10**9", "another BinOp"),
    "doubled": ("a = 'xxxxxxxxxx'\n" + "a = a + a\n" * 60, "another BinOp"),
    "number added": ("ROUTING_PROMPT = 'x' + 1", "another BinOp"),
    "beyond the end": (f"{LETTERS}ROUTING_PROMPT = a[2]", "another Subscript"),
    "unknown name": ("ROUTING_PROMPT = x", "line 1 has another Name"),
    "deep": ("ROUTING_PROMPT = " + "'x' + " * 3000 + "'x'", "path must"),
    "bytes": ("ROUTING_PROMPT = b'x'", "another Constant"),
    "nothing": ("OTHER = 'x'\n", "path must assign a string to ROUTING_PROMPT, got"),
    "number": ("ROUTING_PROMPT = 3\n", "path must assign a string to ROUTING_PROMPT, got"),
    "list": ("ROUTING_PROMPT = ['x']\n", "path must assign a string to ROUTING_PROMPT, got"),
    "no Python": ("A thing", "path must be Python that can be parsed, got"),
    "zero byte": ("x = 'a\0'", "path must be Python that can be parsed, got"),
    "brackets": ("x = " + "[" * 500, "path must be Python that can be parsed, got"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_and_not_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, message = REFUSED[name]
    file = constants(tmp_path, content)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        official_template(file)
    assert str(error.value).startswith("path must") and str(file) in str(error.value)
    assert not (tmp_path / "ran").exists()


def test_missing_file(tmp_path):
    for read in (official_template, official_system_prompt):
        with pytest.raises(FileNotFoundError):
            read(tmp_path)


CONVERSATION = """\
import nowhere
class Conversation: ...
raise SystemExit
conv_plain = Conversation(system="You answer. " "Well.", roles=("a", "b"))
conv_mova_llama3 = Conversation(
    system=\"\"\"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\\n\\nYou see <|this|>.\"\"\",
    version="x",
)
conv_ml = Conversation(system='''<|im_start|>system
You help.''')
conv_empty = Conversation(system="")
conv_none = Conversation(roles=())
conv_call = Conversation(system=open("ran", "w").name)
conv_other = Other(system="x")
"""


def test_system_prompt(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "mova" / "conversation.py"
    file.parent.mkdir()
    file.write_text(CONVERSATION)
    assert official_system_prompt(tmp_path) == official_system_prompt(str(file)) == "You see <|this|>."
    assert official_system_prompt(file, "conv_plain") == "You answer. Well."
    assert official_system_prompt(file, "conv_ml") == "You help."
    assert official_system_prompt(file, "conv_empty") == ""
    for name in ("conv_none", "conv_call", "conv_other", "conv_absent"):
        message = f"path must assign Conversation(system=...) with a string literal to {name}, got {str(file)!r}"
        with pytest.raises(ValueError, match=re.escape(message)):
            official_system_prompt(file, name)
    assert not (tmp_path / "ran").exists()
