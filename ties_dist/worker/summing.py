"""What a worker does where a stage asks for sums: the method's factors, then their products, a block at a time.

Factors are float32 from the same kind of loop that merges, the same on every machine; `kernels/sums.py` adds their
products up. A few thousand elements at a time: factors stay in the second-level cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ties_dist.compiler.slices import Slice, part
from ties_dist.dtypes import DType
from ties_dist.values.stretches import BLOCK_ELEMENTS, Stretch, Vector
from ties_dist.values.views import DECODED_AT_ONCE, Encoded
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

    products, types = worker.plan.products, worker.types(tensor)
    start = block * BLOCK_ELEMENTS
    stop = min(worker.plan.sizes[tensor], start + BLOCK_ELEMENTS)
    operands = [reader.read(tensor, start, stop) for reader in worker.operands]
    factors = np.ones((worker.plan.factors + 1, AT_ONCE), np.float32)  # the last one stays: `ONE`
    lanes = np.zeros((len(products), LANES), np.float64)
    for low in range(0, stop - start, AT_ONCE):
        high = min(stop - start, low + AT_ONCE)
        contents = [_content(o.content, kind, low, high) for o, kind in zip(operands, types, strict=True)]
        for kernel, into in zip(worker.factor_kernels, factors[:-1], strict=True):
            kernel([_slice(worker, tensor, contents, start + low, into[: high - low])])
        for (left, right), sums in zip(products, lanes, strict=True):
            add_products(factors[left, : high - low], factors[right, : high - low], sums)
    for operand in operands:
        operand.release()
    return tuple(combined(each) for each in lanes)


def _content(content: memoryview | Encoded, kind: DType, low: int, high: int) -> memoryview:
    """Bytes of some elements of an operand; what is encoded is decoded here, once for all factors."""
    if isinstance(content, memoryview):
        return part(content, kind, low, high)
    return _bytes(content.decode(low, high))


def _bytes(values: np.ndarray) -> memoryview:
    return values.data.cast("B")


def _slice(worker: Worker, tensor: str, contents: Sequence[memoryview], position: int, into: np.ndarray) -> Slice:
    return Slice(
        operands=contents,
        types=worker.types(tensor),
        state=worker.state_of(tensor),
        position=position,
        out=_bytes(into),
        out_type="float32",
    )
