"""What a worker does with one unit: observe it, or merge it. All a worker ever runs.

Here bytes in files and arithmetic on tensors meet, and nowhere else. A unit's three steps (load, compute, store) are
separate, so that an executor can read ahead and write behind those that compute. Everything else it may be asked is an
operation: a small value that travels to where the worker is.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from ties_dist.checkpoints.forms.plain import Stored
from ties_dist.compiler.kernel import KernelKind, MergeKernel
from ties_dist.compiler.native import KernelStore
from ties_dist.compiler.slices import Slice, sliced, stored
from ties_dist.dtypes import ITEM_BYTES, LOOP_BYTES, TYPES, DType
from ties_dist.methods.base import Cut, State
from ties_dist.planning.layout import Segment, TensorSpec
from ties_dist.storage.base import Writer
from ties_dist.storage.buffers import Buffers
from ties_dist.storage.digests import block_digests
from ties_dist.thresholds import Cuts, from_bits, split_points
from ties_dist.values.items import MergeResult, MergeTask, WorkItem, output_files
from ties_dist.values.views import Encoded, Operand
from ties_dist.worker.counting import Counter
from ties_dist.worker.matrices import Matrices, MemoryMatrices

if TYPE_CHECKING:
    from ties_dist.compiler.cuda import Gpus


@dataclass
class Worker(Counter):
    """Opened inputs and a compiled kernel: does units of one plan."""

    kernel_kind: KernelKind = "auto"
    kernel_store: KernelStore = field(default_factory=KernelStore)
    gpus: Gpus | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.solving = threading.BoundedSemaphore(self.plan.solvers)
        self._state = lru_cache(maxsize=4096)(self._build_state)

    @cached_property
    def kernel(self) -> MergeKernel:
        return MergeKernel(self.plan.method, len(self.plan.experts), self.kernel_kind, self.kernel_store, self.gpus)

    def warm_up(self) -> None:
        """Make the kernels for the types of these models ready, while others are reading samples or a scan."""
        done: set[tuple[DType, ...]] = set()
        for tensor in self.plan.tensors if self.kernel_kind != "eager" and self.gpus is None else ():
            if not tensor.merged:
                continue
            types = self._types(tensor.source)
            if (*types, TYPES[tensor.dtype]) not in done:
                done.add((*types, TYPES[tensor.dtype]))
                cuts = ((0.0, 0.0),) * (len(self.plan.experts) if self.plan.method.trim else 0)
                self.kernel.prepare(types, TYPES[tensor.dtype], self._state(*self._key(tensor.source), cuts, 1))

    def _types(self, tensor: str) -> tuple[DType, ...]:
        return tuple(m.type(tensor) for m in self.operands)

    def sample_signs(
        self, slices: Sequence[tuple[str, int, int]], weights: Sequence[float], cuts: Mapping[str, Cuts]
    ) -> float:
        """The sum of elected signs that a sample of this size has, by merging its slices (tensor, start, stop) away.

        Weighted as they represent the model, but not scaled up to it: units that follow count as much per element.
        """
        signs, sampled, at = 0.0, 0, self.plan.counter_names.index("sign_sum")
        for (tensor, start, stop), weight in zip(slices, weights, strict=True):
            operands = [m.read(tensor, start, stop) for m in self.operands]
            written = self.base.model.views[tensor].dtype
            part = Part(
                tensor=tensor,
                written=written,
                start=start,
                stop=stop,
                contents=[operand.content for operand in operands],
                cuts=cuts[tensor],
                majority=1,
                out=memoryview(bytearray((stop - start) * ITEM_BYTES[written])),
            )
            signs += weight * float(self.merge_parts([part])[0][at])
            sampled += stop - start
            for operand in operands:
                operand.release()
        return signs * sampled / max(1, self.plan.elements)

    def _build_state(
        self, parameters: tuple[tuple[str, float], ...], experts: tuple[tuple[tuple[str, float], ...], ...],
        cuts: tuple[tuple[float, float], ...], majority: int,
    ) -> State:  # fmt: skip
        return self.plan.method.state(
            dict(parameters), [dict(e) for e in experts], [Cut(threshold=t, keep=k) for t, k in cuts], majority
        )

    def _key(
        self, tensor: str
    ) -> tuple[tuple[tuple[str, float], ...], tuple[tuple[tuple[str, float], ...], ...]]:  # fmt: skip
        numbers = self.plan.numbers[tensor]
        parameters = dict(numbers.parameters)
        if self.plan.method.is_random:
            parameters["tensor"] = float(xxhash.xxh32_intdigest(tensor.encode()))
        return (
            tuple(sorted(parameters.items())),
            tuple(tuple(sorted(e.items())) for e in numbers.experts),
        )

    def merge_parts(self, parts: Sequence[Part]) -> list[np.ndarray]:
        """Merge parts of tensors, all in one call of the kernel: a GPU is asked once per unit.

        Returns each part's counts, int64 in the order of `counter_names`.
        """
        pieces = [(part, *bounds) for part in parts for bounds in pairwise(part.bounds)]
        counted = iter(self.kernel([self._slice(*piece) for piece in pieces]))
        totals = []
        for part in parts:
            total = np.zeros(len(self.plan.counter_names), dtype=np.int64)
            for start, _ in pairwise(part.bounds):
                counts = next(counted)
                total[: len(counts)] += counts
                for i, cut in enumerate(part.cuts):
                    above, equal = counts[self._trim_offset + 2 * i], counts[self._trim_offset + 2 * i + 1]
                    kept = above + (equal if start < cut.ties else 0)
                    total[len(counts) + 2 * i : len(counts) + 2 * i + 2] += (kept, kept if cut.bits else above)
            totals.append(total)
        return totals

    def _slice(self, part: Part, start: int, stop: int) -> Slice:
        """Elements [start, stop) of a part, which lie wholly on one side of each cut of ties."""
        levels = tuple((from_bits(c.bits), from_bits(c.bits if start < c.ties else c.bits + 1)) for c in part.cuts)
        low, high = start - part.start, stop - part.start
        types, out_type = self._types(part.tensor), TYPES[part.written]
        item = LOOP_BYTES[out_type]
        return Slice(
            operands=[sliced(content, kind, low, high) for content, kind in zip(part.contents, types, strict=True)],
            types=types,
            state=self._state(*self._key(part.tensor), levels, part.majority),
            position=start,
            out=part.out[low * item : high * item],
            out_type=out_type,
        )

    @cached_property
    def _trim_offset(self) -> int:
        return len(self.operands) + 1


@dataclass(frozen=True, kw_only=True)
class Part:
    """Elements [start, stop) of a tensor to be merged. contents: of each operand; written: the type of `out`, as in its
    header."""

    tensor: str
    written: str
    start: int
    stop: int
    contents: Sequence[memoryview | Encoded]
    cuts: Cuts
    majority: int
    out: memoryview

    @cached_property
    def bounds(self) -> tuple[int, ...]:
        return (self.start, *split_points(self.cuts, self.start, self.stop), self.stop)


@dataclass
class Loaded:
    """A unit's inputs: per segment, one for each operand (merged), or one of what is copied: the base's, or of a matrix
    that was merged before."""

    segments: list[Segment]
    operands: list[list[Operand]]
    holders: int = 1
    """Merges of the same inputs that compute with it, one after another."""

    def release(self) -> None:
        self.holders -= 1
        if self.holders:
            return
        for operands in self.operands:
            for operand in operands:
                operand.release()


Computed = tuple[np.ndarray, dict[str, tuple[int, ...]], int]
"""A unit's bytes in a reused buffer, its counts, and how many entries depend on the majority sign."""


