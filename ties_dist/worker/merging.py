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

from ties_dist.checkpoints.forms.plain import Stored
from ties_dist.compiler.kernel import MergeKernel
from ties_dist.compiler.kinds import KernelKind
from ties_dist.compiler.native import KernelStore
from ties_dist.compiler.slices import Slice, sliced, stored
from ties_dist.dtypes import ITEM_BYTES, LOOP_BYTES, TYPES, DType
from ties_dist.methods.base import Cut, Found, State
from ties_dist.methods.scalars import Scalars
from ties_dist.planning.layout import Segment, TensorSpec
from ties_dist.storage.base import Writer
from ties_dist.storage.buffers import Buffers
from ties_dist.storage.digests import block_digests
from ties_dist.thresholds import Cuts, from_bits, split_points
from ties_dist.values.counters import Row, added
from ties_dist.values.items import MergeResult, MergeTask, WorkItem, output_files
from ties_dist.values.views import Encoded, Operand
from ties_dist.worker.counting import Counter, ModelReader
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

    @cached_property
    def factor_kernels(self) -> Sequence[MergeKernel]:
        """For what is summed: on the processor, wherever units are merged."""
        given = self.plan.method, len(self.plan.experts), self.kernel_kind, self.kernel_store
        return [MergeKernel(*given, factor=i) for i in range(self.plan.factors)]

    def warm_up(self) -> None:
        """Make the kernels for the types of these models ready, while others are reading samples or a scan."""
        done: set[tuple[DType, ...]] = set()
        for tensor in self.plan.tensors if self.kernel_kind != "eager" and self.gpus is None else ():
            if not tensor.merged:
                continue
            types = self.types(tensor.source)
            if (*types, TYPES[tensor.dtype]) not in done:
                done.add((*types, TYPES[tensor.dtype]))
                cuts = ((0.0, 0.0),) * (len(self.plan.experts) if self.plan.needs.trim else 0)
                state = self.state_of(tensor.source, cuts=cuts, scalars=self.plan.sample_scalars(tensor.source))
                self.kernel.prepare(types, TYPES[tensor.dtype], state)

    def types(self, tensor: str) -> tuple[DType, ...]:
        return tuple(m.type(tensor) for m in self.operands)

    def sample_signs(
        self, slices: Sequence[tuple[str, int, int]], weights: Sequence[float], cuts: Mapping[str, Cuts]
    ) -> float:
        """The sum of elected signs that a sample of this size has, by merging its slices (tensor, start, stop) away.

        Weighted as they represent the model, but not scaled up to it: units that follow count as much per element.
        """
        signs, sampled = 0.0, 0
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
            signs += weight * self.signs(*self.merge_parts([part]))
            sampled += stop - start
            for operand in operands:
                operand.release()
        return signs * sampled / max(1, self.plan.elements)

    def state_of(
        self,
        tensor: str,
        *,
        cuts: tuple[tuple[float, float], ...] = (),
        majority: int = 1,
        scalars: Scalars = (),
    ) -> State:
        """The numbers of a slice of a tensor. cuts: per expert, threshold and what is kept from."""
        return self._state(*self._key(tensor), cuts, majority, scalars)

    def _build_state(
        self, parameters: tuple[tuple[str, float], ...], experts: tuple[tuple[tuple[str, float], ...], ...],
        cuts: tuple[tuple[float, float], ...], majority: int, scalars: Scalars,
    ) -> State:  # fmt: skip
        found = Found(cuts=[Cut(threshold=t, keep=k) for t, k in cuts], majority=majority, scalars=scalars)
        return self.plan.method.numbers(dict(parameters), [dict(e) for e in experts], found)

    def _key(
        self, tensor: str
    ) -> tuple[tuple[tuple[str, float], ...], tuple[tuple[tuple[str, float], ...], ...]]:  # fmt: skip
        return (
            tuple(sorted(self.plan.parameters_of(tensor).items())),
            tuple(tuple(sorted(e.items())) for e in self.plan.numbers[tensor].experts),
        )

    def merge_parts(self, parts: Sequence[Part]) -> list[Row]:
        """Merge parts of tensors, all in one call of the kernel: a GPU is asked once per unit. Returns their rows."""
        counters = self.plan.counters
        pieces = [(part, *bounds) for part in parts for bounds in pairwise(part.bounds)]
        counted = iter(self.kernel([self._slice(*piece) for piece in pieces]))
        return [
            added(counters.row(next(counted), part.cuts, start) for start, _ in pairwise(part.bounds)) for part in parts
        ]

    def dependent(self, part: Part, row: Row) -> int:
        """Entries of a merged part that depend on the majority sign; all may, where the method does not count them."""
        majority = self.plan.needs.majority
        if majority is None:
            return 0
        return self.plan.counters.read(row).own.get(majority.dependent, part.stop - part.start)

    def signs(self, row: Row) -> int:
        """The sum of elected signs in a row, where the method asks for their majority."""
        majority = self.plan.needs.majority
        return self.plan.counters.read(row).own[majority.signs] if majority is not None else 0

    def _slice(self, part: Part, start: int, stop: int) -> Slice:
        """Elements [start, stop) of a part, which lie wholly on one side of each cut of ties."""
        levels = tuple((from_bits(c.bits), from_bits(c.bits if start < c.ties else c.bits + 1)) for c in part.cuts)
        low, high = start - part.start, stop - part.start
        types, out_type = self.types(part.tensor), TYPES[part.written]
        item = LOOP_BYTES[out_type]
        return Slice(
            operands=[sliced(content, kind, low, high) for content, kind in zip(part.contents, types, strict=True)],
            types=types,
            state=self.state_of(part.tensor, cuts=levels, majority=part.majority, scalars=part.scalars),
            position=start,
            out=part.out[low * item : high * item],
            out_type=out_type,
        )


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
    scalars: Scalars = ()

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


