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

from ties_dist.methods.base import Method, State, count

KernelKind = Literal["auto", "compiled", "eager"]

logger = logging.getLogger(__name__)

EAGER_BLOCK = 1 << 15
"""Elements: temporaries stay in the second-level cache, and torch does not split an operation over threads, whose
barriers cost 20 times the work on a busy machine."""
SMALL_SLICE = 4096
"""Elements: shorter slices never reach the compiler (it specialises on sizes 0 and 1, and a call costs more)."""
COMPILE_FROM = 192 << 20
"""Operand elements (d x experts): below this, eager finishes before the compiler would."""

LARGE_SLICE = 1 << 26
"""Elements: longer slices are cut, so that no 32-bit counter overflows."""
ONE_LOOP = {
    "max_fusion_size": 4096,
    "realize_opcount_threshold": 1_000_000,
    "realize_reads_threshold": 1_000_000,
    "realize_acc_reads_threshold": 1_000_000,
}
"""The compiler's defaults split a loop of this many operations in two and pass masks between them through memory: 223
instead of 40 ms for 8M elements of base + 3 (one thread)."""

Fused = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor], State, Tensor], tuple[Tensor, Tensor]]

# Inputs are read-only views of maps; kernels never write to them.
warnings.filterwarnings("ignore", message="The given (buffer|NumPy array) is not writ", category=UserWarning)
warnings.filterwarnings("ignore", message="bf16 and fp16 are mixed", category=UserWarning)


def fuse(method: Method, dtype: torch.dtype) -> Fused:
    """The whole arithmetic of a slice as one function of tensors, ready for the compiler.

    base: (n,), experts and extras: (n,) each, as stored; state, position: see Method.merge.
    Returns the result, (n,) of `dtype`, and int32 counters: non-finite entries of base, of each expert, of each extra,
    of the result, then the method's own. For methods on weights, `base` is any tensor of the slice's length.

    The result is returned and copied: written into an argument it takes the compiler another pass (33 against 22 ms).
    """

    def merge_slice(
        base: Tensor, experts: Sequence[Tensor], extras: Sequence[Tensor], state: State, position: Tensor
    ) -> tuple[Tensor, Tensor]:
        theta = base.to(torch.float32)
        operands = [e.to(torch.float32) for e in experts]
        side = [e.to(torch.float32) for e in extras]
        bad = [count_beyond(x, torch.inf) for x in (theta, *operands, *side)]
        if method.operand == "delta":
            operands = [x - theta for x in operands]
            side = [x - theta for x in side]
        merged, counts = method.merge(theta, operands, side, state, position)
        counters = torch.stack([*bad, count_beyond(merged, OVERFLOWS_FROM[dtype]), *counts])
        return merged.to(dtype), counters  # the one cast: round-to-nearest-even

    return merge_slice


EAGERLY = "running eagerly, 20 times slower. Install a C++ compiler (g++)."

OVERFLOWS_FROM = {torch.float32: torch.inf, torch.bfloat16: 2.0**128 - 2.0**119, torch.float16: 65520.0}
"""Smallest magnitude that round-to-nearest-even turns into Inf: the largest finite value plus half a unit."""


def count_beyond(values: Tensor, limit: float) -> Tensor:
    """How many of (n,) float32 are NaN or not below `limit` in magnitude, 0-d int32.

    On float32 before the cast: the compiler elides a cast to 16 bits and back, and with it the overflow.
    """
    return count(~(values.abs() < limit))


def wants_compiler(kind: KernelKind, operand_elements: int) -> bool:
    """Whether a merge of so many operand elements is to be compiled, where there is a compiler."""
    return kind == "compiled" or (kind == "auto" and operand_elements >= COMPILE_FROM)


class MergeKernel:
    """Callable for all slices of one merge. `kind` is what runs: 'compiled' or 'eager'."""

    def __init__(self, method: Method, kind: KernelKind, *, operand_elements: int) -> None:
        self._method = method
        self._fused: dict[torch.dtype, tuple[Fused, Fused]] = {}
        compiled = wants_compiler(kind, operand_elements) and has_compiler()
        self.kind: Literal["compiled", "eager"] = "compiled" if compiled else "eager"

    def warm_up(
        self,
        base: torch.dtype,
        experts: Sequence[torch.dtype],
        extras: Sequence[torch.dtype],
        state: State,
        out: torch.dtype,
    ) -> None:
        """Compile for slices of these types now, on whatever thread this is, rather than at the first slice."""
        if self.kind == "compiled":
            zeros = [torch.zeros(SMALL_SLICE, dtype=dtype) for dtype in (base, *experts, *extras)]
            split = 1 + len(experts)
            self(zeros[0], zeros[1:split], zeros[split:], state, 0, torch.zeros(SMALL_SLICE, dtype=out))

    def __call__(
        self,
        base: Tensor,
        experts: Sequence[Tensor],
        extras: Sequence[Tensor],
        state: State,
        start: int,
        out: Tensor,
    ) -> Tensor:
        """Merge one slice into `out`, (n,) of the output's type. start: flat index of its first element in its tensor.

        Returns the counters of `fuse`, int64.
        """
        n = out.numel()
        if self.kind == "compiled" and n >= SMALL_SLICE:
            try:
                return self._run(self._functions(out.dtype)[1], LARGE_SLICE, base, experts, extras, state, start, out)
            except Exception as error:
                if not _is_compile_failure(error):
                    raise
                logger.warning("compiling the kernel failed (%s): %s", str(error).splitlines()[0], EAGERLY)
                self.kind = "eager"
        return self._run(self._functions(out.dtype)[0], EAGER_BLOCK, base, experts, extras, state, start, out)

    @staticmethod
    def _run(
        function: Fused,
        step: int,
        base: Tensor,
        experts: Sequence[Tensor],
        extras: Sequence[Tensor],
        state: State,
        start: int,
        out: Tensor,
    ) -> Tensor:
        counters = torch.zeros((), dtype=torch.int64)
        for low in range(0, max(out.numel(), 1), step):
            high = min(out.numel(), low + step)
            merged, counted = function(
                base[low:high],
                [e[low:high] for e in experts],
                [e[low:high] for e in extras],
                state,
                torch.tensor(start + low),
            )
            out[low:high].copy_(merged)
            counters = counters + counted
        return counters

    def _functions(self, dtype: torch.dtype) -> tuple[Fused, Fused]:
        if dtype not in self._fused:
            eager = fuse(self._method, dtype)
            self._fused[dtype] = eager, compile_fused(eager) if self.kind == "compiled" else eager
        return self._fused[dtype]


def has_compiler() -> bool:
    """Whether there is a C++ compiler on this machine; said where there is none."""
    from torch._inductor import config  # these imports cost a second: only where something is compiled

    config.compile_threads = 1  # for one kernel, a pool of compiling processes costs more than it saves
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        logger.warning("no C++ compiler on this machine: %s", EAGERLY)
        return False
    return True


def _is_compile_failure(error: Exception) -> bool:
    from torch._dynamo.exc import BackendCompilerFailed

    return isinstance(error, BackendCompilerFailed)


def compile_fused(function: Fused) -> Fused:
    """The function as one compiled loop, for slices of any length and inputs of any types."""
    from torch._dynamo import config

    # Past the limit torch falls back to eager silently, with right bits and 20 times the time: make it an error.
    config.recompile_limit = max(config.recompile_limit, 64)
    config.fail_on_recompile_limit_hit = True
    compiled: Fused = torch.compile(function, dynamic=True, fullgraph=True, options=dict(ONE_LOOP))
    return compiled
