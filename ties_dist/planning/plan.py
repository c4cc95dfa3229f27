"""What the work is: units, memory, bytes and the fingerprint. Pure: it opens no file.

A unit is a byte range of one output shard, not a tensor: the memory budget bounds its size, a 2 GB embedding is cut,
forty norms are gathered, and writes go to disjoint ranges. Nothing about units is in the fingerprint, so a run that
was killed for memory resumes with smaller ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import xxhash

from ties_dist.errors import PlanError
from ties_dist.methods.base import Method
from ties_dist.planning.layout import ITEM_BYTES, Layout, TensorSpec
from ties_dist.storage.base import BLOCK_BYTES

SEMANTICS_VERSION = 1
"""Goes into the fingerprint; raised when the arithmetic of semantics.md changes."""

DEFAULT_UNIT_BYTES = 8 << 20
"""Output bytes: 4M elements of 16 bits, the best of 1M, 4M and 16M (facts.md)."""
UNITS_AROUND = 4
"""Being read ahead (2) and written behind (2) those that are computed, one per thread."""
PROCESS_BYTES = 480 << 20
"""Resident set of a worker before any unit: Python, torch, numba and their libraries."""
GPU_BYTES = 512 << 20
"""What the driver adds to a process that uses GPUs: an allowance, not yet measured."""
SOLVER_BYTES = 192 << 20
"""What numba adds to a process that compiles the solver for the first time, and malloc keeps of freed matrices."""
EAGER_TEMPORARIES = 12
"""Float32 temporaries per operand and element of an eager block."""


class Unit(NamedTuple):
    """Bytes [start, stop) of one output shard; bounds are multiples of 1 MiB but for the file's end."""

    shard: str
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where one tensor of one input lies: bytes [start, start + numel * item) of a file; dtype as in its header."""

    file: str
    start: int
    dtype: str


@dataclass(frozen=True, kw_only=True)
class Input:
    """One model to read from: path is a folder or a single file, adapter the folder of what is applied to it; identity
    is path-free, for the fingerprint."""

    name: str
    path: str
    tensors: Mapping[str, Source]
    identity: str
    adapter: str | None = None


@dataclass(frozen=True, kw_only=True)
class TensorNumbers:
    """The recipe's numbers for one tensor: global parameters, and those of each expert."""

    parameters: Mapping[str, float]
    experts: tuple[Mapping[str, float], ...]


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """A tensor that is merged whole: a linear layer's weight, for which every expert has a Gram matrix.

    inputs, outputs: of the layer. transposed: stored (inputs, outputs). dtype: of the output, as in its header.
    """

    inputs: int
    outputs: int
    transposed: bool
    dtype: str

    @property
    def nbytes(self) -> int:
        """Of the merged tensor."""
        return self.inputs * self.outputs * ITEM_BYTES[self.dtype]

    def operations(self, experts: int) -> int:
        """Float64 additions and multiplications: a product per expert, a factor, two substitutions."""
        products = 2 * (experts + 1) * self.inputs**2 * self.outputs
        return products + self.inputs**3 // 3

    @property
    def work_bytes(self) -> int:
        """Held while it is merged: the Grams' sum in float64, one expert's as it is read and widened; the right-hand
        side in float64, an expert's weight as read, widened and transposed; then the result, which replaces those."""
        return (8 + 4 + 4) * self.inputs**2 + (8 + 4 + 4 + 4) * self.inputs * self.outputs


