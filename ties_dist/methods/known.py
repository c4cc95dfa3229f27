"""Merge methods by name: every class with a name in a file beside this one, or in a package of yours."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator, Mapping

from ties_dist.errors import RecipeError
from ties_dist.methods.base import Method
from ties_dist.methods.declared import misdeclared
from ties_dist.methods.outside import last_line

PACKAGE = __name__.rpartition(".")[0]


def _ours() -> Iterator[type[Method]]:
    for found in pkgutil.iter_modules(importlib.import_module(PACKAGE).__path__, f"{PACKAGE}."):
        module = importlib.import_module(found.name) if found.name != __name__ else None
        for each in vars(module).values() if module else ():
            own = isinstance(each, type) and issubclass(each, Method) and each.__module__ == found.name
            if own and "name" in vars(each):
                yield each


METHODS: dict[str, type[Method]] = {method.name: method for method in _ours()}
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
        except Exception as error:
            raise RecipeError(
                f"merge_method {name} fails when it is imported: {type(error).__name__}: {error}{last_line(error)}."
            ) from error
        if not (isinstance(method, type) and issubclass(method, Method)):
            raise RecipeError(f"merge_method {name} is no subclass of ties_dist.methods.Method.")
        lacks = [part for part in REQUIRED if getattr(method, part, None) in (None, getattr(Method, part, None))]
        if lacks:
            raise RecipeError(f"merge_method {name} lacks {', '.join(lacks)}; docs/recipe.md has an example.")
        for wrong in misdeclared(method, Method):
            raise RecipeError(f"merge_method {name}: {wrong}")
        if not isinstance(inspect.getattr_static(method, "from_options"), classmethod):
            raise RecipeError(f"merge_method {name}: from_options lacks @classmethod.")
        return method

    def get(self, name: str, default: object = None) -> type[Method]:
        try:
            return self[name]
        except KeyError:
            return default  # type: ignore[return-value]


def known_methods(*, allow_external: bool) -> Mapping[str, type[Method]]:
    return External(METHODS) if allow_external else METHODS
