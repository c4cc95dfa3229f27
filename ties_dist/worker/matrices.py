"""The matrix lane: tensors that a method merges whole. Each is merged once, by one worker, and kept in the run's
folder; units then copy their ranges from there: they stay small, and writes, digests and resuming stay as they are.

A matrix is a function of the plan alone, computed in one fixed order, and gets its name by a rename: whoever merges it
again, late or twice, writes the same bytes.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from ties_dist.compiler.slices import TYPES, beyond, narrowed
from ties_dist.errors import OutputError
from ties_dist.planning.plan import digest
from ties_dist.storage.local import output_error, write_durably
from ties_dist.storage.memory import MemorySpan

if TYPE_CHECKING:
    from ties_dist.worker.merging import MergeStep, Worker


@dataclass(frozen=True, kw_only=True)
class Solved:
    """How a matrix was merged. plain: there was no solution, so its units merge it element by element.

    digest: of its bytes as the output has them. nonfinite: per expert, of its weights and its Gram matrix together;
    overflowing: entries of the result.
    """

    plain: bool
    digest: str = ""
    nonfinite: tuple[int, ...] = ()
    overflowing: int = 0


@dataclass
class Matrices:
    """Merged matrices by tensor. folder: where they are kept; None: in memory, for merges that are only looked at.

    fence: raises where another run has taken over.
    """

    folder: Path | None = None
    fence: Callable[[], None] = lambda: None
    _known: dict[str, Solved] = field(default_factory=dict)
    _content: dict[str, memoryview] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def put(self, tensor: str, solved: Solved, content: bytes | memoryview = b"") -> None:
        if self.folder is None:
            with self._lock:
                self._known[tensor], self._content[tensor] = solved, memoryview(content)
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise output_error(error, self.folder) from error
        write_durably(self._path(tensor, "bytes"), content, self.fence)
        write_durably(self._path(tensor, "json"), json.dumps(vars(solved)), self.fence)

    def get(self, tensor: str) -> Solved | None:
        """None where it was not merged yet."""
        with self._lock:
            if tensor not in self._known and self.folder is not None:
                try:
                    found = json.loads(self._path(tensor, "json").read_text())
                    self._known[tensor] = Solved(**{**found, "nonfinite": tuple(found["nonfinite"])})
                except (OSError, ValueError, TypeError, KeyError):
                    return None
            return self._known.get(tensor)

    def intact(self, tensor: str) -> bool:
        """Whether it is there and has the bytes that were written."""
        solved = self.get(tensor)
        try:
            whole = solved is not None and digest(self._all(tensor)) == (solved.digest or digest(b""))
        except OSError:
            whole = False
        if not whole:
            with self._lock:
                self._known.pop(tensor, None)
        return whole

    def read(self, tensor: str, start: int, stop: int) -> MemorySpan:
        """Bytes [start, stop) of a matrix as the output has it. Raises OutputError."""
        content = self._all(tensor)[start:stop]
        if len(content) != stop - start:
            raise OutputError(f"{self._path(tensor, 'bytes')} was cut short. Run the same command again.")
        return MemorySpan(view=content)

    def _all(self, tensor: str) -> memoryview:
        if self.folder is None:
            return self._content[tensor]
        return np.memmap(self._path(tensor, "bytes"), mode="r").data if self._size(tensor) else memoryview(b"")

    def _size(self, tensor: str) -> int:
        return self._path(tensor, "bytes").stat().st_size

    def _path(self, tensor: str, kind: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{xxhash.xxh3_64_hexdigest(tensor.encode())}.{kind}"


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