@dataclass(frozen=True, kw_only=True)
class MergePlan:
    """Everything a worker needs to do any unit, and everything `plan` prints.

    base: what non-merged tensors are copied from, and what deltas are taken to. numbers: by tensor name, shared
    objects where they do not vary. densities: per expert, where the trim's scope is the model. grams: per expert, for
    the tensors in matrices, of which a worker merges `solvers` at once.
    """

    method: Method
    layout: Layout
    base: Input
    experts: tuple[Input, ...]
    extras: tuple[Input, ...]
    numbers: Mapping[str, TensorNumbers]
    fingerprint: str
    unit_bytes: int
    threads: int
    memory_budget: int
    projected_bytes: int
    grams: tuple[Input, ...] = ()
    matrices: Mapping[str, Matrix] = field(default_factory=dict)
    solvers: int = 1

    @cached_property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """All output tensors in canonical order."""
        return tuple(sorted((t for s in self.layout.shards for t in s.tensors), key=lambda t: t.name))

    @cached_property
    def counted(self) -> tuple[TensorSpec, ...]:
        """The tensors that make up d, in canonical order."""
        return tuple(t for t in self.tensors if t.counted)

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        """Elements of each counted tensor."""
        return {t.source: t.numel for t in self.counted}

    @cached_property
    def elements(self) -> int:
        """d."""
        return sum(t.numel for t in self.counted)

    @property
    def models(self) -> tuple[Input, ...]:
        """Everything that is read; a model with two parts is in it twice."""
        return (self.base, *self.experts, *self.extras, *self.grams)

    @property
    def operands(self) -> tuple[Input, ...]:
        """The inputs every merged slice is read from, in the order of the counters."""
        return (*((self.base,) if self.method.operand == "delta" else ()), *self.experts, *self.extras)

    @cached_property
    def input_bytes(self) -> int:
        """One read of everything the merge needs."""
        read = 0
        for tensor in self.tensors:
            models = self.operands if tensor.merged else (self.base,)
            read += sum(tensor.numel * ITEM_BYTES[m.tensors[tensor.source].dtype] for m in models)
        return read + sum(4 * len(self.grams) * matrix.inputs**2 for matrix in self.matrices.values())

    @cached_property
    def counter_names(self) -> tuple[str, ...]:
        """What is counted per tensor: non-finite entries of each operand and of the output, the method's own, kept."""
        n = len(self.experts)
        kept = tuple(f"{k}[{i}]" for i in range(n) for k in ("kept", "kept_nonzero")) if self.method.trim else ()
        operands = tuple(f"nonfinite[{i}]" for i in range(len(self.operands)))
        return (*operands, "nonfinite_out", *self.method.counters(n), *kept)

    @property
    def is_16_bit(self) -> bool:
        """Whether deltas take few distinct values, so that a threshold is an atom of large mass."""
        models = (self.base, *self.experts)
        return all(ITEM_BYTES[m.tensors[t.source].dtype] == 2 for m in models for t in self.counted)

    @property
    def reread_bytes(self) -> int | None:
        """What is read between the first and the second read of a byte; None where one read is likely to do."""
        trim = self.method.trim
        if trim is None:
            return None
        if trim.scope == "tensor":
            return self.memory_budget // 2  # a group of units, selected for and then merged (`Passes`)
        speculates = self.is_16_bit and trim.tie_policy == "keep_all"
        return None if speculates else self.input_bytes

    def density(self, expert: int) -> float:
        """An expert's density, where the trim's scope is the model and so one holds for all tensors."""
        return self.numbers[self.counted[0].source].experts[expert]["density"]

    def units(self, done: Iterable[Unit] = ()) -> Iterator[Unit]:
        """Units covering every byte of the output that none of `done` covers, whatever their size, in file order."""
        covered: dict[str, list[tuple[int, int]]] = {}
        for unit in done:
            covered.setdefault(unit.shard, []).append((unit.start, unit.stop))
        for shard in self.layout.shards:
            for start, stop in gaps(covered.get(shard.name, ()), shard.size):
                yield from cut(shard.name, start, stop, self.unit_bytes)

    def tensors_of(self, unit: Unit) -> set[str]:
        """Source names of the merged tensors a unit touches."""
        segments = self.layout.by_name[unit.shard].segments(unit.start, unit.stop)
        return {s.tensor.source for s in segments if s.tensor.merged}


