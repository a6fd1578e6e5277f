"""PTX opcodes: one table from their forms to the functions of the C++ side and the operands that these take.

A form that is not in :data:`TABLE` is refused. A row has a regular expression for the whole opcode; the name of the C++
function, in which ``{0}`` is the expression's first group; the operands; and how the instruction is executed. Operands,
in their order:

``32``        a register of so many bits, or a constant (``16``, ``32``, ``64``); ``p``: a predicate
``=32``       a register that is written
``=32|p``     two results, of which the second may be missing
``[32]``      an address in shared memory: a register or a name, and a constant that is added to it; ``[64]``: global
``[]``        an address of 32 or 64 bits
``32*``       a vector of registers, or one; ``=32*``: they are written
``#``         a constant
``mask``      of the lanes that take part, usually all
``_``         nothing that matters here
``32?``       may be missing

A row may have a Python function instead, for what this cannot say.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import NamedTuple

from .operands import (
    BARRIER,
    BRANCH,
    BRANCH_INDEXED,
    COLLECTIVE,
    EXIT,
    NORMAL,
    WAIT,
    Instruction,
    Operands,
)
from .ptx import Statement, Unsupported


def _branch(d: Operands, i: Instruction, s: Statement, m: re.Match) -> None:
    i.list = [d.kernel.labels[s.operands[0]]]


def _branch_indexed(d: Operands, i: Instruction, s: Statement, m: re.Match) -> None:
    d.add(i, "32", s.operands[0])
    i.list = [d.kernel.labels[label] for label in d.kernel.tables[s.operands[1]]]


def _move(d: Operands, i: Instruction, s: Statement, m: re.Match) -> None:
    """mov, also between a register and a vector of smaller ones."""
    bits, (to, source) = m[1], s.operands
    for name, vector, whole in (("unpack", to, source), ("pack", source, to)):
        if vector.startswith("{"):
            part = int(bits) // len(vector.split(","))
            i.name = f"{name}.{bits}.{part}"
            d.add(i, f"={bits} {part}*" if name == "pack" else f"{bits} ={part}*", whole, vector)
            return
    i.name = f"mov.{bits}"
    d.add(i, f"={bits} {bits}", to, source)


def _convert_integer(d: Operands, i: Instruction, s: Statement, m: re.Match) -> None:
    """Registers may be wider than integers: the low bits count, and the result is extended."""
    to, source = s.operands
    to_bits = d.register_bits(to, m[1][1:])
    from_bits = d.register_bits(source, max("16", m[2][1:], key=int))
    i.name = f"cvt.{m[1]}.{to_bits}.{m[2]}.{from_bits}"
    d.add(i, f"={to_bits} {from_bits}", to, source)


def _load_or_store(d: Operands, i: Instruction, s: Statement, m: re.Match) -> None:
    """at[0]: address; imm: what is added to it, bytes of its register; list: the registers of the data."""
    store, space, kind, bits = m["op"] == "st", m["space"], m["kind"], m["bits"]
    address, data = s.operands if store else (s.operands[1], s.operands[0])  # a cache policy may follow
    d.add(i, "[]", address)
    elements = [element.strip() for element in data.strip("{}").split(",")]
    widths = {d.kernel.bits(e) for e in elements if d.is_register(e)} or {max(bits, "16", key=int)}
    if len(widths) != 1:
        raise Unsupported("registers of several sizes")
    (register,) = widths
    i.list = [d.operand(i, e, register, written=not store) for e in elements]
    sign = "s" if kind == "s" and not store else "u"
    i.name = f"{m['op']}.{space}.{sign}{bits}.{register}"


def _atomic(d: Operands, i: Instruction, s: Statement, m: re.Match) -> None:
    """at: address, value, second value or -1; imm as in _load_or_store; list: the register of the old value."""
    operands = list(s.operands)
    result = operands.pop(0) if m["op"] == "atom" else "_"
    d.add(i, "[]", operands[0])
    for value in operands[1:]:
        i.at.append(d.operand(i, value, m["bits"]))
    i.list = [d.operand(i, result, m["bits"], written=True)]
    signed = m["what"] in ("min", "max") or m["kind"] == "f"
    i.name = f"atom.{m['space']}.{m['what']}.{m['kind'] if signed else ''}{m['bits']}"


def _matrix(d: Operands, i: Instruction, s: Statement, m: re.Match) -> None:
    """at[0]: address; imm: offset, whether transposed; list: a register for each matrix."""
    d.add(i, "=32* [32]" if m[1] == "ld" else "[32] 32*", *s.operands)
    i.imm.append(int(m[2] is not None))
    i.name = f"{m[1]}matrix"


def _wgmma(d: Operands, i: Instruction, s: Statement, m: re.Match) -> None:
    """at: A's descriptor or -1, B's, predicate; imm: N, whether A and B are transposed; list: D, and A's registers."""
    columns, kind = int(m[1]), m[2]
    d.add(i, "=32*", s.operands[0])
    in_registers = s.operands[1].startswith("{")
    if in_registers:
        d.add(i, "32*", s.operands[1])
        i.at.append(-1)
    else:
        d.add(i, "64", s.operands[1])
    d.add(i, "64 p", *s.operands[2:4])
    scale_a, scale_b, *transposed = (int(x) for x in s.operands[4:])
    if (scale_a, scale_b) != (1, 1):
        raise Unsupported("negated operands")
    if in_registers:
        transposed = [0, *transposed]
    i.imm = [columns, *transposed, *[0] * (2 - len(transposed))]
    i.name, i.uses = f"wgmma.{kind}", list(i.list)
    i.reads.clear()  # the rules for ``uses`` are others
    i.writes.clear()