@dataclass
class MergeStep:
    """The three steps of merging a unit: what may wait for a disk (load, store) is apart from what computes.

    Thread-safe. One for all passes of a process: its buffers are reused.
    """

    worker: Worker
    writer: Writer
    matrices: Matrices = field(default_factory=MemoryMatrices)
    buffers: Buffers = field(default_factory=Buffers)

    @property
    def requested_bytes(self) -> int:
        return self.worker.requested_bytes

    def warm_up(self) -> None:
        self.worker.warm_up()

    def sync(self, results: Sequence[MergeResult]) -> None:
        """Make what these results say durable."""
        self.writer.sync(output_files(result.item for result in results))

    @cached_property
    def sign_counter(self) -> int | None:
        names = self.worker.plan.counter_names
        return names.index("sign_sum") if "sign_sum" in names else None

    def load(self, task: MergeTask) -> Loaded:
        segments = self.worker.segments(task.item)
        operands: list[list[Operand]] = []
        for s in segments:
            if self.is_solved(s.tensor):
                item = s.tensor.item_bytes
                span = self.matrices.read(s.tensor.source, s.start * item, s.stop * item)
                operands.append([Stored(span, s.tensor.dtype)])
                continue
            models = self.worker.operands if s.tensor.merged else [self.worker.base]
            operands.append([m.read(s.tensor.source, s.start, s.stop) for m in models])
        return Loaded(segments, operands)

    def is_solved(self, tensor: TensorSpec) -> bool:
        """Whether a tensor was merged whole, and is copied from there."""
        if not tensor.merged or tensor.source not in self.worker.plan.matrices:
            return False
        solved = self.matrices.get(tensor.source)
        assert solved is not None, "matrices are merged before the units"
        return not solved.plain

    def compute(self, task: MergeTask, loaded: Loaded) -> Computed:
        """Releases what was loaded, once for each of its holders."""
        item, worker = task.item, self.worker
        buffer = self.buffers.take(item.nbytes)
        out = buffer.data[: item.nbytes]
        self._write_headers(item, out)
        counts: dict[str, tuple[int, ...]] = {}
        merged: list[Segment] = []
        parts: list[Part] = []
        for (segment, at), operands in zip(worker.plan.layout.placed(item), loaded.operands, strict=True):
            place = out[at : at + segment.nbytes]
            if not segment.tensor.merged or self.is_solved(segment.tensor):
                place[:] = stored(operands[0])
                continue
            merged.append(segment)
            parts.append(
                Part(
                    tensor=segment.tensor.source,
                    written=segment.tensor.dtype,
                    start=segment.start,
                    stop=segment.stop,
                    contents=[operand.content for operand in operands],
                    cuts=task.cuts.get(segment.tensor.source, ()),
                    majority=task.majority,
                    out=place,
                )
            )
        dependent = 0
        for segment, found in zip(merged, worker.merge_parts(parts), strict=True):
            if worker.plan.method.asks_majority:
                dependent += int(found[worker.plan.counter_names.index("cancellations")])
            if segment.tensor.counted:  # an alias is written again, but counted once
                counts[segment.tensor.source] = tuple(int(c) for c in found)
        loaded.release()
        return buffer, counts, dependent

    def _write_headers(self, item: WorkItem, out: memoryview) -> None:
        before = 0
        for each in item.ranges:
            head = self.worker.plan.layout.by_name[each.file].header[each.start : each.stop]
            out[before : before + len(head)] = head
            before += each.nbytes

    def store(self, task: MergeTask, computed: Computed) -> MergeResult:
        buffer, counts, dependent = computed
        blocks: list[str] = []
        before = 0
        for each in task.item.ranges:
            content = buffer.data[before : before + each.nbytes]
            self.writer.write(each.file, each.start, content)
            blocks += block_digests(content)
            before += each.nbytes
        self.buffers.give(buffer)
        return MergeResult(
            item=task.item,
            state_digest=task.state_digest,
            majority=task.majority,
            blocks=tuple(blocks),
            counts=counts,
            dependent=dependent,
            sign_sum=sum(c[self.sign_counter] for c in counts.values()) if self.sign_counter is not None else 0,
        )
