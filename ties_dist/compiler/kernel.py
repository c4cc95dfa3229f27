"""The merge of one slice: a method's plain torch function as one compiled loop, or, where that cannot be, eagerly.

A kernel is compiled once per (method, types, number of experts, names of the state) and kept on disk; every number
enters as data. torch is
imported only to trace a function that is not there yet, or to run one eagerly: 1.5 s that most merges never spend.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import xxhash

from ties_dist.compiler.kinds import KernelKind
from ties_dist.compiler.loop import Loop
from ties_dist.compiler.native import KernelStore, NativeKernel, compile_loop, load, processor, runs_here
from ties_dist.compiler.slices import Slice, flat
from ties_dist.dtypes import LOOP_BYTES, DType
from ties_dist.errors import PlanError, RecipeError
from ties_dist.methods.base import Method
from ties_dist.methods.outside import is_ours, place_of

if TYPE_CHECKING:
    from ties_dist.compiler.cuda import Gpus
    from ties_dist.compiler.fuse import Fused

logger = logging.getLogger(__name__)

Kind = tuple[tuple[DType, ...], DType, tuple[tuple[str, tuple[int, ...]], ...]]
"""What slices have in common that one loop merges: types, the output's, and names and shapes of the state in order."""
PACKAGE = Path(__file__).parent.parent
CODE = ("compiler/*.py", "kernels/*.py", "methods/*.py", "dtypes.py")
"""Of the package, what a loop of one of our methods follows from (tests/unit/compiler: all that these import)."""


@lru_cache(maxsize=1)
def _own_code() -> str:
    files = sorted(file for pattern in CODE for file in PACKAGE.glob(pattern))
    return xxhash.xxh3_128_hexdigest(b"\0".join(file.read_bytes() for file in files))


