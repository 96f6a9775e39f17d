"""The package as a whole: what importing it costs, which way its imports point, what is documented."""

import ast
import doctest
import graphlib
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import blaq

PACKAGE = Path(blaq.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))

# A part may import the parts left of it; tasks know nothing of bits, so they stand apart.
MAY_IMPORT: dict[str, set[str]] = {
    "grids": set(),
    "solvers": {"grids"},
    "bins": {"grids"},
    "exact": {"grids", "solvers", "bins"},
    "projection": {"grids", "solvers", "bins", "exact"},
    "optim": {"grids", "solvers", "bins", "exact", "projection"},
    "tasks": set(),
    "zigzag": {"grids", "solvers", "projection", "optim"},
    "train": {"grids", "projection", "optim", "tasks", "zigzag", "__init__"},
    "export": {"grids", "projection", "optim", "tasks", "train", "__init__"},
    "report": {"grids", "optim", "tasks", "train", "__init__"},
    "cli": {"grids", "projection", "optim", "tasks", "train", "export", "report"},
    "__main__": {"cli"},
    "__init__": {"grids", "projection", "optim"},  # and "export" on first use of its names
}
TORCH_ALONE = ("grids", "solvers", "bins", "exact", "projection", "optim", "zigzag", "__init__")


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(("blaq", *(parts[:-1] if parts[-1] == "__init__" else parts)))


def part_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


MODULES = {module_name(path): ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}


def imported(module: str) -> Iterator[str]:
    """The modules that a module imports, wherever the statement stands; not those that only a type checker reads."""
    unread = {
        inner
        for node in ast.walk(MODULES[module])
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(MODULES[module]):
        if node in unread:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in MODULES else str(node.module)


def roots(module: str) -> set[str]:
    return {name.partition(".")[0] for name in imported(module)} - set(sys.stdlib_module_names)


# --- imports --------------------------------------------------------------------------------------------------------------


def test_import_loads_torch_and_nothing_else() -> None:
    """torch may load what it likes, numpy for one; `import blaq` adds parts of torch and of the standard library."""
    code = (
        "import sys, torch; before = set(sys.modules)\n"
        "import blaq; print('\\n'.join(sorted(set(sys.modules) - before)))"
    )
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    added = run.stdout.split()
    assert "blaq.optim.blaq" in added
    foreign = {name.partition(".")[0] for name in added} - set(sys.stdlib_module_names) - {"blaq", "torch"}
    assert foreign == set()
    assert [name for name in added if name.startswith(("blaq.tasks", "blaq.train", "blaq.export", "blaq.cli"))] == []


@pytest.mark.parametrize("module", [name for name in MODULES if part_of(name) in TORCH_ALONE])
def test_the_core_imports_torch_alone(module: str) -> None:
    assert roots(module) <= {"torch", "blaq"}


def test_the_reference_imports_the_standard_library_alone() -> None:
    assert roots("blaq.optim.reference") == set()


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module: str) -> None:
    part = part_of(module)
    others = {part_of(name) for name in imported(module) if name.partition(".")[0] == "blaq"} - {part}
    assert others <= MAY_IMPORT[part], f"{module} may not import {sorted(others - MAY_IMPORT[part])}"


def test_no_module_imports_itself_in_a_circle() -> None:
    graph = {name: {other for other in imported(name) if other in MODULES} for name in MODULES}
    order = tuple(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError
    assert order.index("blaq.grids") < order.index("blaq.projection") < order.index("blaq.optim.blaq")


# --- documentation ----------------------------------------------------------------------------------------------------------


def test_all_is_what_can_be_imported() -> None:
    assert sorted(set(blaq.__all__)) == sorted(blaq.__all__)
    assert {"Grid", "project", "param_groups", "plan", "memory_report", "BLAQ", "LAQ"} <= set(blaq.__all__)
    source = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    assigned = {alias.name for node in ast.walk(source) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert assigned - {"Any", "TYPE_CHECKING", "import_module"} == set(blaq.__all__)
    assert set(blaq.__all__) <= set(dir(blaq))


def test_export_is_imported_on_first_use() -> None:
    code = (
        "import sys, blaq; assert not any(name.startswith('blaq.export') for name in sys.modules)\n"
        "blaq.save_packed, blaq.load_packed; assert 'blaq.export.packed' in sys.modules\n"
        "assert 'safetensors' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
    with pytest.raises(AttributeError, match="module 'blaq' has no attribute 'nothing'"):
        _ = blaq.nothing


@pytest.mark.parametrize("name", blaq.__all__)
def test_public_names_are_documented_with_an_example(name: str) -> None:
    value = getattr(blaq, name)
    text = inspect.getdoc(value)
    assert text
    assert "Example:" in text
    assert doctest.DocTestParser().get_examples(text)


def undocumented(owner: ast.Module | ast.ClassDef, where: str) -> Iterator[str]:
    for node in owner.body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        decorators = {ast.unparse(decorator).rpartition(".")[2] for decorator in node.decorator_list}
        # A setter shares the text of its property, an override that of the method that it overrides.
        if not ast.get_docstring(node) and not decorators & {"setter", "override", "overload"}:
            yield f"{where}.{node.name}"
        if isinstance(node, ast.ClassDef):
            yield from undocumented(node, f"{where}.{node.name}")


@pytest.mark.parametrize("module", MODULES)
def test_everything_public_has_a_docstring(module: str) -> None:
    assert ast.get_docstring(MODULES[module]), module
    assert list(undocumented(MODULES[module], module)) == []


# --- what is shipped ----------------------------------------------------------------------------------------------------------


def test_it_is_typed() -> None:
    assert (PACKAGE / "py.typed").read_text() == ""


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_no_source_holds_a_path_of_some_machine(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    absolute = re.findall(r"""(?:^|[\s"'`(=:,])(/(?:[\w.-]+/)+[\w.-]*|[A-Za-z]:\\\w+)""", text, re.MULTILINE)
    assert absolute == []
    assert str(Path.home()) + os.sep not in text


def test_version_is_one_and_semantic() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+([-+.]?\w+)?", blaq.__version__)
