"""Merge methods by name. A new one is a file beside these and a line here, or a class in a package of yours."""

from __future__ import annotations

import importlib
from collections.abc import Mapping

from ties_dist.errors import RecipeError
from ties_dist.methods.base import Cut, Method, State, TrimRule
from ties_dist.methods.dare import DareLinear, DareTies
from ties_dist.methods.fisher import Fisher
from ties_dist.methods.linear import Linear
from ties_dist.methods.regmean import RegMean
from ties_dist.methods.task_arithmetic import TaskArithmetic
from ties_dist.methods.ties import Ties

METHODS: dict[str, type[Method]] = {
    m.name: m for m in (Linear, TaskArithmetic, Ties, Fisher, RegMean, DareLinear, DareTies)
}


REQUIRED = ("name", "summary", "operand", "parameters", "state", "merge")
"""What a method of another package has to say."""


class External(dict[str, type[Method]]):
    """Our methods, and those of other packages, named `package.module:Class`: looking one up runs its code."""

    def __missing__(self, name: str) -> type[Method]:
        module, colon, found = name.partition(":")
        if not colon:
            raise KeyError(name)
        try:
            method = getattr(importlib.import_module(module), found)
        except (ImportError, AttributeError, ValueError) as error:
            raise RecipeError(
                f"merge_method {name}: {error}. It must be importable where ties_dist runs: installed, or with its "
                "folder in PYTHONPATH."
            ) from error
        if not (isinstance(method, type) and issubclass(method, Method)):
            raise RecipeError(f"merge_method {name} is no subclass of ties_dist.methods.Method.")
        lacks = [part for part in REQUIRED if getattr(method, part, None) in (None, getattr(Method, part, None))]
        if lacks:
            raise RecipeError(f"merge_method {name} lacks {', '.join(lacks)}; docs/recipe.md has an example.")
        return method

    def get(self, name: str, default: object = None) -> type[Method]:
        try:
            return self[name]
        except KeyError:
            return default  # type: ignore[return-value]


def known_methods(*, allow_external: bool) -> Mapping[str, type[Method]]:
    return External(METHODS) if allow_external else METHODS


__all__ = ["METHODS", "Cut", "Linear", "Method", "State", "TaskArithmetic", "Ties", "TrimRule", "known_methods"]
