"""What those who import the package find: its names, its types, and what an installation brings."""

from __future__ import annotations

import ast
import importlib
import re
import shutil
import subprocess
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

from tests.conftest import Checkpoints, random_models
from tests.integration.command import SHAPES, finish, start

ROOT = Path(__file__).parents[2]
PUBLIC = ("ties_dist", "ties_dist.methods")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built by the back end that pip calls, from a copy: it leaves folders behind."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "ties_dist", copy / "ties_dist", ignore=shutil.ignore_patterns("__pycache__"))
    code = "import sys; from setuptools import build_meta; build_meta.build_wheel('built')"
    built = subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, text=True, timeout=120)
    assert built.returncode == 0, built.stderr
    (file,) = (copy / "built").glob("*.whl")
    return zipfile.ZipFile(file)


@pytest.mark.parametrize("name", PUBLIC)
def test_dir_is_the_public_names(name: str) -> None:
    module = importlib.import_module(name)
    assert sorted(n for n in dir(module) if not re.fullmatch("__.*__", n)) == sorted(module.__all__)
    assert {"__all__", "__doc__", "__file__", "__name__", "__path__"} <= set(dir(module))


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_there(name: str) -> None:
    names: dict[str, object] = {}
    exec(f"from {name} import *", names)
    assert names.keys() - {"__builtins__"} == set(importlib.import_module(name).__all__)
    assert None not in names.values()


@pytest.mark.parametrize("name", PUBLIC)
def test_a_wrong_name_is_an_attribute_error(name: str) -> None:
    with pytest.raises(AttributeError, match=f"module '{name}' has no attribute 'mergee'"):
        _ = importlib.import_module(name).mergee


@pytest.mark.parametrize("name", PUBLIC)
def test_type_checkers_see_the_names_where_they_are_imported_from(name: str) -> None:
    """They are told by imports that never run; at run time `_WHERE` says it."""
    module = importlib.import_module(name)
    tree = ast.parse(Path(str(module.__file__)).read_text())
    (told,) = (n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    seen = {a.name: n.module for n in told.body if isinstance(n, ast.ImportFrom) for a in n.names}
    assert seen == {public: f"{name}.{where}" for public, where in module._WHERE.items()}
    blind = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "__getattr__"]
    assert not blind, "a type checker that sees it takes every name for a public one"


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys; before = set(sys.modules); import ties_dist; print(*sorted(set(sys.modules) - before))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {n for n in shown.stdout.split() if n.split(".")[0] == "ties_dist"} == {"ties_dist", "ties_dist.errors"}
    assert not {"torch", "numpy", "pydantic", "click", "ray"} & set(shown.stdout.split())


def test_a_wheel_has_every_module_and_what_is_read_beside_them(wheel: zipfile.ZipFile) -> None:
    packed = {n for n in wheel.namelist() if n.startswith("ties_dist/")}
    there = {str(p.relative_to(ROOT)) for p in (ROOT / "ties_dist").rglob("*") if p.is_file()}
    assert packed == {name for name in there if "__pycache__" not in name}
    assert {"ties_dist/py.typed", "ties_dist/analysis/page.css"} <= packed


def test_ray_comes_with_the_extra_alone(wheel: zipfile.ZipFile) -> None:
    (file,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    needed = message_from_bytes(wheel.read(file)).get_all("Requires-Dist") or []
    of_ray = [n for n in needed if re.match(r"ray\b", n)]
    assert any("numpy" in n and "extra" not in n for n in needed)
    assert {e for n in of_ray for e in re.findall(r'extra == "(\w+)"', n)} == {"cluster", "test"}
    assert all("extra ==" in n for n in of_ray)


def test_a_merge_needs_no_ray(merge_job: Checkpoints, tmp_path: Path) -> None:
    recipe = merge_job(random_models(SHAPES, experts=2))
    done = finish(start("merge", recipe, tmp_path / "out", "--json", code="import sys; sys.modules['ray'] = None"))
    assert done.status == 0, done.err
    assert done.document["executor"] == "local"
