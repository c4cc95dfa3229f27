"""The words in which a method declares its parameters; the recipe checks user input against them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One number of a method, as it may stand under `parameters` of a recipe."""

    name: str
    kind: Literal["float", "int", "bool"] = "float"
    default: float | int | bool | None = None
    """None: the recipe must give it."""
    per_model: bool = False
    """May also stand under one model, where it wins over the recipe's own."""
    per_tensor: bool = False
    """May be a layer gradient or a list of {filter, value}."""
    minimum: float | None = None
    maximum: float | None = None
    minimum_exclusive: bool = False
    ignored: bool = False
    """Accepted for the dialect's sake, without effect, and said."""
    only_default: bool = False
    """Of a bool: the other value is mergekit's, and not supported yet."""
    note: str = ""

    @property
    def required(self) -> bool:
        return self.default is None and not self.ignored