def cut(shard: str, start: int, stop: int, unit_bytes: int) -> Iterator[Unit]:
    """[start, stop) in units that end at multiples of `unit_bytes`."""
    while start < stop:
        end = min(stop, (start // unit_bytes + 1) * unit_bytes)
        yield Unit(shard, start, end)
        start = end


def gaps(ranges: Iterable[tuple[int, int]], size: int) -> Iterator[tuple[int, int]]:
    """What of [0, size) the ranges leave uncovered, in order."""
    position = 0
    for start, stop in sorted(ranges):
        if start > position:
            yield position, start
        position = max(position, stop)
    if position < size:
        yield position, size


def fit_unit_bytes(
    *,
    asked: int | None,
    budget: int,
    threads: int,
    units: int,
    outputs: int,
    method: Method,
    tensors: Sequence[TensorSpec],
    operands: Sequence[Input],
) -> tuple[int, int]:
    """Unit size and the buffers' projected peak, in bytes. Raises PlanError where the budget is too small.

    asked: the user's unit size, or None for the largest of 8, 4, 2, 1 MiB that fits. units: how many are under way,
    each with `outputs` results.
    """
    if asked is not None and asked < BLOCK_BYTES:
        raise PlanError(
            f"--unit-size {readable(asked)} is too small: cuts are at multiples of 1MiB. Give 1MiB or more."
        )
    # Widest ratio of bytes read to bytes written over the merged tensors, for all operands together.
    ratio = max(
        (
            sum(ITEM_BYTES[m.tensors[t.source].dtype] for m in operands) / ITEM_BYTES[t.dtype]
            for t in tensors if t.merged
        ),
        default=1.0,
    )  # fmt: skip
    sizes = [asked // BLOCK_BYTES * BLOCK_BYTES] if asked else [DEFAULT_UNIT_BYTES >> i for i in range(4)]
    fixed = statistics_bytes(method, len(operands), threads) + 4 * EAGER_TEMPORARIES * len(operands) * (1 << 15)
    for unit_bytes in sizes:
        buffers = int(units * unit_bytes * (outputs + ratio)) + fixed
        if buffers <= budget:
            return unit_bytes, buffers
    raise PlanError(
        f"--memory-budget {readable(budget)} is too small: units of {readable(unit_bytes)} need {readable(buffers)} of "
        f"buffers ({len(operands)} inputs, {threads} threads). Raise --memory-budget (it is per worker process) to at "
        f"least {readable(_whole_mebibytes(buffers))}"
        + (", or give a smaller --unit-size." if asked and asked > BLOCK_BYTES else ".")
    )


def fit_matrices(matrices: Mapping[str, Matrix], *, budget: int, threads: int, buffers: int) -> tuple[int, int]:
    """How many matrices are merged at once, and the projected peak with them, in bytes. Raises PlanError.

    They are merged before the units are: the buffers of these stay allocated only later.
    """
    if not matrices:
        return 1, buffers
    name, largest = max(matrices.items(), key=lambda item: item[1].work_bytes)
    if largest.work_bytes > budget:
        raise PlanError(
            f"'{name}' ({largest.outputs:,} x {largest.inputs:,}) is merged whole and needs "
            f"{readable(largest.work_bytes)} per worker in float64; --memory-budget is {readable(budget)}. Raise "
            f"--memory-budget (it is per worker process) to at least {readable(_whole_mebibytes(largest.work_bytes))}, "
            "or list the tensor under `exclude`."
        )
    solvers = max(1, min(threads, budget // largest.work_bytes))
    return solvers, max(buffers, solvers * largest.work_bytes) + SOLVER_BYTES


def _whole_mebibytes(size: int) -> int:
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES


def statistics_bytes(method: Method, operands: int, threads: int) -> int:
    """Histograms of a scan: per thread and expert a coarse one and four fine windows, and the driver's sum."""
    return 0 if method.trim is None else (threads + 2) * operands * 8 * ((1 << 15) + 4 * (1 << 16))


def fingerprint(recipe: Mapping[str, object], layout: Layout, inputs: Sequence[Input]) -> str:
    """Names this merge: recipe values, what is merged and how it is cut into shards, and the inputs' identities.

    Never unit size, workers, budget, paths or times.
    """
    document = {
        "semantics_version": SEMANTICS_VERSION,
        "recipe": recipe,
        "shards": [
            [s.name, s.size, [[t.name, t.dtype, t.shape, t.merged, t.source, t.counted] for t in s.tensors]]
            for s in layout.shards
        ],
        "inputs": [model.identity for model in inputs],
    }
    return digest(json.dumps(document, sort_keys=True).encode())


def digest(content: bytes | memoryview) -> str:
    """The fast hash used for all digests here: XXH3, 128 bits, hexadecimal."""
    return xxhash.xxh3_128_hexdigest(content)


def readable(size: float) -> str:
    """A size as a person writes it on the command line: 1.5GiB."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            return f"{size:.4g}{unit}"
        size /= 1024
    raise AssertionError