@dataclass
class MergeKernel:
    """Merges the slices of one merge, from any thread.

    wanted: 'auto' compiles; 'eager' never does. gpus: where slices are merged, instead of on the processor. factor:
    what it computes instead of a merge, see `fuse`. `kind` is what runs: 'compiled', 'eager' or 'cuda'.
    """

    method: Method
    experts: int
    wanted: KernelKind = "auto"
    store: KernelStore = field(default_factory=KernelStore)
    gpus: Gpus | None = None
    factor: int | None = None
    _known: dict[Kind, NativeKernel | None] = field(default_factory=dict)
    _on_gpus: dict[Kind, tuple[str, int]] = field(default_factory=dict)
    _fused: dict[DType, Fused] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def processor(self) -> str:
        """What loops are compiled for."""
        return str(processor()) if self.kind == "compiled" else ""

    @property
    def kind(self) -> Literal["compiled", "eager", "cuda"]:
        if self.gpus is not None:
            return "cuda"
        return "eager" if self.wanted == "eager" or None in self._known.values() else "compiled"

    def __call__(self, slices: Sequence[Slice]) -> list[np.ndarray]:
        """Merge slices into their `out`. Returns the counters of `fuse` for each, int64."""
        if self.gpus is not None:
            return self.gpus.merge(slices, self.prepare_cuda)
        return [self._merge(each) for each in slices]

    def _merge(self, each: Slice) -> np.ndarray:
        native = None if self.wanted == "eager" else self.prepare(each.types, each.out_type, each.state)
        if native is None:
            from ties_dist.compiler.fuse import run_eagerly

            return run_eagerly(self._function(each.out_type), each)
        items = [LOOP_BYTES[t] for t in (*each.types, each.out_type)]
        state, total = flat(each.state), np.zeros(native.counters, dtype=np.int64)
        for first, operands, out in each.ready:
            total += native(operands, state, each.position + first, out, items)
        return total

    def prepare(self, types: Sequence[DType], out_type: DType, state: Mapping[str, np.ndarray]) -> NativeKernel | None:
        """The compiled loop for these types: known, from disk, or made now. None where there can be none."""
        key = _kind(types, out_type, state)
        if key not in self._known:
            with self._lock:
                if key not in self._known:
                    self._known[key] = self._make(types, out_type, state)
        return self._known[key]

    def prepare_cuda(self, each: Slice) -> tuple[str, int]:
        """PTX of the loop for a slice's types, and how many counters it has. Raises PlanError."""
        key = _kind(each.types, each.out_type, each.state)
        if key not in self._on_gpus:
            with self._lock:
                if key not in self._on_gpus:
                    self._on_gpus[key] = self._make_ptx(each)
        return self._on_gpus[key]

    def _make(self, types: Sequence[DType], out_type: DType, state: Mapping[str, np.ndarray]) -> NativeKernel | None:
        if not runs_here((*types, out_type)):
            logger.warning("this processor has no float16 instructions: running eagerly, 20 times slower")
            return None
        key = self._key(types, out_type, state)
        if is_ours(type(self.method)) and (kept := self.store.get(key)) is not None:
            return kept
        from ties_dist.compiler.trace import UntraceableError

        try:
            loop = loop_of(self.method, self._function(out_type), types, state)
        except UntraceableError as error:
            logger.warning("`%s` cannot be compiled (%s): running eagerly, 20 times slower", self.method.name, error)
            return None
        code = compile_loop(loop)
        if is_ours(type(self.method)):  # of a method from elsewhere, nobody knows what else its code follows from
            self.store.put(key, code, len(loop.counters))
        return load(code, len(loop.counters))

    def _make_ptx(self, each: Slice) -> tuple[str, int]:
        key = self._key(each.types, each.out_type, each.state, "ptx")
        if is_ours(type(self.method)) and (kept := self.store.get_ptx(key)) is not None:
            return kept
        from ties_dist.compiler.cuda import compile_ptx
        from ties_dist.compiler.trace import UntraceableError

        try:
            loop = loop_of(self.method, self._function(each.out_type), each.types, each.state)
        except UntraceableError as error:
            raise PlanError(f"`{self.method.name}` cannot run on a GPU ({error}). Use --device cpu.") from error
        ptx = compile_ptx(loop)
        if is_ours(type(self.method)):
            self.store.put(key, ptx.encode(), len(loop.counters))
        return ptx, len(loop.counters)

    def _key(self, types: Sequence[DType], out_type: DType, state: Mapping[str, np.ndarray], *more: str) -> str:
        what = () if self.factor is None else ("factor", self.factor)
        facts = (_own_code(), repr(self.method), self.experts, tuple(types), out_type, shapes(state), *what, *more)
        return self.store.key(*facts)

    def _function(self, out_type: DType) -> Fused:
        if out_type not in self._fused:
            from ties_dist.compiler.fuse import fuse

            self._fused[out_type] = fuse(self.method, self.experts, out_type, self.factor)
        return self._fused[out_type]


def _kind(types: Sequence[DType], out_type: DType, state: Mapping[str, np.ndarray]) -> Kind:
    return tuple(types), out_type, tuple([(name, value.shape) for name, value in state.items()])


def loop_of(method: Method, function: Fused, types: Sequence[DType], state: Mapping[str, np.ndarray]) -> Loop:
    """The loop of a method's fused function. Raises UntraceableError where there is none, RecipeError where the method
    cannot merge slice by slice."""
    from ties_dist.compiler.elementwise import NotElementwiseError
    from ties_dist.compiler.trace import trace

    try:
        return trace(function, types, shapes(state))
    except NotElementwiseError as error:
        place = place_of(error, type(method), "merge")
        raise RecipeError(
            f"merge_method `{method.name}` cannot merge slice by slice: {error}{place}. Tensors are cut anywhere: an "
            "element of the result may follow only from the same element of base and experts and from the numbers of "
            "`state` (docs/recipe.md)."
        ) from error


def eager_reason(
    method: Method, operands: int, experts: int, state: Mapping[str, np.ndarray], factor: int | None = None
) -> str | None:
    """Why a method will run eagerly; None where there is a loop for it. Raises RecipeError as `loop_of`.

    factor: as of `fuse`.
    """
    from ties_dist.compiler.fuse import fuse
    from ties_dist.compiler.trace import UntraceableError

    try:
        loop_of(method, fuse(method, experts, "float32", factor), ["float32"] * operands, state)
    except UntraceableError as error:
        return str(error)
    return None


def shapes(state: Mapping[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    return {name: np.shape(value) for name, value in state.items()}
