"""Operands of PTX instructions: the places of registers and constants in the memory of a warp."""

from __future__ import annotations

import re

from .ptx import Kernel, Statement, Unsupported

NORMAL, BRANCH, BRANCH_INDEXED, EXIT, BARRIER, COLLECTIVE, WAIT = range(7)  # Kind of machine.h
SPECIAL = {
    name: number
    for number, name in enumerate(
        [f"%{kind}.{axis}" for kind in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"] + ["%laneid", "%warpid"]
    )
}


class Instruction:
    """What a statement becomes; the fields are those of ``Instruction`` in machine.h."""

    def __init__(self, statement: Statement) -> None:
        self.line, self.opcode = statement.line, statement.opcode
        self.name, self.kind, self.guard, self.negated = "", NORMAL, -1, False
        self.at: list[int] = []
        self.imm: list[int] = []
        self.list: list[int] = []
        self.uses: list[int] = []
        self.reads: set[int] = set()
        self.writes: set[int] = set()


class Operands:
    """Gives the registers and constants of a kernel their places, and reads the operands of its statements.

    A register takes 32 lanes of its size, a predicate one word. The special registers come first.
    """

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.end = 128 * len(SPECIAL)
        self.places: dict[str, int] = {}
        self.constants: dict[bytes, int] = {}  # what all lanes together hold -> place
        self.symbols = {name: offset for name, (offset, _) in kernel.parameters.items()} | kernel.shared

    def add(self, i: Instruction, tokens: str, *texts: str) -> None:
        """Add the operands that the tokens describe."""
        for token, text in zip(tokens.split(), texts, strict="?" not in tokens):
            self._add(i, token.rstrip("?").lstrip("="), text, token.startswith("="))

    def _add(self, i: Instruction, token: str, text: str, written: bool) -> None:
        if token == "_":
            return
        if token == "mask":
            i.kind = COLLECTIVE if text in ("-1", "0xffffffff") else NORMAL
        elif token == "#":
            i.imm.append(int(text, 0))
        elif token.startswith("["):
            base, offset = base_and_offset(text)
            if not (self.is_register(base) or base in self.symbols or base.isdecimal()):
                raise Unsupported(f"address {text}")
            bits = token[1:-1] or self.register_bits(base, "32")
            i.at.append(self.operand(i, base, bits))
            i.imm.append(offset)
            if token == "[]":
                i.imm.append(int(bits) // 8)
        elif token.endswith("*"):
            for element in text.strip("{}").split(","):
                i.list.append(self.operand(i, element.strip(), token[:-1], written))
        elif "|" in token:
            parts = [*text.split("|"), "_"]
            for kind, part in zip(token.split("|"), parts, strict=False):
                i.at.append(self.operand(i, part.strip(), kind, written))
        else:
            i.at.append(self.operand(i, text, token, written))

    def operand(self, i: Instruction, text: str, bits: str, written: bool = False) -> int:
        """The place of a register of so many bits or, unless it is written, of a constant; -1 for ``_``."""
        bits = "pred" if bits == "p" else bits
        if text == "_":
            return -1
        if self.is_register(text):
            place = self.register(text, bits)
            (i.writes if written else i.reads).add(place)
            return place
        if written:
            raise Unsupported(f"{text} cannot be written")
        if text in SPECIAL:
            if bits != "32":
                raise Unsupported(f"{text} as a number of {bits} bits")
            return 128 * SPECIAL[text]
        return self.constant(text, bits)

    def is_register(self, text: str) -> bool:
        return text not in SPECIAL and (text.startswith("%") or text in self.kernel.registers)

    def register_bits(self, text: str, otherwise: str) -> str:
        """The bits of the register, which may be more than the opcode names."""
        return self.kernel.bits(text) if self.is_register(text) else otherwise

    def register(self, name: str, bits: str) -> int:
        if self.kernel.bits(name) != bits:
            raise Unsupported(f"{name} has {self.kernel.bits(name)} bits where {bits} are meant")
        if name not in self.places:
            self.places[name] = self._room(64 if bits == "pred" else 4 * int(bits))
        return self.places[name]

    def constant(self, text: str, bits: str) -> int:
        if text in self.symbols:
            value = self.symbols[text]
        elif re.fullmatch(r"0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}", text):
            value = int(text[2:], 16)
        elif text == "WARP_SZ":
            value = 32
        else:
            value = int(text.rstrip("U"), 0)
        if bits == "pred":
            lanes = (b"\xff" if value else b"\0") * 4
        else:
            lanes = (value & ((1 << int(bits)) - 1)).to_bytes(int(bits) // 8, "little") * 32
        if lanes not in self.constants:
            self.constants[lanes] = self._room(len(lanes))
        return self.constants[lanes]

    def _room(self, size: int) -> int:
        start = self.end
        self.end += -(-size // 64) * 64
        return start


def base_and_offset(address: str) -> tuple[str, int]:
    """The register or name of ``[base + constant]``, and the constant."""
    m = re.fullmatch(r"\[\s*([%$\w.]+)\s*(?:\+\s*(-?\w+))?\s*\]", address)
    if not m:
        raise Unsupported(f"address {address}")
    return m[1], int(m[2] or "0", 0)


# ---- what needs more than a row of the table