def _mbarrier_arrive(d: Operands, i: Instruction, s: Statement, m: re.Match) -> None:
    """at: address, arrivals or -1: one, expected bytes or -1."""
    # The state that it returns is for waits without a parity, which are unknown here.
    d.add(i, "[32]", s.operands[1])
    third = d.operand(i, s.operands[2], "32") if len(s.operands) > 2 else -1
    i.at += [-1, third] if m[1] else [third, -1]
    i.name = "mbarrier.arrive"


def _bulk(d: Operands, i: Instruction, s: Statement, m: re.Match) -> None:
    """at: shared address, global address or map, mbarrier or -1, bytes or -1; list: coordinates of the map."""
    load = m["from"] == "global"
    operands = list(s.operands)
    outside = operands[1] if load else operands[0]
    inside = operands[0] if load else operands[1]
    d.add(i, "[32]", inside)
    if m["tensor"]:
        tensor = re.fullmatch(r"\[(.+?),\s*(\{.*\})\s*\]", outside)
        if not tensor:
            raise Unsupported(f"address {outside}")
        d.add(i, "[64]", f"[{tensor[1]}]")
        d.add(i, "32*", tensor[2])
        size = -1
    else:
        d.add(i, "[64]", outside)
        size = d.operand(i, operands[2], "32")
    if load:
        d.add(i, "[32]", operands[2 if m["tensor"] else 3])
    else:
        i.at.append(-1)
    i.at.append(size)
    i.name = "bulk.load" if load else "bulk.store"


_TENSOR_MAP_FIELDS = (
    "global_address", "rank", "box_dim", "global_dim", "global_stride", "element_stride", "elemtype",
    "interleave_layout", "swizzle_mode", "fill_mode",
)  # fmt: skip


