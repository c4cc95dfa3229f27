"""Reading inputs and counting: what a worker does with one unit, or one tensor, before anything is merged.

All statistics are integers, so that counts add up to the same thresholds in any order and on any number of workers.
"""

from __future__ import annotations

import threading
from collections import Counter as Counts
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from ties_dist.compiler.slices import decoded, numbers
from ties_dist.dtypes import TYPES, DType
from ties_dist.errors import CheckpointError, PlanError
from ties_dist.messages import SHORTAGES, reason
from ties_dist.planning.layout import Segment
from ties_dist.planning.plan import MergePlan
from ties_dist.thresholds import (
    KEEP_ALL,
    KEEP_NONE,
    NO_WINDOW,
    ZEROS,
    Cuts,
    Histogram,
    TensorCut,
    Threshold,
    Window,
    coarse_bucket,
    resolve,
)
from ties_dist.values.inputs import Input
from ties_dist.values.items import WorkItem
from ties_dist.values.observation import Observation
from ties_dist.values.views import Encoded, Files, Operand, blocks, read_bytes
from ties_dist.worker.joined import Joined

SELECT_SLICE = 1 << 22
"""Elements read at a time where a whole tensor is ranked."""


@dataclass
class ModelReader:
    """One input, opened for reading slices of parameters."""

    model: Input
    files: Files
    requested_bytes: int = 0
    _counting: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def read(self, tensor: str, start: int, stop: int) -> Operand:
        """Elements [start, stop) of a parameter. Raises CheckpointError where they cannot be had."""
        self._count(read_bytes(self.model.views[tensor], start, stop))
        return self._read(self.files, tensor, start, stop)

    def read_all(self, slices: Sequence[tuple[str, int, int]]) -> list[Operand]:
        """Several slices, neighbours in one go. Raises as `read`."""
        pieces = Counts(p for name, start, stop in slices for p in self.model.views[name].pieces(start, stop))
        self._count(sum(times * (piece.stop - piece.start) for piece, times in pieces.items()))
        joined = Joined(self.files)
        try:
            joined.expect(piece for piece, times in pieces.items() if times == 1)
        except OSError:
            joined = Joined(self.files)  # which of the slices it is, is said below
        return [self._read(joined, *each) for each in slices]

    def _count(self, requested: int) -> None:
        with self._counting:
            self.requested_bytes += requested

    def _read(self, files: Files, tensor: str, start: int, stop: int) -> Operand:
        view = self.model.views[tensor]
        try:
            return view.read(files, start, stop)
        except OSError as error:  # gone since its header was read, or a failing disk
            named = " or ".join(sorted({piece.file for piece in view.pieces(start, stop)}))
            said = f"'{self.model.name}': {named} cannot be read"
            if error.errno in SHORTAGES:
                raise PlanError(f"{said}: {reason(error)}") from error
            raise CheckpointError(f"{said}: {error.strerror or error}. Restore the file and run again.") from error

    def type(self, tensor: str) -> DType:
        """Of its operands."""
        return TYPES[self.model.views[tensor].dtype]

    @contextmanager
    def open(self, tensor: str, start: int, stop: int) -> Iterator[memoryview | Encoded]:
        """The content of an operand, while it is looked at."""
        operand = self.read(tensor, start, stop)
        try:
            yield operand.content
        finally:
            operand.release()

    def widened(self, tensor: str, start: int, stop: int) -> np.ndarray:
        """(n,) elements as float32, a copy."""
        operand = self.read(tensor, start, stop)
        try:
            return decoded(operand, 0, stop - start)
        finally:
            operand.release()


