"""Normalised accuracies and their differences, with intervals from a bootstrap over seeds and groups of examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 2000

Values = Mapping[str, np.ndarray]
"""Task -> (examples,) float64."""
Groups = Mapping[str, Sequence[str]]
"""Task -> the group of each example: those of one group are drawn together."""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and tasks, and the bounds of its 95 % interval; in points of 100."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.1f} ({self.low:.1f} to {self.high:.1f})"

    @property
    def separated(self) -> bool:
        """Whether 0 lies outside of the interval."""
        return not self.low <= 0 <= self.high


def estimate(seeds: Sequence[tuple[Values, Groups]]) -> Estimate:
    """Mean over seeds of the mean over tasks of the mean over examples.

    The expert's accuracy that scores are normalised by counts as known.
    """
    rng = np.random.default_rng(0)
    drawn = np.zeros((len(seeds), DRAWS))
    means = np.zeros(len(seeds))
    for s, (values, groups) in enumerate(seeds):
        for task, value in values.items():
            _, member = np.unique(np.asarray(groups[task]), return_inverse=True)
            sums, sizes = np.bincount(member, value), np.bincount(member).astype(float)
            times = rng.multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), DRAWS)
            drawn[s] += (times @ sums) / (times @ sizes) / len(values)
            means[s] += value.mean() / len(values)
    picked = rng.integers(0, len(seeds), (len(seeds), DRAWS))
    totals = np.take_along_axis(drawn, picked, axis=0).mean(axis=0)
    low, high = np.percentile(totals, [2.5, 97.5])
    return Estimate(100 * float(means.mean()), 100 * float(low), 100 * float(high))


def verdict(difference: Estimate, *, expected: int) -> str:
    """expected: the sign that the paper reports."""
    if not difference.separated:
        return "not separable"
    return "reproduced" if np.sign(difference.mean) == expected else "contradicted"
