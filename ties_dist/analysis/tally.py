"""What an analysis keeps of the units that were read: integers, which add up in any order and from any cut.

Sums of products and means are float64 over pieces that end at multiples of 1 MiB of the output file, whatever the unit
size; from there on they are added as integers (multiples of 2^-1074), so that a result is a function of the inputs.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from ties_dist.analysis.loops import (
    ARMS,
    BUCKET_SHIFT,
    BUCKETS,
    compare,
    measure,
    multiply,
    widen,
)
from ties_dist.compiler.slices import numbers
from ties_dist.dtypes import ITEM_BYTES, DType
from ties_dist.planning.layout import Segment
from ties_dist.storage.base import BLOCK_BYTES
from ties_dist.thresholds import COARSE_SHIFT, NONFINITE_BUCKET
from ties_dist.values.items import WorkItem
from ties_dist.values.views import Encoded, Operand
from ties_dist.worker.merging import MergeStep

BLOCK = 1 << 14
"""Elements handled at a time: the deltas of some ten experts stay in a core's cache."""
FLOAT_SHIFT = 1074
"""Every float64 is a whole multiple of 2^-1074."""
NONFINITE = NONFINITE_BUCKET >> (BUCKET_SHIFT - COARSE_SHIFT)
"""Upper bits of Inf and NaN, above every threshold."""


def exact(values: np.ndarray) -> list[int]:
    """float64 numbers as multiples of 2^-1074; NaN and Inf, which are counted elsewhere, as 0."""
    found = []
    for value in np.where(np.isfinite(values), values, 0.0).ravel().tolist():
        numerator, denominator = value.as_integer_ratio()
        found.append(numerator << (FLOAT_SHIFT + 1 - denominator.bit_length()))
    return found


def as_floats(values: Sequence[int]) -> np.ndarray:
    """The float64 nearest to each sum of `exact`."""
    return np.array([value / (1 << FLOAT_SHIFT) for value in values], np.float64)


def added(left: Sequence[int], right: Sequence[int]) -> list[int]:
    return [a + b for a, b in zip(left, right, strict=True)]


@dataclass(frozen=True)
class Buckets:
    """The buckets of |delta| for one expert's thresholds, as `kernels.analysis` numbers them.

    thresholds: float32 patterns, ascending. edges: (2047 + 2 D,) patterns; bucket b is [edges[b - 1], edges[b]).
    """

    thresholds: tuple[int, ...]

    @property
    def count(self) -> int:
        return BUCKETS + 2 * len(self.thresholds)

    @cached_property
    def starts(self) -> np.ndarray:
        """(count,) int64, the smallest pattern of each bucket; one that no pattern falls into starts where the next
        does."""
        inner = [np.arange(1, BUCKETS, dtype=np.int64) << BUCKET_SHIFT]
        inner += [np.array([t, t + 1], np.int64) for t in self.thresholds]
        edges: np.ndarray = np.sort(np.concatenate(inner))
        return np.concatenate([np.zeros(1, np.int64), edges])

    def masses(self, significands: np.ndarray) -> np.ndarray:
        """(count,) float64 sums of |delta|, each rounded once."""
        masses: np.ndarray = np.ldexp(significands.astype(np.float64), self._exponents)
        return masses

    @cached_property
    def _exponents(self) -> np.ndarray:
        exponents: np.ndarray = np.maximum(self.starts >> 23, 1) - 150
        return exponents


