"""That the interpreter of tests/interpreter.py fails for what a GPU would not forgive."""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("TRITON_INTERPRET=1 is not set", allow_module_level=True)
triton = pytest.importorskip("triton")
tl = triton.language

pytestmark = pytest.mark.usefixtures("triton_kernels")


@triton.jit
def copy(x, y, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at))


@triton.jit
def copy_shifted(x, y, shift, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at + shift))


@triton.jit
def copy_some(x, y, count, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, at < count))


@triton.jit
def copy_one(x, y):
    tl.store(y, tl.load(x).to(y.dtype.element_ty))


@triton.jit
def store_lanes(y, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    tl.store(y + lanes // 2, lanes)


def test_what_is_right_passes():
    x, y = torch.arange(8.0), torch.empty(8)
    copy[(2,)](x, y, 4)
    assert torch.equal(x, y)


def test_views_of_one_storage_stay_one():
    both = torch.arange(8.0).view(2, 4)
    copy[(1,)](both[0], both[1], 4)
    assert torch.equal(both[0], both[1])


@pytest.mark.parametrize("shift", [-1, 1], ids=["before", "behind"])
def test_loads_outside_of_a_tensor(shift):
    with pytest.raises(Exception, match=r"outside of all tensors \(1 of 8 elements\)"):
        copy_shifted[(1,)](torch.zeros(10)[1:9], torch.empty(8), shift, 8)


def test_stores_between_rows():
    with pytest.raises(Exception, match=r"outside of all tensors \(2 of 8 elements\)"):
        copy[(1,)](torch.zeros(8), torch.empty(2, 4)[:, :3], 8)


def test_stores_twice():
    with pytest.raises(Exception, match="has been stored before"):
        copy_one[(2,)](torch.zeros(1), torch.zeros(1))


def test_two_lanes_store_one_element():
    with pytest.raises(Exception, match="two lanes store the same element"):
        store_lanes[(1,)](torch.zeros(4, dtype=torch.int32), 8)


@pytest.mark.parametrize(("x", "y", "what"), [(0, 4, "stored"), (4, 0, "loaded")])
def test_one_program_stores_what_another_loads(x, y, what):
    memory = torch.zeros(12)
    with pytest.raises(Exception, match=f"has been {what} before"):
        copy[(2,)](memory[x : x + 8], memory[y : y + 8], 4)


def test_masked_lanes_without_a_value():
    copy_some[(1,)](torch.ones(4), torch.empty(4), 4, 4)
    with pytest.raises(Exception, match="give other="):
        copy_some[(1,)](torch.ones(4), torch.empty(4), 3, 4)


def test_bfloat16_is_rounded_to_the_nearest():
    y = torch.zeros(1, dtype=torch.bfloat16)
    copy_one[(1,)](torch.full((1,), 1.0 + 3 / 512), y)
    assert y.item() == 1.0 + 1 / 128