@dataclass
class Counter:
    """Opened inputs of one plan; counts what statistics of them are asked for."""

    plan: MergePlan
    open: Callable[[Input], Files]

    def __post_init__(self) -> None:
        models = (self.plan.base, *self.plan.operands, *self.plan.grams)
        opened = {id(m): ModelReader(m, self.open(m)) for m in models}
        self._models = list(opened.values())
        self.base = opened[id(self.plan.base)]
        self.operands = [opened[id(m)] for m in self.plan.operands]
        count = len(self.plan.experts)
        first = len(self.operands) - len(self.plan.extras) - count
        self.experts = self.operands[first : first + count]
        self.grams = [opened[id(m)] for m in self.plan.grams]

    @property
    def requested_bytes(self) -> int:
        return sum(m.requested_bytes for m in self._models)

    def segments(self, unit: WorkItem) -> list[Segment]:
        return [segment for segment, _ in self.plan.layout.placed(unit)]

    def observe(self, unit: WorkItem, windows: Mapping[int, Window], into: Observation) -> None:
        """Count |delta| over a unit's counted elements. windows: by expert, modulo their number."""
        into.items.add(unit)
        for expert, window in windows.items():
            into.histograms.setdefault(expert, Histogram(window))
        for segment in self.segments(unit):
            if segment.tensor.counted:
                self._observe_slice(segment.tensor.source, segment.start, segment.stop, into)

    def _observe_slice(self, tensor: str, start: int, stop: int, into: Observation) -> None:
        from ties_dist.kernels.histogram import count_magnitudes  # numba takes half a second to import

        with self.base.open(tensor, start, stop) as base:
            for number, reader in enumerate(self.experts):
                wanted = [(i, h) for i, h in into.histograms.items() if i % len(self.experts) == number]
                if not wanted:
                    continue
                before = wanted[0][1].nonfinite
                with reader.open(tensor, start, stop) as expert:
                    for one, other in self._pairs(tensor, base, reader, expert, stop - start):
                        for _, h in wanted:
                            count_magnitudes(one, other, h.coarse, h.fine, np.uint32(h.window.start_bits))
                if found := wanted[0][1].nonfinite - before:
                    into.nonfinite[number, tensor] = into.nonfinite.get((number, tensor), 0) + found

    def _pairs(
        self, tensor: str, base: memoryview | Encoded, reader: ModelReader, expert: memoryview | Encoded, size: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The base's and an expert's elements as the histograms take them: at once, or as they are decoded."""
        for low, high in blocks((base, expert), size):
            yield numbers(base, self.base.type(tensor), low, high), numbers(expert, reader.type(tensor), low, high)

    def count_ties(self, unit: WorkItem, bits: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """Per counted tensor of a unit and per expert, how many |delta| have the pattern `bits[expert]`."""
        from ties_dist.kernels.histogram import count_equal

        ties: dict[str, tuple[int, ...]] = {}
        for segment in self.segments(unit):
            if segment.tensor.counted:
                tensor, start, stop = segment.tensor.source, segment.start, segment.stop
                with self.base.open(tensor, start, stop) as base:
                    counts = []
                    for reader, pattern in zip(self.experts, bits, strict=True):
                        with reader.open(tensor, start, stop) as expert:
                            pairs = self._pairs(tensor, base, reader, expert, stop - start)
                            counts.append(sum(int(count_equal(*pair, np.uint32(pattern))) for pair in pairs))
                ties[tensor] = tuple(counts)
        return ties

    def find_tie(self, tensor: str, expert: int, bits: int, rank: int) -> int:
        """Flat index of the `rank`-th (from 0) element of a tensor whose |delta| has the pattern `bits`."""
        from ties_dist.kernels.histogram import count_equal, find_equal

        numel, reader = self.plan.sizes[tensor], self.experts[expert]
        for start in range(0, numel, SELECT_SLICE):
            stop = min(numel, start + SELECT_SLICE)
            with self.base.open(tensor, start, stop) as base, reader.open(tensor, start, stop) as values:
                at = start
                for pair in self._pairs(tensor, base, reader, values, stop - start):
                    found = int(find_equal(*pair, np.uint32(bits), rank))
                    if found >= 0:
                        return at + found
                    rank -= int(count_equal(*pair, np.uint32(bits)))
                    at += pair[0].size
        raise AssertionError(f"{tensor}: fewer entries at the threshold than counted")

    def count_nonfinite(self, tensor: str) -> dict[str, int]:
        """NaN and Inf in one tensor of base and experts, by name."""
        counts = {}
        for reader in (self.base, *self.experts):
            count = 0
            for start in range(0, self.plan.sizes[tensor], SELECT_SLICE):
                values = reader.widened(tensor, start, min(self.plan.sizes[tensor], start + SELECT_SLICE))
                count += int((~np.isfinite(values)).sum())
            counts[reader.model.name] = count
        return counts

    def select(self, tensor: str, numel: int) -> tuple[Cuts, dict[tuple[int, str], int]]:
        """Exact thresholds of one tensor for every expert, and its non-finite counts.

        Reads the tensor in slices: coarse counts (and zeros, where a rank follows from those), then fine counts of the
        buckets that hold the ranks, then, where ties are cut, the position of the cut. Reads after the first come from
        the page cache.
        """
        rule = self.plan.needs.trim
        assert rule is not None
        densities = [numbers["density"] for numbers in self.plan.numbers[tensor].experts]
        asked = [i for i, density in enumerate(densities) if numel and rule.rank(numel, density) is not None]
        first = {i: ZEROS if rule.is_of_moved(i) else NO_WINDOW for i in asked}
        seen = self._select_pass(tensor, numel, first)
        if seen.nonfinite:
            return tuple(TensorCut(KEEP_ALL.bits, numel) for _ in densities), seen.nonfinite
        ranks: list[int | None] = [None] * len(densities)
        for i, histogram in seen.histograms.items():
            zeros = int(histogram.fine[0]) if rule.is_of_moved(i) else 0
            ranks[i] = rule.rank(rule.ranked(i, numel, zeros), densities[i])
        resolved = {i: KEEP_ALL if rank is None else KEEP_NONE for i, rank in enumerate(ranks) if not rank}
        windows = {}
        for i, histogram in seen.histograms.items():
            if i in resolved:
                continue
            bucket = coarse_bucket(histogram.coarse, ranks[i] or 0)[0]
            windows[i] = Window(bucket, 1)
        for i, histogram in self._select_pass(tensor, numel, windows).histograms.items():
            threshold = resolve(histogram, ranks[i] or 0)
            assert isinstance(threshold, Threshold)
            resolved[i] = threshold
        cuts = []
        for i, rank in enumerate(ranks):
            found, ties = resolved[i], numel
            if rule.tie_policy == "exact_k" and rank and found.above + found.equal > rank:
                ties = self.find_tie(tensor, i, found.bits, rank - found.above)
            cuts.append(TensorCut(found.bits, ties))
        return tuple(cuts), {}

    def _select_pass(self, tensor: str, numel: int, windows: Mapping[int, Window]) -> Observation:
        seen = Observation(histograms={i: Histogram(w) for i, w in windows.items()})
        if windows:
            for start in range(0, numel, SELECT_SLICE):
                self._observe_slice(tensor, start, min(numel, start + SELECT_SLICE), seen)
        return seen

    def sample(
        self, slices: Sequence[tuple[str, int, int]], weights: Sequence[float], experts: Sequence[int]
    ) -> tuple[dict[int, np.ndarray], np.ndarray]:
        """|delta| of some slices (tensor, start, stop), by expert (n,) float32, and each one's weight, (n,) float64.

        For predictions only.
        """
        size = sum(stop - start for _, start, stop in slices)
        collected = {i: np.empty(size, np.float32) for i in experts}
        at = 0
        with np.errstate(invalid="ignore", over="ignore"):
            for tensor, start, stop in slices:
                base, end = self.base.widened(tensor, start, stop), at + stop - start
                for i, into in collected.items():
                    np.abs(self.experts[i].widened(tensor, start, stop) - base, out=into[at:end])
                at = end
        lengths = [stop - start for _, start, stop in slices]
        return collected, np.repeat(np.array(weights, np.float64), lengths)
