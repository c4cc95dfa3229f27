"""What holds for every test."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_whoever_expects_an_error_says_which() -> None:
    """`match` always: another error of the same type must not pass. ruff's PT011 overlooks tuples of types."""
    guilty = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sorted((ROOT / "tests").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.raises"
        if "match" not in {keyword.arg for keyword in node.keywords}
    ]
    assert guilty == []
