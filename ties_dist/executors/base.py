"""The seam between what the work is and who does it.

Writes are idempotent, sums are not: a partial statistic carries the set of units it folded, and `Ledger` accepts each
unit once, drops what overlaps, and knows what is missing (design.md, "Sums must not double-count").
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, TypeVar

from ties_dist.planning import Unit
from ties_dist.work import MergeResult, MergeStep, MergeTask, Observation

Item = TypeVar("Item")
Result = TypeVar("Result")


class Fold(Protocol):
    """Counts units into an accumulator; run in parallel, each caller with its own accumulator."""

    def __call__(self, unit: Unit, into: Observation) -> None: ...


class Call(Protocol[Item, Result]):  # type: ignore[misc]
    def __call__(self, item: Item, /) -> Result: ...


class Executor(Protocol):
    name: str

    def map_unordered(self, step: MergeStep, tasks: Iterable[MergeTask]) -> Iterator[MergeResult]:
        """Merge units with a bounded window; results in any order, each after its bytes are written."""
        ...

    def reduce(self, fold: Fold, units: Sequence[Unit]) -> Iterator[Observation]:
        """Partials that together cover the units, a few seconds apart, in any order."""
        ...

    def call(self, function: Call[Item, Result], items: Sequence[Item]) -> Iterator[tuple[Item, Result]]:
        """Small independent calls (per-tensor selections, tie counts), results in any order."""
        ...


class Ledger:
    """What of a reduction has been counted, each unit exactly once."""

    def __init__(self, units: Iterable[Unit]) -> None:
        self.missing = set(units)
        self.total = Observation()

    def accept(self, partial: Observation) -> bool:
        """Add a partial, or drop it whole where it repeats or exceeds what is asked for."""
        if not partial.units or not partial.units <= self.missing:
            return False
        self.missing -= partial.units
        self.total.add(partial)
        return True
