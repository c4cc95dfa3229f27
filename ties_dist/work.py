"""What a worker does with one unit: observe it, or merge it. All a worker ever runs.

Here bytes in files and arithmetic on tensors meet, and nowhere else. A unit's three steps (load, compute, store) are
separate, so that an executor can read ahead and write behind one compute caller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ties_dist.errors import CheckpointError
from ties_dist.kernels.histogram import count_equal, count_magnitudes, find_equal, loadable
from ties_dist.kernels.merge import SMALL_SLICE, KernelKind, MergeKernel
from ties_dist.layout import ITEM_BYTES, Segment
from ties_dist.methods.base import Cut, State
from ties_dist.planning import Input, MergePlan, Unit, digest
from ties_dist.storage.base import BLOCK_BYTES, Reader, Span, Writer
from ties_dist.storage.buffers import Buffers
from ties_dist.threshold import (
    KEEP_ALL,
    KEEP_NONE,
    Cuts,
    Histogram,
    TensorCut,
    Threshold,
    Window,
    from_bits,
    resolve,
    split_points,
)

TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SELECT_SLICE = 1 << 22
"""Elements read at a time where a whole tensor is ranked."""


@dataclass
class ModelReader:
    """One input, opened for reading slices of tensors."""

    model: Input
    reader: Reader
    requested_bytes: int = 0

    def read(self, tensor: str, start: int, stop: int) -> Span:
        """Bytes of elements [start, stop) of a tensor, as stored. Raises CheckpointError where they cannot be had."""
        source = self.model.tensors[tensor]
        item = ITEM_BYTES[source.dtype]
        self.requested_bytes += (stop - start) * item
        try:
            return self.reader.read(source.file, source.start + start * item, source.start + stop * item)
        except OSError as error:  # gone since its header was read, or a failing disk
            reason = error.strerror or str(error)
            raise CheckpointError(
                f"'{self.model.name}': {source.file} cannot be read: {reason}. Restore the file and run again."
            ) from error

    def view(self, tensor: str, span: Span) -> Tensor:
        """(n,) tensor of the stored dtype over a span's bytes, without a copy."""
        return torch.frombuffer(span.view, dtype=TORCH_DTYPES[self.model.tensors[tensor].dtype])

    @contextmanager
    def slice(self, tensor: str, start: int, stop: int) -> Iterator[Tensor]:
        span = self.read(tensor, start, stop)
        try:
            yield self.view(tensor, span)
        finally:
            span.release()


@dataclass
class Observation:
    """Integer statistics of some units: mergeable by addition, each unit once. nonfinite: tensor -> counts."""

    units: set[Unit] = field(default_factory=set)
    histograms: dict[int, Histogram] = field(default_factory=dict)
    nonfinite: dict[tuple[int, str], int] = field(default_factory=dict)

    def add(self, other: Observation) -> None:
        """Fold in a partial that shares no unit with this one."""
        assert not self.units & other.units
        self.units |= other.units
        for expert, histogram in other.histograms.items():
            if expert in self.histograms:
                self.histograms[expert].add(histogram)
            else:
                self.histograms[expert] = histogram
        for key, count in other.nonfinite.items():
            self.nonfinite[key] = self.nonfinite.get(key, 0) + count


@dataclass(frozen=True, kw_only=True)
class MergeTask:
    """One unit and the state it is merged with: cuts by source tensor, and the sign of exact cancellations."""

    unit: Unit
    cuts: Mapping[str, Cuts]
    majority: int

    @cached_property
    def state_digest(self) -> str:
        """Digest of the thresholds alone; the majority sign stands beside it in the journal."""
        return digest(repr(sorted(self.cuts.items())).encode())


@dataclass(frozen=True, kw_only=True)
class MergeResult:
    """A unit whose bytes are written, not yet durable.

    blocks: digest of each 1 MiB block of the file the unit covers. counts: per source tensor, in the order of
    `MergePlan.counter_names`. dependent: entries whose result depends on the majority sign; sign_sum: of elected signs.
    """

    unit: Unit
    state_digest: str
    majority: int
    blocks: tuple[str, ...]
    counts: Mapping[str, tuple[int, ...]]
    dependent: int
    sign_sum: int = 0


