"""PTX text, taken apart: kernels with their parameters, registers, labels and statements. Opcodes are not looked at."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple


class Unsupported(Exception):
    """PTX that the emulator does not know; the message has the statement and its line."""


class Statement(NamedTuple):
    """An instruction: where it is, its guard ("", "p" or "!p"), opcode and operands as text."""

    line: int
    guard: str
    opcode: str
    operands: tuple[str, ...]


@dataclass
class Kernel:
    """One entry of a PTX file.

    Attributes:
        parameters: name -> (offset, size) in bytes.
        shared: shared arrays: name -> offset; dynamic ones begin at ``shared_bytes``, as on a GPU.
        registers: name, or prefix of a numbered family -> bits, "pred" for predicates.
        labels: name -> index of the statement behind it.
        tables: name -> labels, of indexed branches.
        lines: per PTX line with a ``.loc``: "file:line" of the source.
    """

    name: str
    parameters: dict[str, tuple[int, int]]
    parameter_bytes: int
    shared: dict[str, int]
    shared_bytes: int
    registers: dict[str, str] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)
    tables: dict[str, list[str]] = field(default_factory=dict)
    statements: list[Statement] = field(default_factory=list)
    lines: dict[int, str] = field(default_factory=dict)

    def bits(self, register: str) -> str:
        """ "16", "32", "64" or "pred"."""
        family = register if register in self.registers else register.rstrip("0123456789")
        kind = self.registers.get(family)
        if kind is None:
            raise Unsupported(f"register {register} is not declared")
        return kind

    def source(self, line: int) -> str:
        """ "file:line" of what a PTX line was compiled from, or "?"."""
        before = [at for at in self.lines if at <= line]
        return self.lines[max(before)] if before else "?"


def entries(text: str) -> list[str]:
    """The names of the kernels."""
    return re.findall(r"\.entry\s+([\w$]+)", text)


def parse(text: str, name: str) -> Kernel:
    """The kernel of that name.

    Raises:
        Unsupported: a statement that is no PTX as far as is known here.
    """
    lines = [line.split("//")[0] for line in text.split("\n")]
    depths = list(accumulate((line.count("{") - line.count("}") for line in lines), initial=0))  # before each line
    start = next(n for n, line in enumerate(lines) if re.search(rf"\.entry\s+{re.escape(name)}\b", line))
    opening = next(n for n in range(start, len(lines)) if lines[n].strip() == "{")
    if 0 not in depths[opening + 1 :]:
        raise Unsupported("a kernel without an end")
    body = lines[opening : depths.index(0, opening + 1)]
    outside = [line for line, depth in zip(lines, depths, strict=False) if depth == 0]
    files = {m[1]: m[2].rsplit("/", 1)[-1] for m in re.finditer(r'\.file\s+(\d+)\s+"([^"]*)"', text)}
    kernel = Kernel(name, *_parameters(" ".join(lines[start:opening])), *_shared("\n".join(outside + body)))
    _body(kernel, lines, opening + 1, files)
    return kernel


def split(operands: str) -> tuple[str, ...]:
    """At the commas outside of brackets."""
    parts, depth, start = [], 0, 0
    for at, letter in enumerate(operands):
        depth += (letter in "{[(") - (letter in "}])")
        if letter == "," and depth == 0:
            parts.append(operands[start:at].strip())
            start = at + 1
    last = operands[start:].strip()
    return (*parts, last) if last else tuple(parts)


def _parameters(head: str) -> tuple[dict[str, tuple[int, int]], int]:
    found, end = {}, 0
    inside = head[head.index("(") + 1 : head.rindex(")")] if "(" in head else ""
    for declaration in inside.split(","):
        if not declaration.strip():
            continue
        m = re.match(r"\s*\.param\s+(.*?)([\w$]+)(?:\[(\d+)\])?\s*$", declaration)
        kind = m and re.search(r"\.[busf](8|16|32|64)\b", m[1])
        if not m or not kind:
            raise Unsupported(f"parameter {declaration.strip()}")
        align = re.search(r"\.align\s+(\d+)", m[1]) if m[3] else None  # else it is that of what a pointer points to
        element = int(kind[1]) // 8
        step = int(align[1]) if align else element
        end = -(-end // step) * step
        found[m[2]] = (end, element * int(m[3] or 1))
        end += found[m[2]][1]
    return found, end


def _shared(text: str) -> tuple[dict[str, int], int]:
    declarations = re.findall(r"\.shared\s+\.align\s+(\d+)\s+\.[bfsu](\d+)\s+([\w$]+)(\[\d*\])?", text)
    found, end = {}, 0
    for align, bits, name, count in sorted(declarations, key=lambda d: d[3] == "[]"):  # dynamic arrays are the last
        end = -(-end // int(align)) * int(align)
        found[name] = end
        if count != "[]":
            end += int(bits) // 8 * int(count.strip("[]") or 1)
    return found, end


def _body(kernel: Kernel, lines: list[str], start: int, files: dict[str, str]) -> None:
    # Inline assembly comes in braces of its own, whose labels are local: they get the number of the brace.
    scopes, opened, pending, label = [0], 0, "", ""
    for number in range(start, len(lines)):
        line = lines[number].strip()
        location = re.match(r"\.loc\s+(\d+)\s+(\d+)", line)
        if location:
            kernel.lines[number + 1] = f"{files.get(location[1], '?')}:{location[2]}"
        if not line or re.match(r"\.(loc|pragma|section)\b", line):
            continue
        pending += line + " "
        while True:
            pending = pending.lstrip()
            m = re.match(r"([$\w]+):(?!:)", pending)
            if m:
                label = _scoped(m[1], scopes, kernel)
                kernel.labels[label] = len(kernel.statements)
                pending = pending[m.end() :]
            elif pending[:1] == "{":
                opened += 1
                scopes.append(opened)
                pending = pending[1:]
            elif pending[:1] == "}":
                scopes.pop()
                if not scopes:
                    return
                pending = pending[1:]
            elif ";" in pending:
                statement, pending = pending.split(";", 1)
                _statement(kernel, statement.strip(), number + 1, scopes, label)
            else:
                break


def _scoped(name: str, scopes: list[int], kernel: Kernel) -> str:
    """A label's unique name: those of inline assembly may come again and again."""
    return name if name.startswith("$") or len(scopes) == 1 else f"{name}@{scopes[-1]}"


