"""The layout that CONTRIBUTING.md promises: one noun per op everywhere, and layers that point one way."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest
import sanitize

import mova_kernels
from mova_kernels import backends, ops

ROOT = Path(__file__).resolve().parents[1]
PACKAGE, CSRC, TESTS = ROOT / "mova_kernels", ROOT / "csrc", ROOT / "tests"
OPS = sorted(p.name for p in (PACKAGE / "ops").iterdir() if p.is_dir() and p.name != "__pycache__")
SOURCES = sorted(PACKAGE.rglob("*.py"))
C_FOLDERS = sorted(p.name for p in CSRC.iterdir() if p.is_dir() and p.name != "common")

each_op = pytest.mark.parametrize("op", OPS)
each_source = pytest.mark.parametrize("path", SOURCES, ids=[str(p.relative_to(ROOT)) for p in SOURCES])


def imports(path: Path, at_run_time: bool = False) -> set[str]:
    """Absolute names of all modules, and of all names imported from them.

    With ``at_run_time`` those behind ``if TYPE_CHECKING`` do not count.
    """
    tree = ast.parse(path.read_text())
    skipped = {
        node
        for block in ast.walk(tree)
        if at_run_time and isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for statement in block.body
        for node in ast.walk(statement)
    }
    package = list(path.relative_to(ROOT).parts[:-1])
    found = set()
    for node in set(ast.walk(tree)) - skipped:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


def roots(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def test_importing_parts_finds_what_it_should(tmp_path, monkeypatch) -> None:
    """The checks below are worth what this parser is worth."""
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "a" / "b" / "c.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "import x.y\nfrom . import d\nfrom ..e import f\nfrom .op import g\ndef h():\n    import late\n"
        "if TYPE_CHECKING:\n    from typed import only\n"
    )
    assert imports(path) == {
        "x.y", "a.b", "a.b.d", "a.e", "a.e.f", "a.b.op", "a.b.op.g", "late", "typed", "typed.only",
    }  # fmt: skip
    assert roots(imports(path, at_run_time=True)) == {"x", "a", "late"}


def modules_of_ops(*names: str) -> list[Path]:
    return [p for name in names for p in sorted((PACKAGE / "ops").glob(f"*/{name}.py"))]


@each_op
def test_op_has_its_files(op) -> None:
    folder = PACKAGE / "ops" / op
    elsewhere = (TESTS / "ops" / f"test_{op}.py", ROOT / "benchmarks" / "ops" / f"bench_{op}.py")
    for path in (folder / "op.py", folder / "reference.py", *elsewhere):
        assert path.is_file(), path.relative_to(ROOT)


@pytest.mark.parametrize("path", modules_of_ops("cpu_impl", "triton_impl"), ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_implementation_has_its_tests(path) -> None:
    assert (TESTS / "ops" / f"test_{path.parent.name}_{path.stem.removesuffix('_impl')}.py").is_file()


@pytest.mark.parametrize("path", sorted(TESTS.glob("ops/test_*.py")), ids=lambda p: p.stem)
def test_sanitizers_run_every_test_of_cpp(path) -> None:
    """An op's test of C++ takes the instruction set from the fixture ``isa``."""
    if re.search(r"def test_\w+\([^)]*\bisa\b|\"isa\"", path.read_text()):
        assert str(path) in sanitize.TESTS


@each_op
def test_op_is_exported_under_its_name(op) -> None:
    module = importlib.import_module(f"mova_kernels.ops.{op}")
    assert op in module.__all__ and callable(getattr(module, op))
    assert op in ops.__all__ and getattr(ops, op) is getattr(module, op)


def test_ops_and_backend_table_name_the_same() -> None:
    assert sorted(backends.ops()) == OPS


def test_every_op_test_belongs_to_an_op() -> None:
    names = {re.sub(r"^test_|_(triton|cpu)$", "", p.stem) for p in (TESTS / "ops").glob("test_*.py")}
    assert sorted(names) == OPS


@each_op
def test_op_has_a_row_in_the_readme(op) -> None:
    readme = ROOT / "README.md"
    assert readme.is_file(), "README.md is missing"
    row = re.search(rf"^\|[^|\n]*\b{op}\b[^|\n]*\|", readme.read_text(), re.MULTILINE)
    assert row, f"no table row starts with {op}"


@pytest.mark.parametrize("folder", C_FOLDERS)
def test_c_folder_is_an_op_with_a_header(folder) -> None:
    assert folder in OPS
    assert (CSRC / folder / f"{folder}.h").is_file()


@each_source
def test_kernels_know_no_model_package(path) -> None:
    assert "mova" not in roots(imports(path))


@each_source
def test_no_heavy_dependency(path) -> None:
    assert not roots(imports(path)) & {"torchvision", "timm", "open_clip", "transformers"}


MODEL_SOURCES = sorted((ROOT / "mova").rglob("*.py"))


@pytest.mark.parametrize("path", MODEL_SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_model_package_uses_the_public_kernels_alone(path) -> None:
    public = {"mova_kernels", *(f"mova_kernels.{name}" for name in mova_kernels.__all__)}
    public |= {f"mova_kernels.ops.{name}" for name in ops.__all__}
    assert {name for name in imports(path) if name.partition(".")[0] == "mova_kernels"} <= public


@pytest.mark.parametrize("path", MODEL_SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_model_package_needs_no_library_that_replaces_torch(path) -> None:
    assert not roots(imports(path)) & {"torchvision", "timm", "open_clip"}


def parts(path: Path) -> set[str]:
    """Every component of every imported name: {"mova_kernels", "ops", "rope2d", "reference", ...}."""
    return {part for name in imports(path) for part in name.split(".")}


@pytest.mark.parametrize("path", modules_of_ops("reference"), ids=lambda p: p.parent.name)
def test_reference_knows_only_references(path) -> None:
    assert not parts(path) & {"op", "_compiled", "cpu_impl", "triton", "triton_impl", "backends", "_library"}


@pytest.mark.parametrize("path", modules_of_ops("cpu_impl", "triton_impl"), ids=lambda p: p.parent.name)
def test_implementation_knows_neither_contract_nor_autograd(path) -> None:
    assert not parts(path) & {"op", "autograd", "backends", "_library", "_checks"}
    used = {n.attr for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute)}
    assert not used & {"autograd", "requires_grad", "requires_grad_", "custom_op"}


def test_ragged_and_checks_know_no_op() -> None:
    for name in ("routing", "backends", "_checks", "_library", "_compiled", "config"):
        assert "ops" not in parts(PACKAGE / f"{name}.py"), name


def test_oracle_shares_nothing_with_what_it_judges() -> None:
    assert "mova_kernels" not in roots(imports(PACKAGE / "dense_reference.py", at_run_time=True))


FOREIGN = re.compile(r'^\s*#\s*include\s*[<"](torch|ATen|c10|Python\.h|pybind11|nanobind)', re.MULTILINE)


def test_c_sources_know_neither_torch_nor_python() -> None:
    files = [p for p in CSRC.rglob("*") if p.suffix in (".h", ".inc", ".c", ".cpp", ".cu", ".cuh")]
    assert files and FOREIGN.search("#include <torch/extension.h>")
    guilty = [str(p.relative_to(ROOT)) for p in files if FOREIGN.search(p.read_text())]
    assert not guilty
