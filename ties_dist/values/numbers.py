"""The recipe's numbers as a method takes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TensorNumbers:
    """The recipe's numbers for one tensor: global parameters, and those of each expert."""

    parameters: Mapping[str, float]
    experts: tuple[Mapping[str, float], ...]
