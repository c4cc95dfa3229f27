"""The whole arithmetic of a slice as one plain torch function: what a kernel is compiled from, and its oracle.

Run as it is, operation by operation, it takes 20 to 50 times as long as the compiled loop and gives the same bits.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ties_dist.compiler.slices import Slice
from ties_dist.dtypes import DType, torch_dtype
from ties_dist.methods.base import Method, count

BLOCK = 1 << 15
"""Elements: temporaries stay in the second-level cache, and torch does not split an operation over threads, whose
barriers cost 20 times the work on a busy machine."""
OVERFLOWS_FROM: dict[DType, float] = {
    "float32": torch.inf,
    "bfloat16": 2.0**128 - 2.0**119,
    "float16": 65520.0,
}
"""Smallest magnitude that round-to-nearest-even turns into Inf: the largest finite value plus half a unit."""

# Inputs are read-only views of maps; nothing here writes to them.
warnings.filterwarnings("ignore", message="The given (buffer|NumPy array) is not writ", category=UserWarning)

Fused = Callable[[Sequence[Tensor], dict[str, Tensor], Tensor], tuple[Tensor, Tensor]]


def fuse(method: Method, experts: int, out: DType) -> Fused:
    """The arithmetic of a slice as a function of operands, state and position.

    operands: (n,) each, as stored: the base (where the method takes deltas), `experts` experts, extras. state,
    position: see Method.merge. Returns the result, (n,) of the type `out`, and int32 counters: non-finite entries of
    each operand and of the result, then the method's own.
    """

    def merge_slice(operands: Sequence[Tensor], state: dict[str, Tensor], position: Tensor) -> tuple[Tensor, Tensor]:
        values = [x.to(torch.float32) for x in operands]
        bad = [count_beyond(x, torch.inf) for x in values]
        base, first = values[0], 0
        if method.operand == "delta":
            first = 1
            values = [base, *(x - base for x in values[1:])]
        split = first + experts
        merged, counts = method.merge(base, values[first:split], values[split:], state, position)
        counters = torch.stack([*bad, count_beyond(merged, OVERFLOWS_FROM[out]), *counts])
        return merged.to(torch_dtype(out)), counters  # the one cast: round-to-nearest-even

    return merge_slice


def count_beyond(values: Tensor, limit: float) -> Tensor:
    """How many of (n,) float32 are NaN or not below `limit` in magnitude, 0-d int32: before a cast, whether it will
    overflow."""
    return count(~(values.abs() < limit))


def run_eagerly(function: Fused, each: Slice) -> np.ndarray:
    """Merge one slice block by block. Returns the counters, int64."""
    numbers = {name: torch.from_numpy(np.array(value)) for name, value in each.state.items()}
    counters = torch.zeros((), dtype=torch.int64)
    for first, contents, out in each.ready:
        target = view(out, each.out_type)
        operands = [view(content, kind) for content, kind in zip(contents, each.types, strict=True)]
        for low in range(0, max(target.numel(), 1), BLOCK):
            high = min(target.numel(), low + BLOCK)
            position = torch.tensor(each.position + first + low)
            merged, counted = function([o[low:high] for o in operands], numbers, position)
            target[low:high].copy_(merged)
            counters = counters + counted
    return counters.numpy()


def view(content: memoryview, dtype: DType) -> Tensor:
    """(n,) tensor over the bytes of a slice, without a copy."""
    kind = torch_dtype(dtype)
    return torch.frombuffer(content, dtype=kind) if len(content) else torch.empty(0, dtype=kind)
