"""Each program of examples/ does what it promises when it is run by the command in its docstring."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PROGRAMS = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}


def docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text())) or ""


def run(name: str, **replaced: str) -> str:
    """What the example prints; ``replaced`` has new values of options in its command."""
    (line,) = re.findall(rf"^ +((?:{'|'.join(PROGRAMS)}) .*)$", docstring(ROOT / "examples" / name), re.MULTILINE)
    program, *arguments = shlex.split(line)
    for option, value in replaced.items():
        arguments[arguments.index(f"--{option.replace('_', '-')}") + 1] = value
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        PROGRAMS[program] + arguments, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def losses(output: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"^step \d+ loss (\S+)$", output, re.MULTILINE)]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_example_says_whom_it_is_for_and_is_short(path) -> None:
    assert re.search(r", for somebody who ", docstring(path).partition("\n\n")[0].replace("\n", " "))
    assert len(path.read_text().splitlines()) <= 90


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_readme_links_the_example(path) -> None:
    assert f"(examples/{path.name})" in (ROOT / "README.md").read_text()


def test_adapter_in_your_model_has_the_shape_and_learns() -> None:
    pytest.importorskip("transformers")
    output = run("adapter_in_your_model.py")
    assert "fused tokens (4, 16, 128)" in output
    first, last = losses(output)
    assert last < first / 10


def test_ranks_agree_and_have_the_losses_of_one_process() -> None:
    """A step with wrong gradients would change the losses of the steps behind it."""
    two = run("train_with_ddp.py")
    assert "ranks with the parameters of rank 0: [0, 1]" in two
    one = run("train_with_ddp.py", nproc_per_node="1")
    assert len(losses(one)) == 3
    assert losses(two) == pytest.approx(losses(one), abs=2e-6)


def test_only_the_own_expert_is_learned_and_answers() -> None:
    pytest.importorskip("transformers")
    output = run("expert_of_your_own.py")
    assert losses(output)[-1] < losses(output)[0]
    learned = dict(re.findall(r"^(\w+) learned (\S+)$", output, re.MULTILINE))
    assert float(learned["dinov2"]) == 0 < float(learned["edges"])
    assert "experts ('edges',) gates of block 0 [0.0, 1.0]" in output
