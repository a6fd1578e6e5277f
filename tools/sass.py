"""The inner loop of a kernel in SASS, the GPU's own instructions."""

from __future__ import annotations

import re

INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/ +(@\S+)? *([A-Z][\w.]*)(.*?);", re.MULTILINE)


def loop_instructions(sass: str) -> int:
    """How many instructions the inner loop of a kernel has; 0 if there is no loop.

    The inner loop is the loop with the most arithmetic (instructions named *MMA* or *FMA*) and, among equals, the most
    instructions.

    Args:
        sass: the output of ``cuobjdump -sass`` for one kernel.
    """

    def size(loop: list[tuple[str, str, str, str]]) -> tuple[int, int]:
        return sum(bool(re.search("MMA|FMA", name)) for _, _, name, _ in loop), len(loop)

    return len(max(loops(sass), key=size, default=[]))


def loops(sass: str) -> list[list[tuple[str, str, str, str]]]:
    """The instructions of each loop of a kernel: address, predicate, name, operands.

    All instructions of its natural loop in the control flow count, unrolled as the compiler did it. This includes parts
    that the compiler moved away and parts that not every iteration runs. Loops inside it, such as waits at barriers, do
    not count.
    """
    code = INSTRUCTION.findall(sass)
    after = _successors(code)
    before: list[list[int]] = [[] for _ in code]
    for i, successors in enumerate(after):
        for j in successors:
            before[j].append(i)

    found: dict[int, set[int]] = {}  # by their first instruction
    for last, first in _back_edges(after):
        body, todo = found.setdefault(first, {first}), [last]
        while todo:
            if (i := todo.pop()) not in body:
                body.add(i)
                todo += before[i]
    own = [body.difference(*(found[i] for i in body if i in found and i != first)) for first, body in found.items()]
    return [[code[i] for i in sorted(body)] for body in own]


def _successors(code: list[tuple[str, str, str, str]]) -> list[list[int]]:
    """For each instruction the places of those that can follow it. Calls return; targets of jump tables are unknown."""
    place = {int(address, 16): i for i, (address, *_) in enumerate(code)}
    answer = []
    for i, (_, predicate, name, operands) in enumerate(code):
        name = name.split(".")[0]
        jumps = name in ("BRA", "JMP")
        targets = [place[t] for h in re.findall(r"0x([0-9a-f]+)", operands) if (t := int(h, 16)) in place and jumps]
        conditional = predicate or (jumps and "," in operands)  # BRA.U UP0, 0x190
        falls_through = conditional or not (jumps or name in ("EXIT", "RET", "BRX", "JMX"))
        answer.append(targets + [i + 1] * (falls_through and i + 1 < len(code)))
    return answer


def _back_edges(after: list[list[int]]) -> list[tuple[int, int]]:
    """The edges to instructions that a depth-first walk from the first one has entered and not left yet."""
    found, entered, path, todo = [], {0}, {0}, [(0, iter(after[0]))]
    while todo:
        i, rest = todo[-1]
        for j in rest:
            if j in path:
                found.append((i, j))
            elif j not in entered:
                entered.add(j)
                path.add(j)
                todo.append((j, iter(after[j])))
                break
        else:
            path.remove(i)
            todo.pop()
    return found