Computed = tuple[np.ndarray, dict[str, Row], int]
"""A unit's bytes in a reused buffer, its rows by tensor, and how many entries depend on the majority sign."""


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

    def load(self, task: MergeTask) -> Loaded:
        segments = self.worker.segments(task.item)
        operands: list[list[Operand]] = [[] for _ in segments]
        merged = [i for i, s in enumerate(segments) if s.tensor.merged and not self.is_solved(s.tensor)]
        copied = [i for i, s in enumerate(segments) if not s.tensor.merged]
        for reader in self.worker.operands:
            self._read(reader, segments, merged, operands)
        self._read(self.worker.base, segments, copied, operands)
        for i, s in enumerate(segments):
            if self.is_solved(s.tensor):
                item = s.tensor.item_bytes
                span = self.matrices.read(s.tensor.source, s.start * item, s.stop * item)
                operands[i].append(Stored(span, s.tensor.dtype))
        return Loaded(segments, operands)

    def _read(
        self, reader: ModelReader, segments: Sequence[Segment], which: Sequence[int], into: list[list[Operand]]
    ) -> None:
        """Append what a model has of some segments."""
        slices = [(segments[i].tensor.source, segments[i].start, segments[i].stop) for i in which]
        for i, operand in zip(which, reader.read_all(slices), strict=True):
            into[i].append(operand)

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
        merged: list[tuple[Segment, Part]] = []
        for (segment, at), operands in zip(worker.plan.layout.placed(item), loaded.operands, strict=True):
            place = out[at : at + segment.nbytes]
            if segment.tensor.merged and not self.is_solved(segment.tensor):
                merged.append((segment, _part(task, segment, operands, place)))
            else:
                place[:] = stored(operands[0])
        counts: dict[str, Row] = {}
        dependent = 0
        for (segment, part), row in zip(merged, worker.merge_parts([part for _, part in merged]), strict=True):
            dependent += worker.dependent(part, row)
            if segment.tensor.counted:  # an alias is written again, but counted once
                counts[part.tensor] = added([counts[part.tensor], row]) if part.tensor in counts else row
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
            sign_sum=sum(map(self.worker.signs, counts.values())),
        )


def _part(task: MergeTask, segment: Segment, operands: Sequence[Operand], place: memoryview) -> Part:
    """What of a task is to be merged from these operands, into `place`."""
    return Part(
        tensor=segment.tensor.source,
        written=segment.tensor.dtype,
        start=segment.start,
        stop=segment.stop,
        contents=[operand.content for operand in operands],
        cuts=task.cuts.get(segment.tensor.source, ()),
        majority=task.majority,
        out=place,
        scalars=task.scalars.get(segment.tensor.source, ()),
    )