def _statement(kernel: Kernel, text: str, line: int, scopes: list[int], label: str) -> None:
    if not text:
        return
    if text.startswith(".reg"):
        m = re.match(r"\.reg\s+\.(pred|[bsuf](?:8|16|32|64))\s+(.*)", text, re.S)
        if not m:
            raise Unsupported(f"line {line}: {text}")
        for register in m[2].split(","):
            family = re.match(r"\s*(%?\w+)(?:<\d+>)?\s*$", register)
            if not family:
                raise Unsupported(f"line {line}: {text}")
            kernel.registers[family[1]] = m[1].lstrip("bsuf") if m[1] != "pred" else "pred"
    elif text.startswith(".branchtargets"):
        kernel.tables[label] = [t.strip() for t in text.removeprefix(".branchtargets").split(",")]
    elif text.startswith(".shared"):
        pass  # found in the whole text
    else:
        m = re.match(r"(?:@(!?[%\w]+)\s+)?([a-z][\w.:]*)\s*(.*)$", text, re.S)
        if not m:
            raise Unsupported(f"line {line}: {text}")
        operands = split(m[3])
        if m[2].startswith("bra"):
            operands = tuple(_scoped(o, scopes, kernel) if i == 0 else o for i, o in enumerate(operands))
        kernel.statements.append(Statement(line, m[1] or "", m[2], operands))
