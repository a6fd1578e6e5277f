"""Every row of the emulator's table of opcodes has a test.

The tests say which opcodes they are about when they are imported, so it does not matter which of them run.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from emulated_ptx import TESTED, about, run
from emulator.opcodes import ROWS


@pytest.fixture(scope="module", autouse=True)
def all_tests() -> None:
    for file in Path(__file__).parent.glob("test_emulator_*.py"):
        if "emulated_ptx" in file.read_text():
            importlib.import_module(file.stem)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.pattern.pattern[:60])
def test_row_has_a_test(row) -> None:
    matches = [count for opcode, count in TESTED if row.pattern.fullmatch(opcode)]
    assert any(count is None or row.takes(count) for count in matches), "no test is about this row"


def test_what_a_test_is_about_has_to_be_executed() -> None:
    before = set(TESTED)
    about("mov.u32")(lambda: run("mov.u32 %r1, 0;"))()
    with pytest.raises(AssertionError, match="does not execute"):
        about("mov.u32", "trap")(lambda: run("mov.u32 %r1, 0;"))()
    TESTED.clear()
    TESTED.update(before)