def _tensor_map_field(d: Operands, i: Instruction, s: Statement, m: re.Match) -> None:
    """at: address, value; imm: offset, bytes of both, which field, and of which dimension."""
    dimension = int(s.operands[1], 0) if len(s.operands) == 3 else 0
    d.add(i, f"[] {m[2]}", s.operands[0], s.operands[-1])
    i.imm += [int(m[2]) // 8, _TENSOR_MAP_FIELDS.index(m[1]), dimension]
    i.name = "tensormap.replace"


def _tensor_map_copy(d: Operands, i: Instruction, s: Statement, m: re.Match) -> None:
    """at: to, from; imm: their offsets, bytes of the latter's register."""
    if int(s.operands[2], 0) != 128:
        raise Unsupported("a tensor map has 128 bytes")
    d.add(i, "[64] []", *s.operands[:2])
    i.name = "tensormap.copy"


def _bulk_wait(d: Operands, i: Instruction, s: Statement, m: re.Match) -> None:
    """imm: groups that may be left, whether it waits for the reads alone."""
    i.name, i.imm = "bulk.wait", [int(s.operands[0], 0), int(m[1] is not None)]


def _tensor_move(d: Operands, i: Instruction, s: Statement, m: re.Match) -> None:
    """at[0]: address; imm: offset, whether it stores, columns between the halves or -1; list: registers."""
    store = m[1] == "st"
    operands = list(s.operands)
    d.add(i, "[32]", operands.pop(0 if store else 1))
    split = int(operands.pop(0 if store else 1), 0) if m[2] == "16x32bx2" else -1
    d.add(i, "32*" if store else "=32*", operands[0])
    i.imm += [int(store), split]
    i.name = "tcgen05.move"


def _tensor_mma(d: Operands, i: Instruction, s: Statement, m: re.Match) -> None:
    """at: D, A in tensor memory or -1, A's descriptor or -1, B's, its description, predicate; imm: offsets, tf32."""
    d.add(i, "[32]", s.operands[0])
    if s.operands[1].startswith("["):
        d.add(i, "[32]", s.operands[1])
        i.at.append(-1)
    else:
        i.at += [-1, d.operand(i, s.operands[1], "64")]
        i.imm.append(0)
    d.add(i, "64 32 p", *s.operands[2:5])
    i.imm.append(int(m[1] == "tf32"))
    i.name = "tcgen05.mma"


class Row(NamedTuple):
    pattern: re.Pattern
    function: str | Callable[[Operands, Instruction, Statement, re.Match], None]
    operands: str
    kind: int

    def takes(self, count: int) -> bool:
        """Whether the form can have so many operands."""
        if callable(self.function):
            return True
        tokens = self.operands.split()
        return len(tokens) - sum(token.endswith("?") for token in tokens) <= count <= len(tokens)


_SIZE = "(16|32|64)"
_INTEGER = "[su](?:8|16|32|64)"
_SPACE = r"(?P<space>global|shared|param)(?:::cta|::cluster|::entry)?"
_HINTS = r"(?:\.(?:weak|relaxed|acquire|release|volatile|cta|gpu|sys|cluster|nc|ca|cg|cs|cv|wb|wt|lu|L1::\w+|L2::\w+))*"
_CTA = "(?:::cta|::cluster)?"

TABLE = [
    # integers
    (rf"(add|sub)\.[bsu]{_SIZE}", "{0}.{1}", "={1} {1} {1}"),
    (rf"(and|or|xor)\.b{_SIZE}", "{0}.{1}", "={1} {1} {1}"),
    (rf"(not|neg)\.[bs]{_SIZE}", "{0}.{1}", "={1} {1}"),
    (rf"abs\.s{_SIZE}", "abs.s{0}", "={0} {0}"),
    (rf"mul\.lo\.[su]{_SIZE}", "mul.lo.{0}", "={0} {0} {0}"),
    (rf"mad\.lo\.[su]{_SIZE}", "mad.lo.{0}", "={0} {0} {0} {0}"),
    (rf"mul\.hi\.([su]){_SIZE}", "mul.hi.{0}{1}", "={1} {1} {1}"),
    (r"mul\.wide\.([su])16", "mul.wide.{0}16", "=32 16 16"),
    (r"mul\.wide\.([su])32", "mul.wide.{0}32", "=64 32 32"),
    (r"mad\.wide\.([su])16", "mad.wide.{0}16", "=32 16 16 32"),
    (r"mad\.wide\.([su])32", "mad.wide.{0}32", "=64 32 32 64"),
    (rf"(min|max|div|rem)\.([su]){_SIZE}", "{0}.{1}{2}", "={2} {2} {2}"),
    (rf"shl\.b{_SIZE}", "shl.{0}", "={0} {0} 32"),
    (rf"shr\.([su]){_SIZE}", "shr.{0}{1}", "={1} {1} 32"),
    (rf"shr\.b{_SIZE}", "shr.u{0}", "={0} {0} 32"),
    (r"bfe\.([su])32", "bfe.{0}32", "=32 32 32 32"),
    (r"bfi\.b32", "bfi", "=32 32 32 32 32"),
    (r"lop3\.b32", "lop3", "=32 32 32 32 #"),
    (r"(popc|clz|brev)\.b32", "{0}.32", "=32 32"),
    (r"popc\.b64", "popc.64", "=32 64"),
    (r"prmt\.b32", "prmt.32", "=32 32 32 32"),
    (r"shf\.([lr])\.wrap\.b32", "shf.{0}.wrap", "=32 32 32 32"),
    (r"(add|sub)\.[su]16x2", "{0}.16x2", "=32 32 32"),
    # floating point numbers
    (r"(add|sub|mul)(?:\.rn)?(\.ftz)?\.f32", "{0}{1}.f32", "=32 32 32"),
    (r"(add|sub|mul|div)(?:\.rn)?\.f64", "{0}.f64", "=64 64 64"),
    (r"div(?:\.full|\.rn|\.approx)(\.ftz)?\.f32", "div{0}.f32", "=32 32 32"),
    (r"fma\.rn(\.ftz)?\.f32", "fma{0}.f32", "=32 32 32 32"),
    (r"fma\.rn\.f64", "fma.f64", "=64 64 64 64"),
    (r"(sqrt|rsqrt|rcp)(?:\.rn|\.approx)(\.ftz)?\.f32", "{0}{1}.f32", "=32 32"),
    (r"(sqrt|rsqrt|rcp)(?:\.rn|\.approx)(?:\.ftz)?\.f64", "{0}.f64", "=64 64"),
    (r"(neg|abs)(\.ftz)?\.f32", "{0}{1}.f32", "=32 32"),
    (r"(neg|abs)\.f64", "{0}.f64", "=64 64"),
    (r"(ex2|lg2)\.approx(\.ftz)?\.f32", "{0}{1}.f32", "=32 32"),
    (r"(sin|cos)\.approx(\.ftz)?\.f32", "{0}{1}.f32", "=32 32"),
    (r"tanh\.approx\.f32", "tanh.f32", "=32 32"),
    (r"(min|max)(\.ftz)?(\.NaN)?\.f32", "{0}{2}{1}.f32", "=32 32 32"),
    (r"(min|max)(\.ftz)?\.f32", "{0}3{1}.f32", "=32 32 32 32"),
    (r"(min|max)\.f64", "{0}.f64", "=64 64 64"),
    (r"(add|sub|mul|min|max)(?:\.rn)?\.(bf16|f16)", "{0}.{1}", "=16 16 16"),
    (r"(add|sub|mul|min|max)(?:\.rn)?\.(bf16|f16)x2", "{0}.{1}x2", "=32 32 32"),
    (r"fma\.rn\.(bf16|f16)", "fma.{0}", "=16 16 16 16"),
    (r"fma\.rn\.(bf16|f16)x2", "fma.{0}x2", "=32 32 32 32"),
    (r"(neg|abs)\.(bf16|f16)", "{0}.{1}", "=16 16"),
    (r"(neg|abs)\.(bf16|f16)x2", "{0}.{1}x2", "=32 32"),
    (r"(add|sub)(?:\.rn)?\.f32\.(bf16|f16)", "{0}.f32.{1}", "=32 16 32"),
    (r"fma\.rn\.f32\.(bf16|f16)", "fma.f32.{0}", "=32 16 16 32"),
    (r"(add|sub|mul)(?:\.rn)?\.f32x2", "{0}.f32x2", "=64 64 64"),
    (r"fma\.rn\.f32x2", "fma.f32x2", "=64 64 64 64"),
    # comparisons and predicates
    (rf"setp\.(eq|ne)\.b{_SIZE}", "setp.{0}.u{1}", "=p {1} {1}"),
    (rf"setp\.(eq|ne|lt|le|gt|ge)\.([su]){_SIZE}", "setp.{0}.{1}{2}", "=p {2} {2}"),
    *[
        (rf"setp\.{u}\.u{_SIZE}", f"setp.{s}.u{{0}}", "=p {0} {0}")
        for u, s in zip(("lo", "ls", "hi", "hs"), ("lt", "le", "gt", "ge"), strict=True)
    ],
    (r"setp\.(\w+)(\.ftz)?\.f32", "setp.{0}{1}.f32", "=p 32 32"),
    (r"setp\.(\w+)\.f64", "setp.{0}.f64", "=p 64 64"),
    (r"setp\.(\w+)\.(bf16|f16)", "setp.{0}.{1}", "=p 16 16"),
    (r"setp\.num\.(bf16|f16)x2", "setp.num.{0}x2", "=p|p 32 32"),
    (rf"selp\.[bsuf]{_SIZE}", "selp.{0}", "={0} {0} {0} p"),
    (r"(and|or|xor)\.pred", "{0}.pred", "=p p p"),
    (r"(mov|not)\.pred", "{0}.pred", "=p p"),
    # moves and conversions
    (rf"mov\.[bsuf]{_SIZE}", _move, ""),
    (r"cvta(?:\.to)?\.(?:global|shared|param)\.u64", "mov.64", "=64 64"),
    (rf"cvt\.({_INTEGER})\.({_INTEGER})", _convert_integer, ""),
    (rf"cvt\.rn\.(f32|f64)\.({_INTEGER})", _convert_integer, ""),
    (r"cvt\.(rzi|rmi|rpi|rni)(\.ftz)?(?:\.sat)?\.([su])(32|64)\.f32", "cvt.{0}{1}.{2}{3}.f32", "={3} 32"),
    (r"cvt\.(rzi|rmi|rpi|rni)(?:\.sat)?\.([su])(32|64)\.f64", "cvt.{0}.{1}{2}.f64", "={2} 64"),
    (r"cvt\.(rzi|rmi|rpi|rni)(\.ftz)?\.f32\.f32", "cvt.{0}{1}.f32.f32", "=32 32"),
    (r"cvt\.sat(\.ftz)?\.f32\.f32", "cvt.sat.f32{0}.f32", "=32 32"),
    (r"cvt\.rn\.(bf16|f16)\.f32", "cvt.{0}.f32", "=16 32"),
    (r"cvt\.rn\.(bf16|f16)x2\.f32", "cvt.{0}x2.f32", "=32 32 32"),
    (r"cvt\.f(32|64)\.(bf16|f16)", "cvt.f{0}.{1}", "={0} 16"),
    (r"cvt\.rna\.tf32\.f32", "cvt.tf32.f32", "=32 32"),
    (r"cvt\.f64\.f32", "cvt.f64.f32", "=64 32"),
    (r"cvt\.rn\.f32\.f64", "cvt.f32.f64", "=32 64"),
    # memory
    (
        rf"(?P<op>ld|st){_HINTS}\.{_SPACE}{_HINTS}(?:\.v[248])?\.(?P<kind>[bsuf])(?P<bits>8|16|32|64)",
        _load_or_store,
        "",
    ),
    (
        rf"(?P<op>atom|red){_HINTS}\.(?P<space>global|shared)(?:::cta)?{_HINTS}\.(?P<what>add|and|or|xor|exch|cas|min|max)"
        r"\.(?P<kind>[bsuf])(?P<bits>32|64)",
        _atomic,
        "",
    ),
    (
        r"(?:fence(?!\.(?:proxy|mbarrier))|membar|prefetch|createpolicy|griddepcontrol|setmaxnreg|discard|applypriority)\b.*",
        "nop",
        "_? _? _? _?",
    ),
    (r"fence\.mbarrier_init\.release\.cluster", "fence.mbarrier_init", ""),
    (r"fence\.proxy\.tensormap.*", "nop", "_? _? _?"),
    (rf"fence\.proxy\.async(?:\.shared{_CTA})?", "fence.proxy.async", ""),
    (r"fence\.proxy\.async\.global", "nop", ""),
    # control
    (r"bra(?:\.uni)?", _branch, "", BRANCH),
    (r"brx\.idx(?:\.uni)?", _branch_indexed, "", BRANCH_INDEXED),
    (r"(?:ret|exit)(?:\.uni)?", "", "", EXIT),
    (r"trap", "trap", ""),
    (r"(?:bar|barrier)(?:\.cta)?\.sync(?:\.aligned)?", "", "32 #?", BARRIER),
    (r"(?:bar|barrier)(?:\.cta)?\.arrive(?:\.aligned)?", "bar.arrive", "32 #", COLLECTIVE),
    (r"bar\.warp\.sync", "nop", "_", COLLECTIVE),
    # lanes together
    (r"shfl\.sync\.(up|down|bfly|idx)\.b32", "shfl.{0}", "=32|p 32 32 32 mask"),
    (r"redux\.sync\.(min|max)\.([su])32", "redux.{0}.{1}32", "=32 32 mask"),
    (r"redux\.sync\.add\.[su]32", "redux.add", "=32 32 mask"),
    (r"redux\.sync\.(and|or|xor)\.b32", "redux.{0}", "=32 32 mask"),
    (r"redux\.sync\.(min|max)\.f32", "redux.{0}.f32", "=32 32 mask"),
    (r"vote\.sync\.ballot\.b32", "vote.ballot", "=32 p mask"),
    (r"vote\.sync\.(any|all)\.pred", "vote.{0}", "=p p mask"),
    (r"elect\.sync", "elect", "=32|p _", COLLECTIVE),
    # asynchronous copies
    (rf"cp\.async\.c[ag]\.shared{_CTA}\.global(?:\.L2::\w+)*", "cp.async", "[32] [64] # 32?"),
    (r"cp\.async\.commit_group", "cp.async.commit", ""),
    (r"cp\.async\.wait_group", "cp.async.wait", "#"),
    (r"cp\.async\.wait_all", "cp.async.wait_all", ""),
    (rf"mbarrier\.init(?:\.shared{_CTA})?\.b64", "mbarrier.init", "[32] 32"),
    (rf"mbarrier\.inval(?:\.shared{_CTA})?\.b64", "mbarrier.inval", "[32]"),
    (rf"mbarrier\.arrive(\.expect_tx)?(?:\.release)?(?:\.cta)?(?:\.shared{_CTA})?\.b64", _mbarrier_arrive, ""),
    (rf"mbarrier\.expect_tx(?:\.relaxed)?(?:\.cta)?(?:\.shared{_CTA})?\.b64", "mbarrier.expect", "[32] 32"),
    (
        rf"mbarrier\.(?:try|test)_wait\.parity(?:\.acquire)?(?:\.cta)?(?:\.shared{_CTA})?\.b64",
        "",
        "=p [32] 32 _?",
        WAIT,
    ),
    (
        rf"cp\.async\.bulk(?P<tensor>\.tensor\.[1-5]d)?\.shared{_CTA}\.(?P<from>global)(?:\.tile)?"
        r"\.mbarrier::complete_tx::bytes",
        _bulk,
        "",
    ),
    (
        rf"cp\.async\.bulk(?P<tensor>\.tensor\.[1-5]d)?\.global\.(?P<from>shared){_CTA}(?:\.tile)?\.bulk_group",
        _bulk,
        "",
    ),
    (
        rf"tensormap\.replace\.tile\.({'|'.join(_TENSOR_MAP_FIELDS)})\.shared::cta\.b1024\.b(32|64)",
        _tensor_map_field,
        "",
    ),
    (
        r"tensormap\.cp_fenceproxy\.global\.shared::cta\.tensormap::generic\.release\.gpu\.sync\.aligned",
        _tensor_map_copy,
        "",
        COLLECTIVE,
    ),
    (r"cp\.async\.bulk\.commit_group", "bulk.commit", ""),
    (r"cp\.async\.bulk\.wait_group(\.read)?", _bulk_wait, ""),
    # matrices
    (r"(ld|st)matrix\.sync\.aligned\.m8n8\.x[124](\.trans)?\.shared(?:::cta)?\.b16", _matrix, "", COLLECTIVE),
    (
        r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(bf16|f16)\.(?:bf16|f16)\.f32",
        "mma.{0}",
        "=32* 32* 32* 32*",
        COLLECTIVE,
    ),
    (r"mma\.sync\.aligned\.m16n8k8\.row\.col\.f32\.tf32\.tf32\.f32", "mma.tf32", "=32* 32* 32* 32*", COLLECTIVE),
    (
        r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k(?:8|16)\.f32\.(bf16|f16|tf32)\.(?:bf16|f16|tf32)",
        _wgmma,
        "",
        COLLECTIVE,
    ),
    (r"wgmma\.fence\.sync\.aligned", "wgmma.fence", "", COLLECTIVE),
    (r"wgmma\.commit_group\.sync\.aligned", "wgmma.commit", "", COLLECTIVE),
    (r"wgmma\.wait_group\.sync\.aligned", "wgmma.wait", "#", COLLECTIVE),
    (r"tcgen05\.alloc\.cta_group::1\.sync\.aligned\.shared::cta\.b32", "tcgen05.alloc", "[32] #"),
    (r"tcgen05\.dealloc\.cta_group::1\.sync\.aligned\.b32", "tcgen05.dealloc", "32 32"),
    (r"tcgen05\.(?:relinquish_alloc_permit|fence).*", "nop", ""),
    (r"tcgen05\.wait::(ld|st)\.sync\.aligned", "tcgen05.wait.{0}", ""),
    (r"tcgen05\.(ld|st)\.sync\.aligned\.(32x32b|16x32bx2)\.x\d+\.b32", _tensor_move, ""),
    (r"tcgen05\.mma\.cta_group::1\.kind::(f16|tf32)", _tensor_mma, ""),
    (r"tcgen05\.commit\.cta_group::1\.mbarrier::arrive::one(?:\.shared::cluster)?\.b64", "tcgen05.commit", "[]"),
]


ROWS = [
    Row(re.compile(pattern), function, operands, *(kind or [NORMAL])) for pattern, function, operands, *kind in TABLE
]


@functools.cache
def rows_of(opcode: str) -> list[tuple[Row, re.Match]]:
    """More than one where forms differ in the number of operands alone."""
    matches = [(row, row.pattern.fullmatch(opcode)) for row in ROWS]
    return [(row, m) for row, m in matches if m]
