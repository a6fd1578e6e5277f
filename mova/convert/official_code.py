"""Read the official texts from a copy of the official code, which is parsed and never run."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from .._checks import check

# The longest text: a few statements could double a text again and again.
_LONGEST = 100_000
_Value = str | int | list
# Special tokens, as in <|start|>system<|end|>, with the white space after them.
_SPECIAL = re.compile(r"(?:<\|\w+\|>(?:system)?\s*)*")


def official_template(path: str | Path) -> str:
    """Read the official wording of the routing prompt, a template for :func:`mova.routing_prompt`.

    The file may hold assignments of strings, ints, lists and names, ``+`` between strings, subscripts, and loops over
    ``range(len(NAME))`` that make such assignments. They are evaluated here; no code of the file is executed.

    Args:
        path: the checkout of TempleX98/MoVA, or its ``mova/constants.py``.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a Python file, it holds other statements, or ROUTING_PROMPT is not a string in it.
    """
    names: dict[str, _Value] = {}
    path, body = _parse(path, "constants.py")
    try:
        _run(body, names)
    except (_RefusedError, RecursionError) as error:
        raise ValueError(
            f"path must hold only assignments of texts and lists and loops over them, got {str(path)!r} ({error})"
        ) from None
    text = names.get("ROUTING_PROMPT")
    check(isinstance(text, str), "path", "must assign a string to ROUTING_PROMPT", str(path))
    return text  # type: ignore[return-value]


def official_system_prompt(path: str | Path, name: str = "conv_mova_llama3") -> str:
    """Read the text of the system turn of an official conversation template.

    The special tokens and the role before it are left out: they belong to the chat template of the tokenizer.

    Args:
        path: the checkout of TempleX98/MoVA, or its ``mova/conversation.py``.
        name: the variable that holds the template.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a Python file, or does not assign ``Conversation(system=...)``, with a string literal, to
            ``name``.
    """
    path, body = _parse(path, "conversation.py")
    text = None
    for node in body:
        match node:
            case ast.Assign([ast.Name(target)], ast.Call(ast.Name("Conversation"), keywords=keywords)) if (
                target == name
            ):
                text = next((k.value for k in keywords if k.arg == "system"), None)
    is_text = isinstance(text, ast.Constant) and isinstance(text.value, str)
    check(is_text, "path", f"must assign Conversation(system=...) with a string literal to {name}", str(path))
    return _SPECIAL.sub("", text.value, count=1)  # type: ignore[union-attr]


def _parse(path: str | Path, file: str) -> tuple[Path, list[ast.stmt]]:
    path = Path(path)
    if path.is_dir():
        path = path / "mova" / file
    content = path.read_bytes()
    try:
        return path, ast.parse(content).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"path must be Python that can be parsed, got {str(path)!r} ({error})") from error


class _RefusedError(Exception):
    """The file holds a node that is not evaluated."""


def _refused(node: ast.stmt | ast.expr) -> _RefusedError:
    return _RefusedError(f"line {node.lineno} has another {type(node).__name__}")


def _run(body: list[ast.stmt], names: dict[str, _Value], in_loop: bool = False) -> None:
    for node in body:
        match node:
            case ast.Assign([ast.Name(target)], value):
                names[target] = _evaluate(value, names)
            case ast.For(ast.Name(target), ast.Call(ast.Name("range"), [length], []), inner, []) if not in_loop:
                for i in range(_length(length, names)):
                    names[target] = i
                    _run(inner, names, in_loop=True)
            case _:
                raise _refused(node)


def _length(node: ast.expr, names: dict[str, _Value]) -> int:
    match node:
        case ast.Call(ast.Name("len"), [ast.Name() as name], []):
            value = _evaluate(name, names)
            if isinstance(value, list):
                return len(value)
    raise _refused(node)


def _evaluate(node: ast.expr, names: dict[str, _Value]) -> _Value:
    match node:
        case ast.Constant(str() | int() as value):
            return value
        case ast.UnaryOp(ast.USub(), ast.Constant(int() as value)):
            return -value
        case ast.Name(name) if name in names:
            return names[name]
        case ast.List(items):
            return [_evaluate(item, names) for item in items]
        case ast.BinOp(first, ast.Add(), second):
            left, right = _evaluate(first, names), _evaluate(second, names)
            if isinstance(left, str) and isinstance(right, str) and len(left) + len(right) <= _LONGEST:
                return left + right
        case ast.Subscript(of, at):
            values, index = _evaluate(of, names), _evaluate(at, names)
            if isinstance(values, list) and isinstance(index, int) and -len(values) <= index < len(values):
                return values[index]
    raise _refused(node)
