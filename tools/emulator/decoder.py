"""Turns the statements of a PTX kernel into the instructions that the C++ side executes."""

from __future__ import annotations

from .opcodes import rows_of
from .operands import BARRIER, BRANCH, BRANCH_INDEXED, Instruction, Operands
from .ptx import Kernel, Statement, Unsupported


class Decoder(Operands):
    """The ``instructions`` of a kernel, and the places of their registers and constants."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__(kernel)
        self.instructions = [self._decode(statement) for statement in kernel.statements]
        self._move_copies_behind_waits()

    def _decode(self, s: Statement) -> Instruction:
        try:
            for row, m in rows_of(s.opcode):
                if row.takes(len(s.operands)):
                    i = Instruction(s)
                    i.kind = row.kind
                    if s.guard:
                        i.guard, i.negated = self.register(s.guard.lstrip("!"), "pred"), s.guard.startswith("!")
                    if callable(row.function):
                        row.function(self, i, s, m)
                    else:
                        groups = [group or "" for group in m.groups()]
                        i.name = row.function.format(*groups)
                        self.add(i, row.operands.format(*groups), *s.operands)
                    return i
            raise Unsupported("unknown form")
        except (Unsupported, ValueError, KeyError, IndexError) as error:
            statement = f"{s.opcode} {', '.join(s.operands)}"
            raise Unsupported(f"line {s.line}: {statement}: {error}") from error

    def _move_copies_behind_waits(self) -> None:
        """Copies of accumulators between a product and its wait take place behind the wait.

        Triton 3.6 emits them; ptxas adds a wait before them and says so (C7517).
        """
        used = {register for i in self.instructions for register in i.uses}
        targets, start = set(self.kernel.labels.values()), 0
        for end, i in enumerate(self.instructions):
            if end in targets:
                start = end
            if i.name == "wgmma.wait":
                before, late = [], []
                read: set[int] = set()
                written: set[int] = set()
                for other in reversed(self.instructions[start:end]):
                    copies = other.name == "mov.32" and other.guard < 0 and other.reads & used
                    if copies and not other.writes & (read | written) and not other.reads & written:
                        late.append(other)
                    else:
                        before.append(other)
                        read |= other.reads
                        written |= other.writes
                self.instructions[start : end + 1] = [*before[::-1], i, *late[::-1]]
            if i.name.startswith("wgmma.") or i.kind in (BRANCH, BRANCH_INDEXED, BARRIER):
                start = end + 1
