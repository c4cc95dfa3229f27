"""From integer histograms to exact thresholds.

A histogram is mergeable by addition, in any order and on any number of workers; nothing here reads a tensor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

COARSE_SHIFT = 16
COARSE_BUCKETS = 1 << 15
FINE_BUCKETS = 1 << COARSE_SHIFT
NONFINITE_BUCKET = 0x7F80


class Window(NamedTuple):
    """Consecutive coarse buckets counted bit by bit: [first, first + buckets)."""

    first: int
    buckets: int

    @property
    def start_bits(self) -> int:
        return self.first << COARSE_SHIFT

    def __contains__(self, bucket: object) -> bool:
        return isinstance(bucket, int) and self.first <= bucket < self.first + self.buckets


NO_WINDOW = Window(0, 0)
ZEROS = Window(0, 1)
"""Its first count is how many magnitudes are zero."""


@dataclass
class Histogram:
    """Counts of |delta| of one expert. coarse: (32768,) int64. fine: (window.buckets * 65536,) int64."""

    window: Window = NO_WINDOW
    coarse: np.ndarray = field(default_factory=lambda: np.zeros(COARSE_BUCKETS, dtype=np.int64))
    fine: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def __post_init__(self) -> None:
        if self.fine.size != self.window.buckets * FINE_BUCKETS:
            self.fine = np.zeros(self.window.buckets * FINE_BUCKETS, dtype=np.int64)

    def add(self, other: Histogram) -> None:
        assert self.window == other.window
        self.coarse += other.coarse
        self.fine += other.fine

    @property
    def total(self) -> int:
        return int(self.coarse.sum())

    @property
    def nonfinite(self) -> int:
        return int(self.coarse[NONFINITE_BUCKET:].sum())


class Threshold(NamedTuple):
    """An exact order statistic. bits: float32 pattern of T; above, equal: how many magnitudes are > T and == T."""

    bits: int
    above: int
    equal: int

    @property
    def value(self) -> float:
        return from_bits(self.bits)

    @property
    def ranked(self) -> bool:
        """Whether it is an order statistic, not one of the two constants below."""
        return self.above + self.equal > 0


def coarse_bucket(coarse: np.ndarray, rank: int) -> tuple[int, int]:
    """Bucket of the `rank`-th largest (from 1), and how many magnitudes lie in higher buckets."""
    from_top = np.cumsum(coarse[::-1])
    place = int(np.searchsorted(from_top, rank))
    bucket = len(coarse) - 1 - place
    return bucket, int(from_top[place] - coarse[bucket])


def fine_threshold(fine: np.ndarray, bucket: int, higher: int, rank: int) -> Threshold:
    """The exact value of the `rank`-th largest, given the (65536,) counts inside its bucket."""
    low, above = coarse_bucket(fine, rank - higher)
    return Threshold(bits=(bucket << COARSE_SHIFT) + low, above=higher + above, equal=int(fine[low]))


def resolve(histogram: Histogram, rank: int) -> Threshold | int:
    """The exact threshold of a rank, or the bucket that has to be counted finely first."""
    bucket, higher = coarse_bucket(histogram.coarse, rank)
    if bucket not in histogram.window:
        return bucket
    first = (bucket - histogram.window.first) * FINE_BUCKETS
    return fine_threshold(histogram.fine[first : first + FINE_BUCKETS], bucket, higher, rank)


class Prediction(NamedTuple):
    """What a sample says of a threshold. above, equal: estimated shares of the entries > and == its value.

    error: standard error of such a share, of as many independent entries.
    """

    value: float
    above: float
    equal: float
    error: float


def predict(magnitudes: np.ndarray, weights: np.ndarray, share: float) -> Prediction:
    """The value that the top `share` of all entries reach, from a stratified sample.

    magnitudes: (n,) float32. weights: (n,) float64, entries of the model that each sampled one stands for.
    """
    bits = magnitudes.view(np.uint32)
    total = float(weights.sum())
    # The bucket that the share falls into, by the upper bits, and then its entries alone: sorting all takes 20 times
    # as long.
    from_top = np.cumsum(np.bincount(bits >> COARSE_SHIFT, weights, COARSE_BUCKETS)[::-1])
    bucket = COARSE_BUCKETS - 1 - min(int(np.searchsorted(from_top, share * total)), COARSE_BUCKETS - 1)
    higher = float(from_top[COARSE_BUCKETS - 2 - bucket]) if bucket < COARSE_BUCKETS - 1 else 0.0
    among = np.flatnonzero(bits >> COARSE_SHIFT == bucket)
    low = np.bincount(bits[among] & np.uint32(FINE_BUCKETS - 1), weights[among], FINE_BUCKETS)
    present = np.flatnonzero(low)[::-1]
    mass = low[present]
    reached = higher + np.cumsum(mass)
    at = min(len(present) - 1, int(np.searchsorted(reached, share * total)))
    return Prediction(
        value=from_bits((bucket << COARSE_SHIFT) + int(present[at])),
        above=float(reached[at] - mass[at]) / total,
        equal=float(mass[at]) / total,
        error=math.sqrt(share * (1 - share) / len(bits)),
    )


def zero_share(magnitudes: np.ndarray, weights: np.ndarray) -> float:
    """The share of zeros that a weighted sample has. magnitudes: (n,) float32; weights: (n,) float64."""
    return float(weights[magnitudes == 0].sum() / weights.sum()) if magnitudes.size else 0.0


def guess_window(value: float, buckets: int = 4) -> Window:
    """The buckets in which a threshold near `value` is expected.

    A coarse bucket spans 0.8 % of its value; a sample of two million is good for a tenth of that, so four buckets
    (0.5 MiB of counters each) nearly always hold it. A wrong guess costs one more read, never a wrong result.
    """
    # The half of the bucket the value lies in says on which side a neighbour is likelier.
    first = (to_bits(value) + (1 << (COARSE_SHIFT - 1)) >> COARSE_SHIFT) - buckets // 2
    return Window(max(0, min(first, COARSE_BUCKETS - buckets)), buckets)


def proves(threshold_rank: int, above: int, equal: int) -> bool:
    """Whether counted entries above and at a value prove that it is the `threshold_rank`-th largest."""
    return above < threshold_rank <= above + equal


def to_bits(value: float) -> int:
    return int(np.float32(value).view(np.uint32))


def from_bits(bits: int) -> float:
    return float(np.uint32(bits).view(np.float32))


class TensorCut(NamedTuple):
    """What a slice needs of one expert's threshold: the pattern of T, and how many leading elements of the tensor
    keep entries equal to T."""

    bits: int
    ties: int


class ModelCut(NamedTuple):
    """A whole-model threshold of one expert. Ties before element `before` of `tensor`, in canonical order, are kept.

    tensor None: all ties are kept.
    """

    threshold: Threshold
    tensor: str | None = None
    before: int = 0

    def of(self, tensor: str, numel: int) -> TensorCut:
        if self.tensor is None or tensor < self.tensor:
            return TensorCut(self.threshold.bits, numel)
        return TensorCut(self.threshold.bits, self.before if tensor == self.tensor else 0)


KEEP_ALL = Threshold(bits=0, above=0, equal=0)
"""Density 1: every magnitude is >= 0."""
KEEP_NONE = Threshold(bits=NONFINITE_BUCKET << COARSE_SHIFT, above=0, equal=0)
"""k = 0: no finite magnitude is >= Inf."""

Cuts = tuple[TensorCut, ...]
"""One per expert; empty where a method trims nothing."""


def split_points(cuts: Cuts, start: int, stop: int) -> list[int]:
    """Where [start, stop) must be split so that each piece keeps all ties of an expert, or none: the inner bounds."""
    return sorted({cut.ties for cut in cuts if start < cut.ties < stop})
