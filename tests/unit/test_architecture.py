"""The rules that keep the tree readable: an import only points down (docs/architecture.md)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "ties_dist"

ROWS = (
    "errors messages dtypes",
    "kernels thresholds cache",
    "storage methods progress",
    "values",
    "compiler recipe",
    "checkpoints",
    "adapters statistics",
    "inputs",
    "planning",
    "output",
    "worker collecting",
    "executors",
    "engine",
    "api in_memory sweeping analysis",
    "cli",
    "__main__ __init__",
)
"""From the ground up: a folder or file imports from rows below its own, or from its own folder; never sideways."""

MAY_IMPORT = {
    "ray": {"executors/ray.py"},
    "torch": {"dtypes.py", "methods", "compiler", "collecting", "in_memory.py"},
    "pathlib": {
        *("storage", "cache.py", "recipe", "statistics", "collecting", "cli", "analysis"),
        *("api.py", "in_memory.py", "sweeping", "planning/options.py", "planning/keywords.py"),  # take users' paths
        *(
            "inputs/opening.py",
            "inputs/companions.py",
            "inputs/survey.py",
            "inputs/stamps.py",
            "planning/prepare.py",
            "checkpoints/catalogue.py",
            "checkpoints/elsewhere.py",
            "adapters/peft.py",
        ),  # models' folders
        *("compiler/native.py", "compiler/kernel.py", "executors/submit.py", "worker/preflight.py"),  # beside OUT
    },
}
"""Who may name what costs seconds to import, a place to run, or a path of this machine."""

MAY_OPEN = {
    *("storage", "statistics", "collecting"),
    *("values/machine.py", "output/holder.py"),  # what the kernel says of a process, in /proc
    "compiler/native.py",  # kept loops
    "worker/preflight.py",  # each input once, as this node sees it
    "cli/terminal.py",  # /dev/null, where a bar goes on drawing while the process ends
}
"""Whose functions call `open`."""

DEEPEST = 16
LONGEST_MODULE = 450


def modules() -> dict[str, Path]:
    """By dotted name, `ties_dist.a.b`; a package is `ties_dist.a.__init__`."""
    return {str(p.relative_to(ROOT)).removesuffix(".py").replace("/", "."): p for p in sorted(PACKAGE.rglob("*.py"))}


@cache
def imports(path: Path) -> frozenset[str]:
    """Every module that a file imports, wherever in it: in functions and under TYPE_CHECKING, too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            known = {f"{node.module}.{alias.name}" for alias in node.names} & modules().keys()
            found |= known or {node.module}
    return frozenset(found)


def own_imports(path: Path) -> Iterator[str]:
    """Modules of the package alone, `__init__` files aside."""
    for module in imports(path):
        if module in modules():
            yield module


def place(module: str) -> str:
    """The folder, or the file beside them, that a row names."""
    return module.split(".")[1]


def test_every_folder_has_a_row() -> None:
    listed = {name for row in ROWS for name in row.split()}
    assert {place(module) for module in modules()} == listed


def test_an_import_points_down_or_stays_in_its_folder() -> None:
    level = {name: i for i, row in enumerate(ROWS) for name in row.split()}
    guilty = [
        f"{module} -> {found}"
        for module, path in modules().items()
        for found in imports(path)
        if found.startswith("ties_dist.") and place(found) in level and place(module) != "__init__"
        if place(found) != place(module) and level[place(found)] >= level[place(module)]
    ]
    assert guilty == []


def depth_of(module: str, seen: tuple[str, ...] = ()) -> int:
    assert module not in seen, f"a circle: {' -> '.join(seen[seen.index(module) :])} -> {module}"
    below = (depth(found, (*seen, module)) for found in own_imports(modules()[module]))
    return 1 + max(below, default=0)


_DEPTHS: dict[str, int] = {}


def depth(module: str, seen: tuple[str, ...] = ()) -> int:
    """How many files stand on each other below a module, itself included."""
    if module not in _DEPTHS:
        _DEPTHS[module] = depth_of(module, seen)
    return _DEPTHS[module]


def test_there_is_no_circle_and_the_house_has_few_floors() -> None:
    deepest = max((m for m in modules() if not m.endswith("__init__")), key=depth)
    assert depth(deepest) <= DEEPEST, deepest


@pytest.mark.parametrize("library", MAY_IMPORT)
def test_only_some_import_what_is_heavy(library: str) -> None:
    importing = {
        str(p.relative_to(PACKAGE)) for p in modules().values() if library in {m.split(".")[0] for m in imports(p)}
    }
    guilty = {p for p in importing if p not in MAY_IMPORT[library] and p.split("/")[0] not in MAY_IMPORT[library]}
    assert guilty == set()


def test_an_executor_knows_steps_and_items_and_nothing_of_merging() -> None:
    for path in (PACKAGE / "executors").glob("*.py"):
        if path.name != "create.py":
            folders = {place(m) for m in own_imports(path) if m != "ties_dist.planning.options"}  # `Cluster`
            assert not folders & {"worker", "output", "planning", "inputs", "methods"}, path


def calls_open(path: Path) -> bool:
    return any(
        (isinstance(n.func, ast.Name) and n.func.id == "open")
        or (isinstance(n.func, ast.Attribute) and ast.unparse(n.func) == "os.open")
        for n in ast.walk(ast.parse(path.read_text()))
        if isinstance(n, ast.Call)
    )


def test_files_are_opened_where_bytes_live() -> None:
    opening = {str(p.relative_to(PACKAGE)) for p in modules().values() if calls_open(p)}
    assert {p for p in opening if p not in MAY_OPEN and p.split("/")[0] not in MAY_OPEN} == set()


def test_planning_opens_no_file() -> None:
    for name in ("layout.py", "plan.py", "memory.py", "sample.py"):
        path = PACKAGE / "planning" / name
        called = {
            n.func.id
            for n in ast.walk(ast.parse(path.read_text()))
            if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
        }
        assert "open" not in called, path
        assert not imports(path) & {"os", "pathlib", "shutil", "mmap"}, path


def test_every_module_says_what_it_is_for() -> None:
    for path in modules().values():
        assert ast.get_docstring(ast.parse(path.read_text())), path


def test_no_module_is_long() -> None:
    assert {str(p): n for p in modules().values() if (n := len(p.read_text().splitlines())) > LONGEST_MODULE} == {}


def functions() -> Iterator[tuple[str, int]]:
    """Every function with its length in lines."""
    for module, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{module}.{node.name}", (node.end_lineno or 0) - node.lineno + 1


def test_functions_are_short() -> None:
    assert {name: length for name, length in functions() if length > 60} == {}
    lengths = sorted(length for _, length in functions())
    assert lengths[int(0.9 * len(lengths))] <= 24
