"""The layout that CONTRIBUTING.md promises: one noun per op everywhere, and layers that point one way."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
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
    for path in (folder / "__init__.py", folder / "op.py", folder / "reference.py", *elsewhere):
        assert path.is_file(), path.relative_to(ROOT)
    assert implementations(op)


def implementations(op: str) -> set[str]:
    """The backends that have a file in the folder of an op."""
    return {p.stem.removesuffix("_impl") for p in (PACKAGE / "ops" / op).glob("*_impl.py")}


@pytest.mark.parametrize("path", modules_of_ops("cpu_impl", "triton_impl"), ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_implementation_has_its_tests(path) -> None:
    assert (TESTS / "ops" / f"test_{path.parent.name}_{path.stem.removesuffix('_impl')}.py").is_file()


# Tests that run C++ on every instruction set, but not under the sanitizers.
NOT_SANITIZED = {
    "test_build.py": "it disassembles the library that is installed",
    "test_cpu_isa.py": "its processes start afresh, with another environment",
    "test_compiled.py": "it asks for instruction sets and runs no kernel",
    "test_overflow.py": "its kernels run on other values in test_<op>_cpu.py, and most of it is about Triton",
}


@pytest.mark.parametrize("path", sorted(TESTS.rglob("test_*.py")), ids=lambda p: p.stem)
def test_sanitizers_run_every_test_of_cpp(path) -> None:
    """A test of C++ is named test_*_cpu.py, or takes the instruction set from the fixture ``isa``."""
    takes_isa = re.search(r"def test_\w+\([^)]*\bisa\b|metrize\(\"isa\"", path.read_text()) is not None
    if takes_isa or path.stem.endswith("_cpu"):
        assert (str(path) in sanitize.TESTS) != (path.name in NOT_SANITIZED)


@each_op
def test_op_is_exported_under_its_name(op) -> None:
    module = importlib.import_module(f"mova_kernels.ops.{op}")
    assert op in module.__all__ and callable(getattr(module, op))
    assert op in ops.__all__ and getattr(ops, op) is getattr(module, op)


def test_ops_and_backend_table_name_the_same() -> None:
    assert sorted(backends.ops()) == OPS


def test_every_op_test_belongs_to_an_op() -> None:
    names = {re.sub(r"^test_|_(triton|cuda|cpu)$", "", p.stem) for p in (TESTS / "ops").glob("test_*.py")}
    assert sorted(names) == OPS


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


def test_routing_and_checks_know_no_op() -> None:
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


# No circles and no private doors.

PACKAGES = ("mova", "mova_kernels")


def modules(package: str) -> dict[str, Path]:
    """Dotted name -> file of every module; a package is named without __init__."""
    paths = sorted((ROOT / package).rglob("*.py"))
    return {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in paths}


def import_graph(package: str) -> dict[str, set[str]]:
    """Module -> the modules of the package that it imports, wherever in the file and for whatever purpose.

    Whoever imports ``a.b.c`` imports the package ``a.b``, too, unless it lies in that package itself.
    """
    files = modules(package)
    graph: dict[str, set[str]] = {}
    for name, path in files.items():
        prefixes = {".".join(full.split(".")[:n]) for full in imports(path) for n in range(1, full.count(".") + 2)}
        graph[name] = {m for m in prefixes & files.keys() if m != name and not name.startswith(f"{m}.")}
    return graph


def circles(graph: dict[str, set[str]]) -> set[str]:
    """What is left when modules that import nothing, or are imported by nothing, are taken away again and again."""
    left = dict(graph)
    while True:
        wanted = {target for targets in left.values() for target in targets}
        kept = {
            name: targets & left.keys() for name, targets in left.items() if name in wanted and targets & left.keys()
        }
        if kept == left:
            return set(left)
        left = kept


def test_circles_are_found() -> None:
    line = {"a": {"b"}, "b": {"c"}, "c": set()}
    assert not circles(line) and circles({**line, "c": {"b"}}) == {"b", "c"}


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_have_no_circles(package) -> None:
    """Imports for type checking and inside of functions count."""
    graph = import_graph(package)
    assert len(graph) > 20 and any(graph.values())
    assert not circles(graph)


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_uses(path: Path) -> Iterator[str]:
    """The private modules and names of this repository that a file takes from where they do not belong to it.

    A private module belongs to the folder in which it lies and to the folders below. A private name in a module belongs
    to that module alone. Attributes of objects are not looked at: a class may use what its own bases call private.
    """
    folder = path.relative_to(ROOT).parts[:-1]
    bound: dict[str, str] = {}  # name in this file -> the module that it stands for
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            base = folder[: len(folder) - node.level + 1] if isinstance(node, ast.ImportFrom) and node.level else ()
            module = node.module.split(".") if isinstance(node, ast.ImportFrom) and node.module else []
            for alias in node.names:
                full = [*base, *module, *alias.name.split(".")]
                if full[0] not in PACKAGES:
                    continue
                is_module = (ROOT.joinpath(*full)).is_dir() or ROOT.joinpath(*full).with_suffix(".py").is_file()
                if is_module:
                    bound[alias.asname or full[-1]] = ".".join(full)
                for i, part in enumerate(full):
                    is_name = i == len(full) - 1 and not is_module
                    if is_private(part) and (is_name or folder[:i] != tuple(full[:i])):
                        yield ".".join(full[: i + 1])
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and is_private(node.attr):
            if node.value.id in bound:
                yield f"{bound[node.value.id]}.{node.attr}"


def test_private_uses_are_found(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    for name in ("mova/_own.py", "mova/other.py", "mova/room/_inside.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    path = tmp_path / "mova" / "a.py"
    path.write_text(
        "from . import _own, other\nfrom .other import _name, fine\nfrom .room._inside import f\nfrom ._own import g\n"
        "other._secret\n_own._mine\nself._state\nfrom mova_kernels._x import y\nfrom torch import _z\n"
    )
    assert sorted(private_uses(path)) == [
        "mova._own._mine", "mova.other._name", "mova.other._secret", "mova.room._inside", "mova_kernels._x",
    ]  # fmt: skip


@pytest.mark.parametrize("path", [*SOURCES, *MODEL_SOURCES], ids=lambda p: str(p.relative_to(ROOT)))
def test_private_names_stay_where_they_belong(path) -> None:
    assert not list(private_uses(path))


# Benchmarks and tools take the library apart: private modules are open to them, private names only these.
OPENED = {
    # It makes the backends believe in a GPU.
    "tools/emulated_gpu.py": {"mova_kernels.backends._TABLE"},
    # It calls the library of CUDA kernels as _compiled does.
    "tools/emulator/cuda.py": {"mova_kernels._compiled._call", "mova_kernels._compiled._raise"},
    # It puts another library in the place of the installed one.
    "tools/sanitize.py": {f"mova_kernels._compiled.{name}" for name in ("_DIRECTORY", "_cpu", "_load_cpu")},
}
OUTSIDE = sorted([*(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "tools").rglob("*.py")])


@pytest.mark.parametrize("path", OUTSIDE, ids=lambda p: str(p.relative_to(ROOT)))
def test_benchmarks_and_tools_use_no_other_private_names(path) -> None:
    files = {name for package in PACKAGES for name in modules(package)}
    assert set(private_uses(path)) - files == OPENED.get(str(path.relative_to(ROOT)), set())


BESIDE_THE_MODEL = {"mova.batch", "mova.cli", "mova.convert", "mova.demo", "mova.info", "mova.visualize"}


@pytest.mark.parametrize("path", MODEL_SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_model_knows_neither_commands_nor_conversion_nor_drawing(path) -> None:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    beside = any(f"{name}.".startswith(f"{package}.") for package in BESIDE_THE_MODEL)
    if not beside and path.name not in ("__init__.py", "__main__.py"):
        known = {".".join(imported.split(".")[:2]) for imported in imports(path)}
        assert not known & BESIDE_THE_MODEL


LONGEST = 450


def test_no_file_is_longer_than_one_can_read() -> None:
    folders = ("mova", "mova_kernels", "csrc", "benchmarks", "tools")
    suffixes = (".py", ".sh", ".h", ".inc", ".c", ".cpp", ".cu", ".cuh")
    files = [p for folder in folders for p in (ROOT / folder).rglob("*") if p.suffix in suffixes]
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in [*files, ROOT / "setup.py"]}
    assert len(lengths) > 100
    assert not {name: length for name, length in lengths.items() if length > LONGEST}
