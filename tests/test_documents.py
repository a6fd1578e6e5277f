"""What the documents name exists: ops with their backends, modules and functions, files, commands, variables."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from mova import cli
from mova_kernels import backends

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
DOCUMENTS = {p.name: p.read_text() for p in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"))}
NAME = re.compile(r"(?<![\w./])mova(?:_kernels)?(?:\.[A-Za-z]\w*)+")
# A path with a placeholder, as in ops/<op>, is not looked for.
FILE = re.compile(r"(?<![\w./-])(?:mova|mova_kernels|csrc|tools|tests|docs|benchmarks)/[\w./-]+(?![\w./<*{-])")
COMMAND, MODULE = re.compile(r"(?:^|&& )mova ([a-z]+)"), re.compile(r"python -m (mova\w*)")

each_document = pytest.mark.parametrize("document", sorted(DOCUMENTS))


def table(heading: str) -> dict[str, list[str]]:
    """The rows of the README's table whose first heading is this one: first cell -> the other cells."""
    (rows,) = re.findall(rf"^\| {heading} \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", README, re.MULTILINE)
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows.splitlines()]
    return {first: rest for first, *rest in cells}


def code_spans(document: str) -> list[str]:
    """The texts in backticks, and the lines of code blocks."""
    block = re.compile(r"^```\w*\n(.*?)^```", re.MULTILINE | re.DOTALL)
    lines = [line for text in block.findall(DOCUMENTS[document]) for line in text.splitlines()]
    return re.findall(r"`([^`]+)`", block.sub("", DOCUMENTS[document])) + lines


def exists(dotted: str) -> bool:
    """Whether a dotted name is a module, or an attribute of one."""
    parts = dotted.split(".")
    for n in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:n]))
        except ModuleNotFoundError:
            continue
        for part in parts[n:]:
            found = getattr(found, part, None)
        return found is not None
    return False


def missing(document: str) -> list[str]:
    """Names, files and commands of a document that do not exist."""
    found = []
    for span in code_spans(document):
        found += [name for name in NAME.findall(span) if not exists(name) and not (ROOT / name).exists()]
        found += [path for path in FILE.findall(span) if not (ROOT / path).exists()]
        found += [f"mova {name}" for name in COMMAND.findall(span) if not callable(getattr(cli, name, None))]
        found += [f"python -m {name}" for name in MODULE.findall(span) if not exists(f"{name}.__main__")]
    return found


@each_document
def test_what_a_document_names_exists(document) -> None:
    assert not missing(document)


def test_what_does_not_exist_is_found(monkeypatch) -> None:
    block = "```sh\nmova fly x && mova lie\npython -m mova_x  # tools/no.py\n```\n"
    text = f"`mova.cli.fly` and `mova.cli`\n{block}`csrc/<op>/x`"
    monkeypatch.setitem(DOCUMENTS, "x.md", text)
    assert missing("x.md") == ["mova.cli.fly", "mova fly", "mova lie", "tools/no.py", "python -m mova_x"]


def test_the_readme_has_exactly_the_ops_with_their_backends() -> None:
    rows = table("op")
    assert sorted(rows) == sorted(f"`{op}`" for op in backends.ops())
    for op in backends.ops():
        folder = ROOT / "mova_kernels" / "ops" / op
        built = {p.stem.removesuffix("_impl") for p in folder.glob("*_impl.py")}
        assert set(re.findall(r"`(\w+)`", rows[f"`{op}`"][-1])) == built | {"reference"}, op


def test_the_environment_variables_of_the_readme_are_read_somewhere() -> None:
    code = "".join(p.read_text() for p in (ROOT / "setup.py", *(ROOT / "mova_kernels").rglob("*.py")))
    names = [re.findall(r"`([A-Z][A-Z_]+)", row)[0] for row in table("variable")]
    assert names and not [name for name in names if f'os.environ.get("{name}"' not in code]
