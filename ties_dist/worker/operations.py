"""What a worker may be asked besides merging a unit: small values that travel to where it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from ties_dist.compiler.slices import beyond, narrowed
from ties_dist.dtypes import TYPES
from ties_dist.storage.digests import block_digests, digest
from ties_dist.thresholds import Cuts, Window
from ties_dist.values.items import MergeResult, WorkItem
from ties_dist.values.observation import Observation
from ties_dist.worker.matrices import Solved
from ties_dist.worker.merging import MergeStep, Worker


@dataclass(frozen=True)
class Observe:
    """Counts |delta| of units into histograms. windows: by expert, as of `Counter.observe`."""

    windows: Mapping[int, Window]

    def empty(self) -> Observation:
        return Observation()

    def __call__(self, step: MergeStep, unit: WorkItem, into: Observation) -> None:
        step.worker.observe(unit, self.windows, into)


@dataclass(frozen=True)
class CountTies:
    """Entries of a unit that equal the thresholds. bits: by expert."""

    bits: tuple[int, ...]

    def __call__(self, step: MergeStep, unit: WorkItem) -> dict[str, tuple[int, ...]]:
        return step.worker.count_ties(unit, self.bits)


@dataclass(frozen=True)
class SelectTensor:
    """The exact thresholds of a tensor over its own elements."""

    def __call__(self, step: MergeStep, tensor: str) -> tuple[Cuts, dict[tuple[int, str], int]]:
        return step.worker.select(tensor, step.worker.plan.sizes[tensor])


@dataclass(frozen=True)
class StillThere:
    """Whether a range that was written has the bytes it had then."""

    def __call__(self, step: MergeStep, result: MergeResult) -> bool:
        return all(
            block_digests(step.writer.read(each.file, each.start, each.stop)) == blocks
            for each, blocks in result.by_range
        )


@dataclass(frozen=True)
class SolveMatrix:
    """Merges a tensor whole, unless that was done; of a resumed run's, the bytes are checked."""

    def __call__(self, step: MergeStep, tensor: str) -> Solved:
        if not step.matrices.intact(tensor):
            with step.worker.solving:
                step.matrices.put(tensor, *_solve(step.worker, tensor))
        found = step.matrices.get(tensor)
        assert found is not None
        return found


def _solve(worker: Worker, tensor: str) -> tuple[Solved, memoryview]:
    plan, numbers = worker.plan, worker.plan.numbers[tensor]
    matrix = plan.matrices[tensor]
    experts = range(len(plan.experts))
    bad: dict[tuple[str, int], int] = {}  # a matrix may be read twice

    def gram(i: int) -> np.ndarray:
        found = worker.grams[i].widened(tensor, 0, matrix.inputs**2)
        bad["gram", i] = beyond(found, "float32")
        return found.reshape(matrix.inputs, matrix.inputs)

    def weight(i: int) -> np.ndarray:
        found = worker.experts[i].widened(tensor, 0, matrix.inputs * matrix.outputs)
        bad["weight", i] = beyond(found, "float32")
        if matrix.transposed:
            return found.reshape(matrix.inputs, matrix.outputs)
        return np.ascontiguousarray(found.reshape(matrix.outputs, matrix.inputs).T)

    merged = plan.method.solve(
        numbers.parameters,
        numbers.experts,
        [partial(gram, i) for i in experts],
        [partial(weight, i) for i in experts],
        matrix.rows,
    )
    nonfinite = tuple(bad["gram", i] + bad["weight", i] for i in experts)
    if any(nonfinite) or merged is None:
        return Solved(plain=True, nonfinite=nonfinite), memoryview(b"")
    dtype = TYPES[matrix.dtype]
    with np.errstate(over="ignore"):
        values = (merged if matrix.transposed else merged.T).astype(np.float32, order="C").reshape(-1)
    content = narrowed(values, dtype).data.cast("B")
    solved = Solved(plain=False, digest=digest(content), nonfinite=nonfinite, overflowing=beyond(values, dtype))
    return solved, content
