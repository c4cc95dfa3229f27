"""The whole arithmetic of a slice as one plain torch function: what a kernel is compiled from, and its oracle.

Run as it is, operation by operation, it takes 20 to 50 times as long as the compiled loop and gives the same bits.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from ties_dist.compiler.slices import Slice
from ties_dist.dtypes import DType, torch_dtype
from ties_dist.errors import RecipeError
from ties_dist.methods.base import THRESHOLDS, Method, count
from ties_dist.methods.outside import defined

BLOCK = 1 << 15
"""Elements: temporaries stay in the second-level cache, and torch does not split an operation over threads, whose
barriers cost 20 times the work on a busy machine."""
VECTORS = 64
"""Elements: a multiple of what torch computes at once on any processor (32 float32, 64 of 16 bits)."""
OVERFLOWS_FROM: dict[DType, float] = {
    "float32": torch.inf,
    "bfloat16": 2.0**128 - 2.0**119,
    "float16": 65520.0,
}
"""Smallest magnitude that round-to-nearest-even turns into Inf: the largest finite value plus half a unit."""

# Inputs are read-only views of maps; nothing here writes to them.
warnings.filterwarnings("ignore", message="The given (buffer|NumPy array) is not writ", category=UserWarning)

Fused = Callable[[Sequence[Tensor], dict[str, Tensor], Tensor], tuple[Tensor, Tensor]]


def fuse(method: Method, experts: int, out: DType, factor: int | None = None) -> Fused:
    """The arithmetic of a slice as a function of operands, state and position.

    operands: (n,) each, as stored: the base (where the method takes deltas), `experts` experts, extras. state: of
    `Method.numbers`; position: see Method.merge. Returns the result, (n,) of the type `out`, and int32 counters as
    `Counters` lays them out: non-finite entries of each operand and of the result, entries above and at each threshold
    (and zeros, where a rank follows from those), then the method's own. Raises RecipeError where what the method
    returns is not what it is to return.
    factor: instead of what the method merges, that one of its `factors`, and no counters of its own.
    """
    trim, declared = method.needs.trim, method.counters(experts) if factor is None else ()

    def merge_slice(operands: Sequence[Tensor], state: dict[str, Tensor], position: Tensor) -> tuple[Tensor, Tensor]:
        values = [x.to(torch.float32) for x in operands]
        bad = [count_beyond(x, torch.inf) for x in values]
        base, first = values[0], int(method.operand != "weight")
        if method.operand == "delta":
            values = [base, *(x - base for x in values[1:])]
        split = first + experts
        numbers = dict(state)
        proofs = count_trims(values[first:split], numbers.pop(THRESHOLDS), zeros=trim.counts_zeros) if trim else []
        given = base, values[first:split], values[split:], numbers, position
        if factor is None:
            returned: object = method.merge(*given)
            merged, counts = _returned(returned, base, method, declared)
        else:
            merged, counts = _factor(method.factors(*given), factor, base, method), []
        counters = torch.stack([*bad, count_beyond(merged, OVERFLOWS_FROM[out]), *proofs, *counts])
        return merged.to(torch_dtype(out)), counters  # the one cast: round-to-nearest-even

    return merge_slice


def count_trims(deltas: Sequence[Tensor], thresholds: Tensor, *, zeros: bool) -> list[Tensor]:
    """What proves the thresholds: how many of each |delta| are above its own and equal to it, 0-d int32 each.

    zeros: and how many are 0.
    """
    counts = []
    for i, delta in enumerate(deltas):
        magnitude = delta.abs()
        counts += [count(magnitude > thresholds[i]), count(magnitude == thresholds[i])]
        counts += [count(delta == 0)] if zeros else []
    return counts


def _returned(
    returned: object, base: Tensor, method: Method, declared: Sequence[str]
) -> tuple[Tensor, Sequence[Tensor]]:
    """What a method's `merge` gave. Raises RecipeError where it is something else than that is to give."""
    merged, counts = returned if isinstance(returned, tuple) and len(returned) == 2 else (None, None)
    if not isinstance(counts, (list, tuple)):
        wrong = f"{_like(returned)}, not the merged weights and a list of counters, as in `return merged, []`"
    elif not isinstance(merged, Tensor) or merged.dtype != torch.float32 or merged.shape != base.shape:
        wrong = f"{_like(merged)} as merged weights, not one float32 for every element of `base`"
    elif len(counts) != len(declared):
        raise RecipeError(_miscounted(method, declared, len(counts)))
    elif strange := [each for each in counts if not _is_counter(each)]:
        wrong = f"{_like(strange[0])} as a counter, not the `count` of a mask"
    else:
        return merged, counts
    raise RecipeError(f"merge_method `{method.name}`: its `merge` returns {wrong}{defined(type(method), 'merge')}.")


def _factor(returned: object, factor: int, base: Tensor, method: Method) -> Tensor:
    """One of what a method's `factors` gave. Raises RecipeError where it is something else than that is to give."""
    if not isinstance(returned, (list, tuple)) or len(returned) <= factor:
        wrong = f"{_like(returned)}, not a list of at least {factor + 1} factors, as `products` names them"
    elif not isinstance(found := returned[factor], Tensor) or found.dtype != torch.float32 or found.shape != base.shape:
        wrong = f"{_like(found)} as a factor, not one float32 for every element of `base`"
    else:
        return found
    raise RecipeError(f"merge_method `{method.name}`: its `factors` returns {wrong}{defined(type(method), 'factors')}.")


def _miscounted(method: Method, declared: Sequence[str], returned: int) -> str:
    listed = f" ({', '.join(declared)})" if declared else ""
    return (
        f"merge_method `{method.name}` declares {len(declared)} counters{listed}, its `merge` returns {returned}. Name "
        f"every one in `counters`, in the order in which `merge` returns them{defined(type(method), 'merge')}."
    )


def _is_counter(value: object) -> bool:
    return isinstance(value, Tensor) and value.ndim == 0 and value.dtype in (torch.int32, torch.int64)


def _like(value: object) -> str:
    """What it is, for a message."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
    return f"({', '.join(map(_like, value))})" if isinstance(value, tuple) else type(value).__name__


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
            given = [o[low:high] for o in operands]
            merged, counted = _whole(function, given, numbers, each.position + first + low)
            target[low:high].copy_(merged)
            counters = counters + counted
    return counters.numpy()


def _whole(
    function: Fused, operands: Sequence[Tensor], numbers: dict[str, Tensor], position: int
) -> tuple[Tensor, Tensor]:
    """Run on whole vectors: what is left over torch computes one by one, and rounds `sigmoid` or `pow` otherwise there.

    So the last element is repeated behind a slice until it fills them, and not counted again.
    """
    n = operands[0].numel()
    behind = -n % VECTORS
    if not behind:
        return function(operands, numbers, torch.tensor(position))
    padded = [torch.cat([o, o[-1:].expand(behind)]) for o in operands]
    with _CountOnly(n):
        merged, counters = function(padded, numbers, torch.tensor(position))
    return merged[:n], counters


class _CountOnly(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sums of masks are of the first `n` elements; a traced function has no other sums of elements."""

    def __init__(self, n: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.n = n

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is torch.ops.aten.sum:
            args = (args[0][: self.n], *args[1:])
        return func(*args, **(kwargs or {}))


def view(content: memoryview, dtype: DType) -> Tensor:
    """(n,) tensor over the bytes of a slice, without a copy."""
    kind = torch_dtype(dtype)
    return torch.frombuffer(content, dtype=kind) if len(content) else torch.empty(0, dtype=kind)
