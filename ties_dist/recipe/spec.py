"""What a recipe needs to know of a method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from ties_dist.methods.parameter import Parameter

if TYPE_CHECKING:
    from ties_dist.methods.base import Method, Operand


class MethodSpec(Protocol):
    """Fulfilled by the method's class itself."""

    @property
    def parameters(self) -> tuple[Parameter, ...]: ...

    @property
    def operand(self) -> Operand: ...

    @property
    def fewest(self) -> int:
        """Experts that it takes, the base not among them."""

    @property
    def most(self) -> int | None: ...

    @property
    def statistics(self) -> str | None:
        """The kind of statistics that it needs of every model, if any."""

    @property
    def options(self) -> frozenset[str]:
        """Keys of the `ties_dist:` block it understands, besides exclude, vocab, non_float and semantics."""

    def from_options(self, options: Mapping[str, object], parameters: Mapping[str, float]) -> Method:
        """The method that a recipe describes."""


def has_presets(spec: MethodSpec) -> bool:
    """Whether the presets say anything about this method: they describe ways to trim and elect."""
    return "trim_scope" in spec.options
