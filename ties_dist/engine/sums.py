"""The sums that a stage asks for: each block of a parameter is taken once, kept with the run, and added up here.

In the order of blocks, whoever took them and when: what comes out is the same on any number of workers, and after a
resume. What follows from the sums is computed here, too, and travels as numbers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ties_dist.executors.base import Executor
from ties_dist.methods.scalars import Scalars
from ties_dist.output.journal import KnownSums
from ties_dist.planning.plan import MergePlan
from ties_dist.values.items import Portion
from ties_dist.values.stretches import BLOCK_ELEMENTS, Stretch, Vector, blocks_of, stretches
from ties_dist.worker.merging import MergeStep
from ties_dist.worker.summing import SumStretch


@dataclass
class Summation:
    """Adds up for one plan. known: the blocks that an interrupted run took; keep: makes durable what is taken, and is
    called every so many seconds."""

    plan: MergePlan
    step: MergeStep
    executor: Executor
    known: KnownSums
    keep: Callable[[Mapping[Stretch, Sequence[Vector]]], None]
    seconds: float

    def of(self, tensors: Sequence[str]) -> dict[str, Scalars]:
        """What follows from the sums of these tensors. Blocks are taken where they are not known."""
        taken = {tensor: dict(self.known.get(tensor, {})) for tensor in tensors}
        missing = [each for t in tensors for each in stretches(t, self.plan.sizes[t], taken[t])]
        for stretch, vectors in self._take(missing):
            taken[stretch.tensor] |= dict(enumerate(vectors, stretch.first))
        return {tensor: self.plan.scalars(tensor, self._added(tensor, taken[tensor])) for tensor in tensors}

    def whole(self) -> dict[str, Scalars]:
        """Of the tensors whose blocks are all known."""
        known = [t for t, blocks in self.known.items() if len(blocks) == blocks_of(self.plan.sizes[t])]
        return {tensor: self.plan.scalars(tensor, self._added(tensor, self.known[tensor])) for tensor in known}

    def _take(self, missing: Sequence[Stretch]) -> Iterator[tuple[Stretch, Sequence[Vector]]]:
        pending: dict[Stretch, Sequence[Vector]] = {}
        last = time.monotonic()
        try:
            for stretch, vectors in self.executor.call(self.step, SumStretch(), missing, self._weigh):
                pending[stretch] = vectors
                yield stretch, vectors
                if time.monotonic() - last > self.seconds:
                    self.keep(pending)
                    pending, last = {}, time.monotonic()
        finally:
            self.keep(pending)

    def _weigh(self, stretch: Stretch) -> Portion:
        return Portion((stretch.stop - stretch.first) * BLOCK_ELEMENTS)

    def _added(self, tensor: str, blocks: dict[int, Vector]) -> Vector:
        total = np.zeros(len(self.plan.products))
        with np.errstate(invalid="ignore"):  # Inf - Inf: the merge says where it comes from
            for block in range(blocks_of(self.plan.sizes[tensor])):
                total += np.array(blocks[block])
        return tuple(total.tolist())