@dataclass
class Worker:
    """Opened inputs and a compiled kernel: does units of one plan, one compute caller at a time."""

    plan: MergePlan
    reader: Callable[[Path], Reader]
    kernel_kind: KernelKind = "auto"

    def __post_init__(self) -> None:
        opened = {id(m): ModelReader(m, self.reader(Path(m.path))) for m in (self.plan.base, *self.plan.operands)}
        self._models = list(opened.values())
        self.base = opened[id(self.plan.base)]
        self.operands = [opened[id(m)] for m in self.plan.operands]
        count = len(self.plan.experts)
        first = len(self.operands) - len(self.plan.extras) - count
        self.experts = self.operands[first : first + count]
        self._state = lru_cache(maxsize=4096)(self._build_state)

    @property
    def requested_bytes(self) -> int:
        return sum(m.requested_bytes for m in self._models)

    @cached_property
    def kernel(self) -> MergeKernel:
        elements = self.plan.elements * len(self.plan.experts)
        return MergeKernel(self.plan.method, self.kernel_kind, operand_elements=elements)

    def warm_up(self) -> None:
        """Compile the kernel for the types of these models, while others are reading headers, samples or a scan."""
        plan, count = self.plan, len(self.plan.experts)
        done: set[tuple[str, ...]] = set()
        for tensor in plan.tensors if self.kernel.kind == "compiled" else ():
            types = (*(m.model.tensors[tensor.source].dtype for m in self.operands if tensor.merged), tensor.dtype)
            if not tensor.merged or tensor.numel < SMALL_SLICE or types in done:
                continue
            done.add(types)
            *read, written = (TORCH_DTYPES[t] for t in types)
            first = len(read) - len(plan.extras) - count
            numbers = plan.numbers[tensor.source]
            cuts = [Cut(threshold=0.0, keep=0.0)] * (count if plan.method.trim else 0)
            state = plan.method.state(numbers.parameters, numbers.experts, cuts, 1)
            self.kernel.warm_up(read[0], read[first : first + count], read[first + count :], state, written)

    def segments(self, unit: Unit) -> list[Segment]:
        return list(self.plan.layout.by_name[unit.shard].segments(unit.start, unit.stop))

    # Statistics

    def observe(self, unit: Unit, windows: Mapping[int, Window], into: Observation) -> None:
        """Count |delta| of the experts named in `windows` over a unit's counted elements."""
        into.units.add(unit)
        for expert, window in windows.items():
            into.histograms.setdefault(expert, Histogram(window))
        for segment in self.segments(unit):
            if segment.tensor.counted:
                self._observe_slice(segment.tensor.source, segment.start, segment.stop, into)

    def _observe_slice(self, tensor: str, start: int, stop: int, into: Observation) -> None:
        with self.base.slice(tensor, start, stop) as base:
            theta = loadable(base)
            for expert, histogram in into.histograms.items():
                before = histogram.nonfinite
                with self.experts[expert].slice(tensor, start, stop) as values:
                    count_magnitudes(
                        theta,
                        loadable(values),
                        histogram.coarse,
                        histogram.fine,
                        np.uint32(histogram.window.start_bits),
                    )
                if histogram.nonfinite != before:
                    key = (expert, tensor)
                    into.nonfinite[key] = into.nonfinite.get(key, 0) + histogram.nonfinite - before

    def count_ties(self, unit: Unit, bits: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """Per counted tensor of a unit and per expert, how many |delta| have the pattern `bits[expert]`."""
        ties: dict[str, tuple[int, ...]] = {}
        for segment in self.segments(unit):
            if segment.tensor.counted:
                with self.base.slice(segment.tensor.source, segment.start, segment.stop) as base:
                    theta = loadable(base)
                    counts = []
                    for expert, pattern in enumerate(bits):
                        with self.experts[expert].slice(segment.tensor.source, segment.start, segment.stop) as values:
                            counts.append(int(count_equal(theta, loadable(values), np.uint32(pattern))))
                ties[segment.tensor.source] = tuple(counts)
        return ties

    def find_tie(self, tensor: str, expert: int, bits: int, rank: int) -> int:
        """Flat index of the `rank`-th (from 0) element of a tensor whose |delta| has the pattern `bits`."""
        numel = self.plan.sizes[tensor]
        for start in range(0, numel, SELECT_SLICE):
            stop = min(numel, start + SELECT_SLICE)
            with self.base.slice(tensor, start, stop) as base, self.experts[expert].slice(tensor, start, stop) as e:
                found = int(find_equal(loadable(base), loadable(e), np.uint32(bits), rank))
                if found >= 0:
                    return start + found
                rank -= int(count_equal(loadable(base), loadable(e), np.uint32(bits)))
        raise AssertionError(f"{tensor}: fewer entries at the threshold than counted")

    def count_nonfinite(self, tensor: str) -> dict[str, int]:
        """NaN and Inf in one tensor of base and experts, by name."""
        counts = {}
        for reader in (self.base, *self.experts):
            count = 0
            for start in range(0, self.plan.sizes[tensor], SELECT_SLICE):
                with reader.slice(tensor, start, min(self.plan.sizes[tensor], start + SELECT_SLICE)) as values:
                    count += int((~torch.isfinite(values)).sum())
            counts[reader.model.name] = count
        return counts

    def select(self, tensor: str, numel: int) -> tuple[Cuts, dict[tuple[int, str], int]]:
        """Exact thresholds of one tensor for every expert, and its non-finite counts.

        Reads the tensor in slices: coarse counts, then fine counts of the buckets that hold the ranks, then, where
        ties are cut, the position of the cut. Reads after the first come from the page cache.
        """
        rule = self.plan.method.trim
        assert rule is not None
        densities = [numbers["density"] for numbers in self.plan.numbers[tensor].experts]
        ranks = [rule.rank(numel, density) if numel else None for density in densities]
        resolved: dict[int, Threshold] = {
            i: KEEP_ALL if rank is None else KEEP_NONE for i, rank in enumerate(ranks) if not rank
        }
        seen = self._select_pass(tensor, numel, {i: Window(0, 0) for i in range(len(ranks)) if i not in resolved})
        if seen.nonfinite:
            return tuple(TensorCut(KEEP_ALL.bits, numel) for _ in ranks), seen.nonfinite
        windows = {}
        for i, histogram in seen.histograms.items():
            bucket = resolve(histogram, ranks[i] or 0)
            assert isinstance(bucket, int)
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
        self, slices: Sequence[tuple[str, int, int]], weights: Sequence[float]
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """|delta| of some slices (tensor, start, stop), per expert (n,) float32, and each one's weight, (n,) float64.

        For predictions only.
        """
        collected: list[list[Tensor]] = [[torch.zeros(0)] for _ in self.experts]
        for tensor, start, stop in slices:
            with self.base.slice(tensor, start, stop) as base:
                for expert, into in zip(self.experts, collected, strict=True):
                    with expert.slice(tensor, start, stop) as values:
                        into.append((values.float() - base.float()).abs())
        lengths = [stop - start for _, start, stop in slices]
        return [torch.cat(parts).numpy() for parts in collected], np.repeat(np.array(weights, np.float64), lengths)

    # Merge

    def merge_step(self, writer: Writer) -> MergeStep:
        return MergeStep(self, writer)

    def _build_state(
        self, parameters: tuple[tuple[str, float], ...], experts: tuple[tuple[tuple[str, float], ...], ...],
        cuts: tuple[tuple[float, float], ...], majority: int,
    ) -> State:  # fmt: skip
        return self.plan.method.state(
            dict(parameters), [dict(e) for e in experts], [Cut(threshold=t, keep=k) for t, k in cuts], majority
        )

    def merge_segment(
        self, segment: Segment, spans: Sequence[Span], cuts: Cuts, majority: int, out: memoryview
    ) -> np.ndarray:
        """Merge one segment into `out` (its bytes). Returns int64 counts in the order of `counter_names`."""
        tensor = segment.tensor
        views = [m.view(tensor.source, s) for m, s in zip(self.operands, spans, strict=True)]
        target = torch.frombuffer(out, dtype=TORCH_DTYPES[tensor.dtype])
        numbers = self.plan.numbers[tensor.source]
        key = (
            tuple(sorted(numbers.parameters.items())),
            tuple(tuple(sorted(e.items())) for e in numbers.experts),
        )
        n, first = len(self.plan.experts), len(self.operands) - len(self.plan.extras) - len(self.plan.experts)
        total = np.zeros(len(self.plan.counter_names), dtype=np.int64)
        bounds = [segment.start, *split_points(cuts, segment.start, segment.stop), segment.stop]
        for start, stop in pairwise(bounds):
            # Ties are kept up to the cut; a piece lies wholly on one side of it.
            ties = [start < cut.ties for cut in cuts]
            levels = tuple(
                (from_bits(c.bits), from_bits(c.bits if t else c.bits + 1)) for c, t in zip(cuts, ties, strict=True)
            )
            piece = [v[start - segment.start : stop - segment.start] for v in views]
            counts = self.kernel(
                piece[0],
                piece[first : first + n],
                piece[first + n :],
                self._state(*key, levels, majority),
                start,
                target[start - segment.start : stop - segment.start],
            ).numpy()
            if first == 0:
                counts = counts[1:]  # methods on weights: the first expert stood in for the base
            total[: len(counts)] += counts
            for i, (cut, tied) in enumerate(zip(cuts, ties, strict=True)):
                above, equal = counts[self._trim_offset + 2 * i], counts[self._trim_offset + 2 * i + 1]
                kept = above + (equal if tied else 0)
                total[len(counts) + 2 * i : len(counts) + 2 * i + 2] += (kept, kept if cut.bits else above)
        return total

    @cached_property
    def _trim_offset(self) -> int:
        return len(self.operands) + 1


@dataclass
class Loaded:
    """Spans of a unit's inputs: per segment, one per operand (merged) or the base's alone (copied)."""

    segments: list[Segment]
    spans: list[list[Span]]

    def release(self) -> None:
        for spans in self.spans:
            for span in spans:
                span.release()


@dataclass
class MergeStep:
    """The three steps of merging a unit: load and store may run on I/O threads, compute on one caller."""

    worker: Worker
    writer: Writer
    buffers: Buffers = field(default_factory=Buffers)

    @cached_property
    def sign_counter(self) -> int | None:
        names = self.worker.plan.counter_names
        return names.index("sign_sum") if "sign_sum" in names else None

    def load(self, task: MergeTask) -> Loaded:
        segments = self.worker.segments(task.unit)
        spans = []
        for s in segments:
            models = self.worker.operands if s.tensor.merged else [self.worker.base]
            spans.append([m.read(s.tensor.source, s.start, s.stop) for m in models])
        return Loaded(segments, spans)

    def compute(self, task: MergeTask, loaded: Loaded) -> tuple[np.ndarray, dict[str, tuple[int, ...]], int]:
        unit, worker = task.unit, self.worker
        shard = worker.plan.layout.by_name[unit.shard]
        buffer = self.buffers.take(unit.nbytes)
        out = buffer.data[: unit.nbytes]
        if unit.start < len(shard.header):
            head = shard.header[unit.start : unit.stop]
            out[: len(head)] = head
        counts: dict[str, tuple[int, ...]] = {}
        dependent = 0
        for segment, spans in zip(loaded.segments, loaded.spans, strict=True):
            place = out[segment.offset - unit.start : segment.offset - unit.start + segment.nbytes]
            if not segment.tensor.merged:
                place[:] = spans[0].view
                continue
            source = segment.tensor.source
            found = worker.merge_segment(segment, spans, task.cuts.get(source, ()), task.majority, place)
            if worker.plan.method.asks_majority:
                dependent += int(found[worker.plan.counter_names.index("cancellations")])
            if segment.tensor.counted:  # an alias is written again, but counted once
                counts[source] = tuple(int(c) for c in found)
        loaded.release()
        return buffer, counts, dependent

    def store(self, task: MergeTask, computed: tuple[np.ndarray, dict[str, tuple[int, ...]], int]) -> MergeResult:
        buffer, counts, dependent = computed
        block = buffer.data[: task.unit.nbytes]
        self.writer.write(task.unit.shard, task.unit.start, block)
        blocks = block_digests(block)
        self.buffers.give(buffer)
        return MergeResult(
            unit=task.unit,
            state_digest=task.state_digest,
            majority=task.majority,
            blocks=blocks,
            counts=counts,
            dependent=dependent,
            sign_sum=sum(c[self.sign_counter] for c in counts.values()) if self.sign_counter is not None else 0,
        )


def block_digests(content: memoryview) -> tuple[str, ...]:
    """Digest of each 1 MiB block; `content` starts at a block."""
    return tuple(digest(content[i : i + BLOCK_BYTES]) for i in range(0, len(content), BLOCK_BYTES))
