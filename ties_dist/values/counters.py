"""What is counted of the elements that are merged: the one place that knows which number of a row is which.

A kernel returns a row of integers for each slice it merged. Rows of disjoint elements add up, in any order, so they are
what travels and what a journal holds; `Counts` is a row as it is read, by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from ties_dist.thresholds import Cuts

Row = tuple[int, ...]


class Counts(NamedTuple):
    """What was counted of some elements.

    nonfinite: NaN and Inf, per operand; nonfinite_out: of the result. above, equal, kept, kept_nonzero: per expert
    where the method trims: |delta| against the threshold, and what the trim keeps. own: by the method, under its names.
    Zeros are what equals a threshold of 0. Counted everywhere they cost the TIES loop 10 % of its speed: nobody asks.
    """

    nonfinite: tuple[int, ...]
    nonfinite_out: int
    above: tuple[int, ...]
    equal: tuple[int, ...]
    kept: tuple[int, ...]
    kept_nonzero: tuple[int, ...]
    own: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Counters:
    """The rows of one plan. operands: inputs of a slice; trimmed: experts that have thresholds; own: of the method."""

    operands: int
    trimmed: int
    own: tuple[str, ...]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Of a row, in order. A kernel returns all but the last, `kept` and `kept_nonzero`, which follow from cuts."""
        operands = (f"nonfinite[{k}]" for k in range(self.operands))
        proofs = (f"{name}[{i}]" for i in range(self.trimmed) for name in ("above", "equal"))
        kept = (f"{name}[{i}]" for i in range(self.trimmed) for name in ("kept", "kept_nonzero"))
        return (*operands, "nonfinite_out", *proofs, *self.own, *kept)

    def row(self, counted: np.ndarray, cuts: Cuts, start: int) -> Row:
        """The row of a slice that lies on one side of each cut of ties. counted: by a kernel; start: in its tensor."""
        numbers, kept, first = counted.tolist(), [], self.operands + 1
        for i, cut in enumerate(cuts):
            above, equal = numbers[first + 2 * i : first + 2 * i + 2]
            passed = above + (equal if start < cut.ties else 0)
            kept += [passed, passed if cut.bits else above]
        return (*numbers, *kept)

    def read(self, row: Sequence[int] | np.ndarray) -> Counts:
        assert len(row) == len(self.names), "a row of another plan"
        numbers = [int(n) for n in row]
        first = self.operands + 1
        own = first + 2 * self.trimmed
        kept = own + len(self.own)
        return Counts(
            nonfinite=tuple(numbers[: self.operands]),
            nonfinite_out=numbers[self.operands],
            above=tuple(numbers[first:own:2]),
            equal=tuple(numbers[first + 1 : own : 2]),
            kept=tuple(numbers[kept::2]),
            kept_nonzero=tuple(numbers[kept + 1 :: 2]),
            own=dict(zip(self.own, numbers[own:kept], strict=True)),
        )


def added(rows: Iterable[Row]) -> Row:
    """Of disjoint elements."""
    return tuple(map(sum, zip(*rows, strict=True)))
