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

    nonfinite: NaN and Inf, per operand; nonfinite_out: of the result. above, equal, passed, kept: per expert where the
    method trims: |delta| against the threshold, what passes the trim, and what of that is not zero. zero: per expert
    where a rank follows from it, else empty: counted everywhere zeros cost the TIES loop 10 % of its speed. own: by the
    method, under its names.
    """

    nonfinite: tuple[int, ...]
    nonfinite_out: int
    above: tuple[int, ...]
    equal: tuple[int, ...]
    zero: tuple[int, ...]
    passed: tuple[int, ...]
    kept: tuple[int, ...]
    own: Mapping[str, int]

    def zeros(self, expert: int) -> int:
        """Entries of an expert that are the base's; 0 where nothing follows from how many those are."""
        return self.zero[expert] if self.zero else 0


@dataclass(frozen=True, kw_only=True)
class Counters:
    """The rows of one plan. operands: inputs of a slice; trimmed: experts that have thresholds; zeros: whether theirs
    are counted; own: of the method."""

    operands: int
    trimmed: int
    zeros: bool = False
    own: tuple[str, ...]

    @cached_property
    def _proofs(self) -> tuple[str, ...]:
        """What is counted of each expert that has a threshold."""
        return ("above", "equal", "zero") if self.zeros else ("above", "equal")

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Of a row, in order. A kernel returns all but the last, `passed` and `kept`, which follow from cuts."""
        operands = (f"nonfinite[{k}]" for k in range(self.operands))
        proofs = (f"{name}[{i}]" for i in range(self.trimmed) for name in self._proofs)
        kept = (f"{name}[{i}]" for i in range(self.trimmed) for name in ("passed", "kept"))
        return (*operands, "nonfinite_out", *proofs, *self.own, *kept)

    def row(self, counted: np.ndarray, cuts: Cuts, start: int) -> Row:
        """The row of a slice that lies on one side of each cut of ties. counted: by a kernel; start: in its tensor."""
        numbers, kept, first, step = counted.tolist(), [], self.operands + 1, len(self._proofs)
        for i, cut in enumerate(cuts):
            above, equal = numbers[first + step * i : first + step * i + 2]
            passed = above + (equal if start < cut.ties else 0)
            kept += [passed, passed if cut.bits else above]
        return (*numbers, *kept)

    def read(self, row: Sequence[int] | np.ndarray) -> Counts:
        assert len(row) == len(self.names), "a row of another plan"
        numbers = [int(n) for n in row]
        first, step = self.operands + 1, len(self._proofs)
        own = first + step * self.trimmed
        kept = own + len(self.own)
        return Counts(
            nonfinite=tuple(numbers[: self.operands]),
            nonfinite_out=numbers[self.operands],
            above=tuple(numbers[first:own:step]),
            equal=tuple(numbers[first + 1 : own : step]),
            zero=tuple(numbers[first + 2 : own : step]) if self.zeros else (),
            passed=tuple(numbers[kept::2]),
            kept=tuple(numbers[kept + 1 :: 2]),
            own=dict(zip(self.own, numbers[own:kept], strict=True)),
        )


def added(rows: Iterable[Row]) -> Row:
    """Of disjoint elements."""
    return tuple(map(sum, zip(*rows, strict=True)))
