"""What a worker does where a stage asks for sums: the method's factors, then their products, a block at a time.

Factors are float32 from the same kind of loop that merges, the same on every machine; `kernels/sums.py` adds their
products up. A few thousand elements at a time: factors stay in the second-level cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ties_dist.compiler.slices import Slice, numbers, part
from ties_dist.values.stretches import BLOCK_ELEMENTS, Stretch, Vector
from ties_dist.values.views import DECODED_AT_ONCE, Encoded, Operand
from ties_dist.worker.merging import MergeStep, Worker

AT_ONCE = DECODED_AT_ONCE
"""Elements of a block, a multiple of the lanes: as many as a view decodes. With fewer threads wait for each other."""


@dataclass(frozen=True)
class SumStretch:
    """The sums of each block of a stretch. NaN and Inf go into them as they are: the merge counts and names those."""

    def __call__(self, step: MergeStep, stretch: Stretch) -> tuple[Vector, ...]:
        blocks = range(stretch.first, stretch.stop)
        return tuple(_sum_block(step.worker, stretch.tensor, block) for block in blocks)


def _sum_block(worker: Worker, tensor: str, block: int) -> Vector:
    from ties_dist.kernels.sums import LANES, add_products, combined  # numba takes half a second to import

    products = worker.plan.products
    start = block * BLOCK_ELEMENTS
    stop = min(worker.plan.sizes[tensor], start + BLOCK_ELEMENTS)
    operands = [reader.read(tensor, start, stop) for reader in worker.operands]
    factors = np.ones((worker.plan.factors + 1, AT_ONCE), np.float32)  # the last one stays: `ONE`
    lanes = np.zeros((len(products), LANES), np.float64)
    for low in range(0, stop - start, AT_ONCE):
        high = min(stop - start, low + AT_ONCE)
        contents = _contents(worker, tensor, operands, low, high)
        for kernel, into in zip(worker.factor_kernels, factors[:-1], strict=True):
            kernel([_slice(worker, tensor, contents, start + low, into[: high - low])])
        for (left, right), sums in zip(products, lanes, strict=True):
            add_products(factors[left, : high - low], factors[right, : high - low], sums)
    for operand in operands:
        operand.release()
    return tuple(combined(each) for each in lanes)


def _contents(
    worker: Worker, tensor: str, operands: Sequence[Operand], low: int, high: int
) -> list[memoryview | Encoded]:
    """Bytes of some elements of each operand; what is encoded is decoded here, once for all factors."""
    return [
        part(content, kind, low, high) if isinstance(content, memoryview) else _bytes(numbers(content, kind, low, high))
        for content, kind in (
            (operand.content, kind) for operand, kind in zip(operands, worker.types(tensor), strict=True)
        )
    ]


def _bytes(values: np.ndarray) -> memoryview:
    return values.data.cast("B")


def _slice(
    worker: Worker, tensor: str, contents: Sequence[memoryview | Encoded], position: int, into: np.ndarray
) -> Slice:
    return Slice(
        operands=contents,
        types=worker.types(tensor),
        state=worker.state_of(tensor),
        position=position,
        out=_bytes(into),
        out_type="float32",
    )
