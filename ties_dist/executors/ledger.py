"""What of a reduction has been counted, each item exactly once.

Writes are idempotent, sums are not: a partial says of which items it is, and a ledger accepts each item once, drops
what overlaps, and knows what is missing.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Generic, TypeVar

from ties_dist.executors.base import Sum

Counted = TypeVar("Counted", bound=Hashable)


class Ledger(Generic[Counted, Sum]):
    """missing: of the items, what no accepted partial has. total: what was counted before, and of those since."""

    def __init__(self, items: Iterable[Counted], total: Sum) -> None:
        self.missing = set(items)
        self.total = total

    def accept(self, partial: Sum) -> bool:
        """Add a partial, or drop it whole where it repeats or exceeds what is asked for."""
        if not partial.items or not partial.items <= self.missing:
            return False
        self.missing -= partial.items
        self.total.add(partial)
        return True
