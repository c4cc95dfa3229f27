"""How an output may differ from another package's, element by element: every difference is explained or reported.

`tied`: some expert's trim cut a group of equal magnitudes here; the other package's sort keeps arbitrary ones of it.
`rounded`: the other package sums in another order or fused; within a few ulp of the sum of magnitudes.
`undecided`: the sum that elects the sign is smaller than that rounding, so its sign is open.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from tests.oracle import Array, Model, Statistics, is_float, widen

ULP = 2.0**-23  # float32 spacing at 1
FEW = 4
# torch's sum over a stacked dimension follows the loop up to four experts; from five on it depends on the slice width.
STACKED_SUM_DIFFERS_FROM = 5


@dataclass(kw_only=True)
class Comparison:
    """Elements by how they compare; `unexplained` describes what no rule allows."""

    elements: int = 0
    identical: int = 0
    tied: int = 0
    undecided: int = 0
    rounded: int = 0
    unexplained: list[str] = field(default_factory=list)

    @property
    def counts(self) -> dict[str, int]:
        return {
            "elements": self.elements,
            "identical": self.identical,
            "tied": self.tied,
            "undecided": self.undecided,
            "rounded": self.rounded,
            "unexplained": len(self.unexplained),
        }


@dataclass(frozen=True, kw_only=True)
class Allowance:
    """What may explain a difference, by tensor name; None allows no difference of that class.

    ambiguous: bool, a trim cut a tie group here. magnitude: float64, the sum of magnitudes whose rounding is open.
    mass: float32, the sum that elects the sign. gain: an upper bound of |lambda| / divisor, which carries the rounding
    of the sum into the output.
    """

    ambiguous: Model | None = None
    magnitude: Model | None = None
    mass: Model | None = None
    gain: float = 1.0


def ties_allowance(statistics: Statistics, gain: float) -> Allowance:
    """Ties always; rounding and open signs from five experts on."""
    stacked = len(statistics.experts) >= STACKED_SUM_DIFFERS_FROM
    return Allowance(
        ambiguous=statistics.ambiguous,
        magnitude=statistics.magnitude if stacked else None,
        mass=statistics.mass if stacked else None,
        gain=gain,
    )


def compare(ours: Model, theirs: Model, allowance: Allowance) -> Comparison:
    """Explain each difference of two merged models of the same names, dtypes and shapes."""
    found = Comparison()
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    for name in sorted(ours):
        left, right = ours[name], theirs[name]
        assert left.dtype == right.dtype, (name, left.dtype, right.dtype)
        assert left.shape == right.shape, (name, left.shape, right.shape)
        found.elements += left.size
        remaining = np.asarray(_bits(left) != _bits(right))
        found.identical += int((~remaining).sum())
        if is_float(left):
            _explain(found, name, widen(left), widen(right), remaining, allowance)
        elif remaining.any():
            found.unexplained.append(f"{name}: a tensor that is not merged differs")
    return found


def _explain(found: Comparison, name: str, left: Array, right: Array, remaining: Array, allowance: Allowance) -> None:
    """Move the differing elements of one tensor (`remaining`, used up) into the classes of `found`."""

    def allow(where: Array) -> int:
        counted = int((remaining & where).sum())
        remaining[where] = False
        return counted

    if allowance.ambiguous is not None:
        found.tied += allow(allowance.ambiguous[name])
    if allowance.magnitude is not None:
        slack = FEW * ULP * allowance.magnitude[name]
        gap = np.abs(left.astype(np.float64) - right.astype(np.float64))
        found.rounded += allow(gap <= slack * allowance.gain + 2 * ULP * np.abs(left))
        if allowance.mass is not None:
            found.undecided += allow(np.abs(allowance.mass[name]) <= slack)
    for position in np.argwhere(remaining):
        index = tuple(int(axis) for axis in position)
        found.unexplained.append(f"{name}{list(index)}: ours {left[index]!r}, theirs {right[index]!r}")


def _bits(array: Array) -> Array:
    """The array's elements as unsigned integers, so that -0.0 and NaN payloads compare by their bytes."""
    return np.ascontiguousarray(array).view(f"<u{array.dtype.itemsize}")
