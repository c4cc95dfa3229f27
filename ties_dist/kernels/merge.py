"""The merge of one slice: a method's plain torch function, compiled into one fused loop, or run eagerly.

`torch.compile(dynamic=True)` gives one C++/OpenMP loop with trim, election, mean, counters and cast in it, 20 to 50
times faster than eager and with the same bits (tests/property). Compiling costs seconds, so small merges run eagerly,
in blocks that stay in the cache. One compute thread calls it: the generated wrapper keeps the GIL (facts.md).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from ties_dist.methods.base import Method, State

KernelKind = Literal["auto", "compiled", "eager"]

logger = logging.getLogger(__name__)

EAGER_BLOCK = 1 << 15
"""Elements: temporaries stay in the second-level cache, and torch does not split an operation over threads, whose
barriers cost 20 times the work on a busy machine."""
SMALL_SLICE = 4096
"""Elements: shorter slices never reach the compiler (it specialises on sizes 0 and 1, and a call costs more)."""
COMPILE_FROM = 192 << 20
"""Operand elements (d x experts): below this, eager finishes before the compiler would."""

Fused = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor], State, Tensor, Tensor], Tensor]

# Inputs are read-only views of maps; kernels never write to them.
warnings.filterwarnings("ignore", message="The given (buffer|NumPy array) is not writ", category=UserWarning)
warnings.filterwarnings("ignore", message="bf16 and fp16 are mixed", category=UserWarning)


def fuse(method: Method) -> Fused:
    """The whole arithmetic of a slice as one function of tensors, ready for the compiler.

    base: (n,), experts and extras: (n,) each, as stored; state, position: see Method.merge; out: (n,) written in place.
    Returns int64 counters: non-finite entries of base, of each expert, of each extra, of out, then the method's own.
    For methods on weights, `base` is any tensor of the slice's length and is not looked at.
    """

    def merge_slice(
        base: Tensor, experts: Sequence[Tensor], extras: Sequence[Tensor], state: State, position: Tensor, out: Tensor
    ) -> Tensor:
        theta = base.to(torch.float32)
        operands = [e.to(torch.float32) for e in experts]
        side = [e.to(torch.float32) for e in extras]
        bad = [count_beyond(x, torch.inf) for x in (theta, *operands, *side)]
        if method.operand == "delta":
            operands = [x - theta for x in operands]
            side = [x - theta for x in side]
        merged, counts = method.merge(theta, operands, side, state, position)
        out.copy_(merged)  # the cast: round-to-nearest-even
        return torch.stack([*bad, count_beyond(merged, OVERFLOWS_FROM[out.dtype]), *counts])

    return merge_slice


OVERFLOWS_FROM = {torch.float32: torch.inf, torch.bfloat16: 2.0**128 - 2.0**119, torch.float16: 65520.0}
"""Smallest magnitude that round-to-nearest-even turns into Inf: the largest finite value plus half a unit."""


def count_beyond(values: Tensor, limit: float) -> Tensor:
    """How many of (n,) float32 are NaN or not below `limit` in magnitude, 0-d int64.

    On float32 before the cast: the compiler elides a cast to 16 bits and back, and with it the overflow.
    """
    return (~(values.abs() < limit)).sum()


class MergeKernel:
    """Callable for all slices of one merge. `kind` is what runs: 'compiled' or 'eager'."""

    def __init__(self, method: Method, kind: KernelKind, *, operand_elements: int) -> None:
        self._eager = fuse(method)
        self._compiled: Fused | None = None
        if kind == "compiled" or (kind == "auto" and operand_elements >= COMPILE_FROM):
            self._compiled = compile_fused(method)
        self.kind: Literal["compiled", "eager"] = "eager" if self._compiled is None else "compiled"

    def __call__(
        self,
        base: Tensor,
        experts: Sequence[Tensor],
        extras: Sequence[Tensor],
        state: State,
        start: int,
        out: Tensor,
    ) -> Tensor:
        """Merge one slice into `out`. start: flat index of its first element in its tensor. See `fuse`."""
        n = out.numel()
        if self._compiled is not None and n >= SMALL_SLICE:
            return self._compiled(base, experts, extras, state, torch.tensor(start), out)
        counts: Tensor | None = None
        for low in range(0, max(n, 1), EAGER_BLOCK):
            high = min(n, low + EAGER_BLOCK)
            block = self._eager(
                base[low:high],
                [e[low:high] for e in experts],
                [e[low:high] for e in extras],
                state,
                torch.tensor(start + low),
                out[low:high],
            )
            counts = block if counts is None else counts + block
        assert counts is not None
        return counts


def compile_fused(method: Method) -> Fused | None:
    """The compiled loop, or None (said) where this machine has no working C++ compiler."""
    import torch._dynamo as dynamo

    # Past the limit torch falls back to eager silently, with right bits and 20 times the time: make it an error.
    dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, 64)
    dynamo.config.fail_on_recompile_limit_hit = True
    compiled: Fused = torch.compile(fuse(method), dynamic=True, fullgraph=True)
    try:
        probe = torch.compile(lambda x: x + 1, dynamic=True)
        probe(torch.zeros(SMALL_SLICE))
    except Exception as error:
        logger.warning(
            "no compiled kernels on this machine (%s): running eagerly, 20 times slower. Install a C++ compiler.",
            str(error).splitlines()[0] if str(error) else type(error).__name__,
        )
        return None
    return compiled
