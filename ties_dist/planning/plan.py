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

import xxhash

from ties_dist.dtypes import ITEM_BYTES
from ties_dist.methods.base import Method, float32
from ties_dist.methods.needs import Needs, Product
from ties_dist.methods.scalars import Scalars
from ties_dist.planning.layout import Layout, TensorSpec
from ties_dist.storage.digests import digest
from ties_dist.values.counters import Counters
from ties_dist.values.inputs import Input
from ties_dist.values.items import Portion, Range, WorkItem
from ties_dist.values.numbers import TensorNumbers
from ties_dist.values.views import read_bytes

SEMANTICS_VERSION = 2
"""Goes into the fingerprint; rises when the same recipe gives other bytes. 2: names of one parameter count once."""

OPERATIONS_PER_BYTE = 10
"""5 GFLOP/s and 0.5 GB/s a core, roughly."""


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """A tensor that is merged whole: a linear layer's weight, for which every expert has a Gram matrix.

    inputs, outputs: of the layer. rows: that each expert's Gram matrix is a sum over. transposed: stored (inputs,
    outputs). dtype: of the output, as in its header.
    """

    inputs: int
    outputs: int
    rows: tuple[int, ...]
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

    def portion(self, experts: int) -> Portion:
        """As many bytes as units would have that take as long."""
        return Portion(self.operations(experts) // OPERATIONS_PER_BYTE)

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
        """All output tensors by name."""
        return tuple(self.layout.tensors)

    @cached_property
    def counted(self) -> tuple[TensorSpec, ...]:
        """The tensors that make up d, in the order of their canonical names."""
        return tuple(sorted((t for t in self.tensors if t.counted), key=lambda t: t.source))

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
        return (*((self.base,) if self.method.operand != "weight" else ()), *self.experts, *self.extras)

    @cached_property
    def input_bytes(self) -> int:
        """One read of everything the merge needs."""
        read = 0
        for tensor in self.tensors:
            models = self.operands if tensor.merged else (self.base,)
            read += sum(read_bytes(m.views[tensor.source], 0, tensor.numel) for m in models)
        return read + sum(4 * len(self.grams) * matrix.inputs**2 for matrix in self.matrices.values())

    @cached_property
    def needs(self) -> Needs:
        """What has to be found for the merge."""
        return self.method.needs

    @property
    def by_tensor(self) -> bool:
        """Whether something has to be found of each tensor before any of it is merged."""
        trim = self.needs.trim
        return self.needs.sums is not None or (trim is not None and trim.scope == "tensor")

    @cached_property
    def counters(self) -> Counters:
        """What is counted of each tensor."""
        count = len(self.experts)
        return Counters(
            operands=len(self.operands),
            trimmed=count if self.needs.trim is not None else 0,
            zeros=self.needs.trim is not None and self.needs.trim.counts_zeros,
            own=tuple(self.method.counters(count)),
        )

    @property
    def is_16_bit(self) -> bool:
        """Whether deltas take few distinct values, so that a threshold is an atom of large mass."""
        models = (self.base, *self.experts)
        return all(ITEM_BYTES[m.views[t.source].dtype] == 2 for m in models for t in self.counted)

    @property
    def disk_bytes(self) -> int:
        """Of the output's disk: its files, and matrices while they are needed."""
        return self.layout.total_bytes + sum(m.nbytes for m in self.matrices.values())

    @property
    def reread_bytes(self) -> int | None:
        """What is read between the first and the second read of a byte; None where one read is likely to do."""
        trim = self.needs.trim
        if self.by_tensor:
            return self.memory_budget // 2  # a group of units, whose tensors are read before it is merged (`Passes`)
        if trim is None:
            return None
        speculates = self.is_16_bit and trim.tie_policy == "keep_all"
        return None if speculates else self.input_bytes

    def density(self, expert: int) -> float:
        """An expert's density, where the trim's scope is the model and so one holds for all tensors."""
        return self.numbers[self.counted[0].source].experts[expert]["density"]

    def rank(self, expert: int, zeros: int) -> int | None:
        """Of an expert's whole-model threshold (`TrimRule.rank`). zeros: its entries that are the base's."""
        rule = self.needs.trim
        assert rule is not None and rule.scope == "model"
        return rule.rank(rule.ranked(expert, self.elements, zeros), self.density(expert)) if self.elements else None

    def parameters_of(self, tensor: str) -> dict[str, float]:
        """The recipe's global numbers for a tensor; of a random method with one that stands for the tensor."""
        parameters = dict(self.numbers[tensor].parameters)
        if self.method.is_random:
            parameters["tensor"] = float(xxhash.xxh32_intdigest(tensor.encode()))
        return parameters

    def scalars(self, tensor: str, sums: Sequence[float]) -> Scalars:
        """What a method makes of the sums over a tensor, rounded once to float32."""
        made = self.method.scalars(self.parameters_of(tensor), self.numbers[tensor].experts, sums)
        rounded = ((name, float32(value).tolist()) for name, value in made.items())
        return tuple((name, tuple(each) if isinstance(each, list) else each) for name, each in rounded)

    @cached_property
    def products(self) -> tuple[Product, ...]:
        """What is summed over each tensor."""
        return self.method.products(len(self.experts)) if self.needs.sums is not None else ()

    @property
    def factors(self) -> int:
        """Of these products."""
        return 1 + max((factor for product in self.products for factor in product), default=-1)

    def sample_scalars(self, tensor: str) -> Scalars:
        """What follows from sums such as a tensor might have: for those who look at their names and shapes."""
        return self.scalars(tensor, (1.0,) * len(self.products))

    def items(self, done: Iterable[WorkItem] = ()) -> Iterator[WorkItem]:
        """Work that covers every byte of the output that none of `done` covers, whatever its size, in file order."""
        covered: dict[str, list[tuple[int, int]]] = {}
        for file, start, stop in (each for item in done for each in item.ranges):
            covered.setdefault(file, []).append((start, stop))
        for shard in self.layout.shards:
            for start, stop in gaps(covered.get(shard.name, ()), shard.size):
                for each in cut(shard.name, start, stop, self.unit_bytes):
                    yield WorkItem((each,))

    def tensors_of(self, item: WorkItem) -> set[str]:
        """Source names of the merged tensors an item touches."""
        return {s.tensor.source for s, _ in self.layout.placed(item) if s.tensor.merged}


def cut(shard: str, start: int, stop: int, unit_bytes: int) -> Iterator[Range]:
    """[start, stop) in ranges that end at multiples of `unit_bytes`."""
    while start < stop:
        end = min(stop, (start // unit_bytes + 1) * unit_bytes)
        yield Range(shard, start, end)
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