@dataclass
class TensorTally:
    """Of one tensor. cells: places in (experts, buckets), flattened, that are not empty, ascending; counts and
    significands: of each. conflicts: as of `compare`. gram: inner products of the deltas and, last, the base's values,
    (experts + 1)^2 exact sums of which the upper triangle is filled."""

    cells: np.ndarray
    counts: np.ndarray
    significands: np.ndarray
    conflicts: np.ndarray
    gram: list[int]

    def add(self, other: TensorTally) -> None:
        cells = np.union1d(self.cells, other.cells)
        counts, significands = np.zeros(cells.size, np.int64), np.zeros(cells.size, np.int64)
        for part in (self, other):
            places = np.searchsorted(cells, part.cells)
            counts[places] += part.counts
            significands[places] += part.significands
        self.cells, self.counts, self.significands = cells, counts, significands
        self.conflicts = self.conflicts + other.conflicts
        self.gram = added(self.gram, other.gram)

    def dense(self, experts: int, buckets: int) -> tuple[np.ndarray, np.ndarray]:
        """Counts and significands, each (experts, buckets) int64."""
        found = np.zeros((2, experts * buckets), np.int64)
        found[0, self.cells], found[1, self.cells] = self.counts, self.significands
        return found[0].reshape(experts, buckets), found[1].reshape(experts, buckets)


@dataclass
class Signs:
    """Of the whole model, as of `compare`. counts: (N + 1, N + 1) int64, parameters by surviving positive and negative
    deltas; sums: exact, three a count."""

    counts: np.ndarray
    sums: list[int]

    @classmethod
    def empty(cls, experts: int) -> Signs:
        return cls(np.zeros((experts + 1, experts + 1), np.int64), [0] * (ARMS * (experts + 1) ** 2))

    def add(self, other: Signs) -> None:
        self.counts = self.counts + other.counts
        self.sums = added(self.sums, other.sums)


