"""The rules that keep the tree readable: an import only points down (design.md, layers)."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "ties_dist"


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def test_only_the_ray_executor_imports_ray() -> None:
    guilty = [p for p in PACKAGE.rglob("*.py") if any(m.split(".")[0] == "ray" for m in imports(p))]
    assert [p.name for p in guilty if p.name != "ray.py"] == []


def test_methods_know_nothing_of_files_or_recipes() -> None:
    for path in (PACKAGE / "methods").glob("*.py"):
        for module in imports(path):
            assert not module.startswith(
                ("ties_dist.storage", "ties_dist.checkpoints.catalogue", "ties_dist.recipe.recipe")
            ), path


def test_layout_and_plan_open_no_file() -> None:
    for name in ("layout.py", "planning.py"):
        tree = ast.parse((PACKAGE / name).read_text())
        called = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
        assert "open" not in called
        assert not imports(PACKAGE / name) & {"os", "pathlib", "shutil", "mmap"}


LAYERS = [
    {"errors", "parameter", "document", "settings", "models", "options", "dialect", "recipe"},
    {"header", "checkpoint", "adapted", "adapters", "expert_statistics", "congruence", "methods", "storage"}
    | {"threshold", "kernels"},
    {"layout", "planning", "counting", "matrices", "work", "tally"},
    {
        "progress",
        "adapter_merging",
        "inputs",
        "prepare",
        "executors",
        "journal",
        "lock",
        "statistics",
        "report",
        "summary",
        "publish",
    }
    | {"resume", "site", "preflight", "analysis", "snapshot"},
    {"scan", "passes", "engine", "verify", "summing"},
    {"api", "state_dicts", "sweeping", "tables", "submitting", "status", "switches", "talk", "cli", "__main__"}
    | {"__init__", "subjects", "collecting", "analyzing", "analysis_page", "charts"},
]


def test_an_import_never_points_up() -> None:
    level = {module: i for i, layer in enumerate(LAYERS) for module in layer}
    for path in PACKAGE.rglob("*.py"):
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for module in imports(path):
            parts = module.split(".")
            if parts[0] == "ties_dist" and len(parts) > 1 and own != "__init__":
                assert level[parts[1]] <= level[own], f"{own} imports {parts[1]}"


def test_every_module_says_what_it_is_for() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), path
