"""Python and the C headers: every C function gets the fields that its header declares, in their order and of their
kinds, and a constant that both sides need has the same value on both."""

from __future__ import annotations

import importlib
import itertools
import re
import struct
from pathlib import Path

import pytest
import torch

from mova_kernels import _compiled, _linear
from mova_kernels.ops.expert_attention import cuda_impl as expert_attention
from mova_kernels.ops.gated_combine import cpu_impl as gated_combine

ROOT = Path(__file__).parents[1]
HEADERS = "".join(path.read_text() for path in sorted(ROOT.glob("csrc/*/*.h")))
CALLERS = [path.relative_to(ROOT).with_suffix("") for path in sorted(ROOT.glob("mova_kernels/ops/*/c*_impl.py"))]
LETTERS = {"uint64_t": "Q", "int64_t": "q", "double": "d"}
LIMITS = [
    ("expert_attention", "head widths", "MK_MAX_HEAD_WIDTH"),
    ("expert_gate", "N", "MK_MAX_EXPERTS"),
    ("feature_norm", "channels", "MK_MAX_NORM_CHANNELS"),
    ("feature_norm", "grid sides", "MK_MAX_GRID_SIDE"),
    ("gated_combine", "attended channels", "MK_MAX_NORM_CHANNELS"),
    ("swiglu_norm", "F", "MK_MAX_NORM_CHANNELS"),
    ("token_downsample", "channels", "MK_MAX_NORM_CHANNELS"),
]
DECLARATION = r"(struct )?(\w+) ([\w, ]+);"


def structs() -> dict[str, dict[str, str]]:
    """The fields of every argument block in their order, with their C types; those of nested blocks in their place."""
    found: dict[str, dict[str, str]] = {}
    for name, body in re.findall(r"^struct (mk_\w+_args) \{$(.*?)^\};$", HEADERS, re.MULTILINE | re.DOTALL):
        fields = found[name] = {}
        for line in re.sub(r"//.*", "", body).split("\n"):
            if line.strip():
                nested, kind, names = re.fullmatch(DECLARATION, line.strip()).groups()
                fields |= found[kind] if nested else dict.fromkeys(names.split(", "), kind)
    return found


STRUCTS = structs()
DECLARED = re.findall(r"^MK_API int (mk_\w+)\(const void\* \w+, uint64_t nbytes\);", HEADERS, re.MULTILINE)
FUNCTIONS = {
    value.__name__: value
    for module in (_linear, *(importlib.import_module(".".join(path.parts)) for path in CALLERS))
    for value in vars(module).values()
    if callable(value) and getattr(value, "__name__", "") in DECLARED
}


def fields_of(function: str) -> dict[str, str]:
    """Functions of an op may share a struct: that of the longest beginning of their name."""
    shared = [name for name in STRUCTS if f"{function}_".startswith(name.removesuffix("args"))]
    return STRUCTS[max(shared, key=len)]


def is_tensor(field: str, kind: str) -> bool:
    return kind == "uint64_t" and field != "stream"


def test_headers_are_understood() -> None:
    assert STRUCTS["mk_rope2d_args"] == {
        **dict.fromkeys(("x", "cos", "sin", "y"), "uint64_t"),
        **dict.fromkeys(("B", "L", "H", "D", "x_stride_sample", "x_stride_token", "x_stride_head"), "int64_t"),
        **dict.fromkeys(("adjoint", "dtype"), "int64_t"),
    }
    assert list(STRUCTS["mk_feature_resample_cuda_args"])[-3:] == ["dtype", "device", "stream"]
    assert len(STRUCTS) == len(re.findall(r"struct \w+_args \{", HEADERS))
    assert {name for function in DECLARED for name in STRUCTS if STRUCTS[name] is fields_of(function)} == set(STRUCTS)
    assert set(FUNCTIONS) == set(DECLARED)


def constants() -> dict[str, int]:
    """Everything that an enum or MK_ABI_VERSION defines, by its name in C."""
    code = re.sub(r"//.*", "", HEADERS)
    enums = " ".join(re.findall(r"^enum (?:mk_\w+ )?\{(.*?)\};", code, re.MULTILINE | re.DOTALL))
    return {name: int(value) for name, value in re.findall(r"(MK_\w+)(?: = |\s+)(\d+)", enums + code)}