@dataclass
class Tally:
    """Of some units, each once. tensors: by source name. nonfinite: (expert, tensor) -> entries."""

    signs: Signs
    tensors: dict[str, TensorTally] = field(default_factory=dict)
    nonfinite: dict[tuple[int, str], int] = field(default_factory=dict)

    def add(self, other: Tally) -> None:
        self.signs.add(other.signs)
        for name, tensor in other.tensors.items():
            self.add_tensor(name, tensor)
        for key, count in other.nonfinite.items():
            self.nonfinite[key] = self.nonfinite.get(key, 0) + count

    def add_tensor(self, name: str, tensor: TensorTally) -> None:
        if name in self.tensors:
            self.tensors[name].add(tensor)
        else:
            self.tensors[name] = tensor

    def as_kept(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Facts for JSON, and arrays: of a `Snapshot`. Exact sums are hexadecimal there."""
        parts = self.tensors.values()
        facts = {
            "tensors": {name: [t.cells.size, [f"{v:x}" for v in t.gram]] for name, t in self.tensors.items()},
            "sums": [f"{v:x}" for v in self.signs.sums],
            "nonfinite": [[*key, count] for key, count in self.nonfinite.items()],
        }
        columns = ("cells", "counts", "significands", "conflicts")
        arrays = {kind: np.concatenate([getattr(t, kind) for t in parts]) for kind in columns if parts}
        return facts, {"signs": self.signs.counts, **arrays}

    @classmethod
    def from_kept(cls, facts: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Tally:
        """The reverse."""
        tally = cls(Signs(arrays["signs"], [int(v, 16) for v in facts["sums"]]))
        tally.nonfinite = {(expert, name): count for expert, name, count in facts["nonfinite"]}
        experts, start = len(tally.signs.counts) - 1, 0
        for number, (name, (size, gram)) in enumerate(facts["tensors"].items()):
            cells, counts, significands = (arrays[k][start : start + size] for k in ("cells", "counts", "significands"))
            conflicts = arrays["conflicts"][number * experts : (number + 1) * experts]
            tally.tensors[name] = TensorTally(cells, counts, significands, conflicts, [int(v, 16) for v in gram])
            start += size
        return tally


@dataclass
class TallyStep(MergeStep):
    """turns: for those that count; whoever waits for one has read ahead."""

    turns: threading.Semaphore = field(default_factory=threading.Semaphore)


@dataclass(frozen=True)
class Analyse:
    """Tallies a unit. thresholds: per expert, float32 patterns from the largest density's to the smallest's; chosen:
    which of them the figures are trimmed at."""

    thresholds: tuple[tuple[int, ...], ...]
    chosen: int

    def __call__(self, step: MergeStep, unit: WorkItem) -> Tally:
        tallying, counter = Tallying(self), step.worker
        models = (counter.base, *counter.experts)
        segments = [s for s in counter.segments(unit) if s.tensor.counted]
        operands: list[list[Operand]] = []
        try:
            for s in segments:
                operands.append([])
                for m in models:
                    operands[-1].append(m.read(s.tensor.source, s.start, s.stop))
            with step.turns if isinstance(step, TallyStep) else nullcontext():
                for s, read in zip(segments, operands, strict=True):
                    tallying.segment(
                        s, [operand.content for operand in read], [m.type(s.tensor.source) for m in models]
                    )
        finally:
            for read in operands:
                for operand in read:
                    operand.release()
        return tallying.tally


class Tallying:
    """One call's arrays, used for all tensors of a unit."""

    def __init__(self, task: Analyse) -> None:
        experts, densities = len(task.thresholds), len(task.thresholds[0])
        self.task, self.experts, self.densities = task, experts, densities
        self.thresholds = [np.array(t, np.int32) for t in task.thresholds]
        self.counts = np.zeros((experts, BUCKETS + 2 * densities), np.int64)
        self.significands = np.zeros_like(self.counts)
        self.rows = np.empty((experts + 1, BLOCK), np.float32)
        self.levels = np.empty((experts, BLOCK), np.int8)
        self.tally = Tally(Signs.empty(experts))

    def segment(self, segment: Segment, contents: Sequence[memoryview | Encoded], types: Sequence[DType]) -> None:
        """contents: of the segment in the base and the experts, of `types`."""
        name = segment.tensor.source
        conflicts = np.zeros((self.experts, self.densities + 1), np.int64)
        gram = [0] * (self.experts + 1) ** 2
        for start, stop in pieces(segment):
            low, high = start - segment.start, stop - segment.start
            gram = added(gram, self._piece(contents, types, low, high, conflicts))
        for expert, count in enumerate(self.counts[:, NONFINITE + 2 * self.densities :].sum(axis=1)):
            if count:
                self.tally.nonfinite[expert, name] = self.tally.nonfinite.get((expert, name), 0) + int(count)
        cells = np.flatnonzero(self.counts)
        counts, significands = self.counts.ravel()[cells], self.significands.ravel()[cells]
        self.tally.add_tensor(name, TensorTally(cells, counts, significands, conflicts, gram))
        self.counts.ravel()[cells] = 0
        self.significands.ravel()[cells] = 0

    def _piece(
        self,
        contents: Sequence[memoryview | Encoded],
        types: Sequence[DType],
        low: int,
        high: int,
        conflicts: np.ndarray,
    ) -> list[int]:
        """Elements [low, high) of a segment. Adds to the counts; returns the exact Gram matrix."""
        signs = Signs.empty(self.experts)
        gram, sums = np.zeros((self.experts + 1, self.experts + 1)), np.zeros((*signs.counts.shape, ARMS))
        for start in range(low, high, BLOCK):
            stop = min(high, start + BLOCK)
            base, *experts = (numbers(c, t, start, stop) for c, t in zip(contents, types, strict=True))
            rows, levels = self.rows[:, : base.size], self.levels[:, : base.size]
            for i, values in enumerate(experts):
                measure(base, values, self.thresholds[i], self.counts[i], self.significands[i], rows[i], levels[i])
            widen(base, rows[-1])
            multiply(rows, gram)
            compare(rows[:-1], levels, self.task.chosen, conflicts, signs.counts, sums)
        signs.sums = exact(sums)
        self.tally.signs.add(signs)
        return exact(gram)


def pieces(segment: Segment) -> Iterator[tuple[int, int]]:
    """Elements of a segment, cut at multiples of 1 MiB of the file it is laid out in."""
    item, start = ITEM_BYTES[segment.tensor.dtype], segment.start
    while start < segment.stop:
        offset = segment.offset + (start - segment.start) * item
        stop = min(segment.stop, start + (BLOCK_BYTES - offset % BLOCK_BYTES) // item)
        yield start, stop
        start = stop
