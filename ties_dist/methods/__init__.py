"""Merge methods. A new one is a file beside these, or a class in a package of yours.

Names are imported at first use: a recipe is read without numpy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ties_dist.methods.base import Cut, Found, Method, State
    from ties_dist.methods.known import METHODS, known_methods
    from ties_dist.methods.linear import Linear
    from ties_dist.methods.needs import Sums, TrimRule
    from ties_dist.methods.task_arithmetic import TaskArithmetic
    from ties_dist.methods.ties import Ties

_WHERE = {
    "METHODS": "known",
    "Cut": "base",
    "Found": "base",
    "Linear": "linear",
    "Method": "base",
    "State": "base",
    "Sums": "needs",
    "TaskArithmetic": "task_arithmetic",
    "Ties": "ties",
    "TrimRule": "needs",
    "known_methods": "known",
}

__all__ = [
    "METHODS",
    "Cut",
    "Found",
    "Linear",
    "Method",
    "State",
    "Sums",
    "TaskArithmetic",
    "Ties",
    "TrimRule",
    "known_methods",
]

if not TYPE_CHECKING:  # a type checker that sees this takes every name for one of ours

    def __getattr__(name: str) -> object:
        if name not in _WHERE:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, *(name for name in globals() if name.startswith("__"))]