def test_constants_are_those_of_the_headers() -> None:
    found = constants()
    assert _compiled.ABI_VERSION == found.pop("MK_ABI_VERSION")
    assert [_compiled.DTYPES[t] for t in (torch.float32, torch.bfloat16, torch.float16)] == [
        found.pop(name) for name in ("MK_F32", "MK_BF16", "MK_F16")
    ]
    assert found.pop("MK_BAD_ARG") == _compiled._BAD_ARG
    assert gated_combine.TOKENS_PER_PART == found.pop("MK_COMBINE_TOKENS_PER_PART")
    assert {f"MK_RANGE_{name.upper()}": value for name, value in expert_attention.RANGES.items()} == {
        name: found.pop(name) for name in list(found) if name.startswith("MK_RANGE_")
    }
    # Python tells the other failures from each other by their messages only, and the limits are tested below.
    rest = {"MK_CUDA_MAX_QUERIES", "MK_OK", "MK_UNSUPPORTED", "MK_CUDA_ERROR", "MK_THREADS_ERROR", "MK_NO_MEMORY"}
    assert set(found) == rest | {maximum for _, _, maximum in LIMITS}


@pytest.mark.parametrize(("op", "size", "maximum"), LIMITS)
def test_limits_are_those_of_the_headers(op, size, maximum) -> None:
    takes = importlib.import_module(f"mova_kernels.ops.{op}.op").LIMITS[size]["cpu"]
    assert takes[-1] == constants()[maximum]


def test_every_limit_of_the_cpu_backend_is_tested() -> None:
    modules = [(path.parent.name, ".".join(path.parent.parts)) for path in CALLERS if path.name == "cpu_impl"]
    stated = {
        (op, size)
        for op, module in modules
        for size, takes in getattr(importlib.import_module(f"{module}.op"), "LIMITS", {}).items()
        if "cpu" in takes
    }
    assert stated == {(op, size) for op, size, _ in LIMITS}


@pytest.mark.parametrize("name", DECLARED)
def test_block_is_what_the_header_says(name, monkeypatch) -> None:
    """Every field gets a value of its own, and is found where the C struct has it."""
    fields, values, expected = fields_of(name), itertools.count(1), {}
    names = sorted(fields, key=lambda field: "_stride_" in field)  # strides are no parameters, but local variables
    assert FUNCTIONS[name].__code__.co_varnames == (*names, "block")
    for field, kind in fields.items():
        if is_tensor(field, kind):
            expected[field] = torch.empty(0).as_strided((0,) * 4, [next(values) for _ in range(4)])
        elif "_stride_" not in field:
            expected[field] = {"uint64_t": next(values), "int64_t": -next(values), "double": next(values) / 2}[kind]
    expected["dtype"] = torch.bfloat16
    blocks, tensors = [], {f: t for f, t in expected.items() if isinstance(t, torch.Tensor)}
    addresses = {id(t): next(values) for t in tensors.values()}
    monkeypatch.setattr(_compiled, "address", lambda t: addresses[id(t)])
    monkeypatch.setattr(_compiled, "_call", lambda *arguments: blocks.append(arguments))
    FUNCTIONS[name](**expected)

    ((called, library, block, given),) = blocks
    assert (called, library) == (name, "cuda" if "_cuda_" in name else "cpu")
    assert [id(t) for t in given] == [id(t) for t in tensors.values()]
    found = dict(zip(fields, struct.unpack("=" + "".join(map(LETTERS.get, fields.values())), block), strict=True))
    for field, t in tensors.items():
        expected[field] = addresses[id(t)]
        expected |= zip([f for f in fields if f.startswith(f"{field}_stride_")], t.stride(), strict=False)
    assert found == expected | {"dtype": _compiled.DTYPES[torch.bfloat16]}


@pytest.mark.parametrize("name", DECLARED)
def test_missing_and_unknown_fields_are_named(name) -> None:
    given = dict.fromkeys(f for f in fields_of(name) if "_stride_" not in f)
    for field in given:
        with pytest.raises(TypeError, match=rf"{name}\(\) missing 1 required keyword-only argument: '{field}'"):
            FUNCTIONS[name](**{f: value for f, value in given.items() if f != field})
    with pytest.raises(TypeError, match=rf"{name}\(\) got an unexpected keyword argument 'other'"):
        FUNCTIONS[name](**given, other=1)


@pytest.mark.parametrize("name", [name for name in DECLARED if "_cuda_" not in name])
def test_block_of_another_size_is_refused(name) -> None:
    if _compiled.cpu_reason() is not None:
        pytest.skip(str(_compiled.cpu_reason()))
    message = f"{name}: the argument block must have {8 * len(fields_of(name))} bytes, got 8"
    with pytest.raises(ValueError, match=message):
        _compiled.function(name, "x", "")(x=None)


def test_fields_of_none() -> None:
    """No tensor is address 0, with strides of 0."""
    if _compiled.cpu_reason() is not None:
        pytest.skip(str(_compiled.cpu_reason()))
    fields = {**dict.fromkeys(("x", "cos", "sin", "y")), **dict.fromkeys("BLHD", 0)}
    FUNCTIONS["mk_rope2d"](**fields, adjoint=False, dtype=torch.float32)
