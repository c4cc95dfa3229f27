"""The bytes of an adapted model: the base's, or computed when they are read, slice by slice, in float32."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ties_dist.checkpoints.header import TensorEntry
from ties_dist.compiler.slices import widened
from ties_dist.dtypes import TYPES
from ties_dist.errors import CheckpointError
from ties_dist.storage.base import Reader, Span
from ties_dist.storage.memory import MemorySpan

VIRTUAL = "adapted/"
"""Before a tensor's name: a file that is computed. No file of a checkpoint has a slash in its name."""
SCALED = VIRTUAL
"""The same, of an adapter's own tensors, times what its scaling gives each."""
CONSTANT = "constant/"
"""Before a dtype and a number: a file of any length that repeats it."""
BESIDE = "adapter/"
"""Before the name of a file in the adapter's folder."""
NORM_ITEMS = 1 << 22
"""Elements read at a time where whole rows are needed."""


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """W + scaling * B A, or its transpose where `turned`; with a magnitude, its outputs rescaled to that norm (DoRA).

    target: what is adapted, in the base's files or the adapter's. a: (r, in), b: (out, r); magnitude: (out,).
    """

    target: TensorEntry
    a: TensorEntry
    b: TensorEntry
    turned: bool
    scaling: float
    magnitude: TensorEntry | None = None


@dataclass(frozen=True, kw_only=True)
class Scaled:
    """W times a factor of each row, or of each column. by_output: the factors are of the layer's outputs."""

    target: TensorEntry
    factors: TensorEntry
    by_row: bool
    by_output: bool


@dataclass(frozen=True, kw_only=True)
class Multiple:
    """W times one number."""

    target: TensorEntry
    factor: float


Change = LowRank | Scaled | Multiple


@dataclass
class AdaptedReader:
    """A `Reader` over base and adapter. changes: by tensor, whose bytes are those of the file VIRTUAL + tensor."""

    base: Reader
    adapter: Reader
    changes: Mapping[str, Change]
    _norms: dict[str, np.ndarray] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def names(self) -> Sequence[str]:
        return self.base.names()

    def size(self, name: str) -> int:
        if name.startswith(VIRTUAL):
            return 4 * self.changes[name.removeprefix(VIRTUAL)].target.numel
        reader, name = self._place(name)
        return reader.size(name)

    def read(self, name: str, start: int, stop: int) -> Span:
        if name.startswith(CONSTANT):
            return MemorySpan(view=_repeated(name, start, stop))
        if not name.startswith(VIRTUAL):
            reader, name = self._place(name)
            return reader.read(name, start, stop)
        tensor = name.removeprefix(VIRTUAL)
        if tensor not in self.changes:
            raise FileNotFoundError(name)
        change, first, last = self.changes[tensor], start // 4, stop // 4
        if last > change.target.numel:
            raise CheckpointError(f"{tensor} has {change.target.numel:,} elements where {last:,} are expected.")
        # Bytes between elements are never asked for by a merge; a reader may be.
        values = self._values(tensor, change, first, -(-stop // 4))
        return MemorySpan(view=values.data.cast("B")[start - 4 * first : stop - 4 * first])

    def _place(self, name: str) -> tuple[Reader, str]:
        return (self.adapter, name.removeprefix(BESIDE)) if name.startswith(BESIDE) else (self.base, name)

    def _values(self, tensor: str, change: Change, first: int, last: int) -> np.ndarray:
        """Elements [first, last) of a tensor as adapted, float32."""
        if isinstance(change, Multiple):
            return self._elements(change.target, first, last) * np.float32(change.factor)
        from ties_dist.kernels.low_rank import scale  # numba takes half a second to import

        if isinstance(change, Scaled):
            values = self._elements(change.target, first, last)
            scale(values, first, change.target.shape[-1], self._whole(change.factors).reshape(-1), change.by_row)
            return values
        values = self._sum(change, first, last)
        if change.magnitude is not None:
            factors = self._whole(change.magnitude).reshape(-1) / self._norm(tensor, change)
            scale(values, first, change.target.shape[1], factors, not change.turned)
        return values

    def _sum(self, change: LowRank, first: int, last: int) -> np.ndarray:
        """W + scaling * B A."""
        from ties_dist.kernels.low_rank import add_product

        values, columns = self._elements(change.target, first, last), change.target.shape[1]
        low, high = first // columns, -(-last // columns)
        if change.turned:
            left = np.ascontiguousarray(self._whole(change.a)[:, low:high].T)
            right = np.ascontiguousarray(self._whole(change.b).T)
        else:
            rank = change.b.shape[1]
            left = self._elements(change.b, low * rank, high * rank, self.adapter).reshape(-1, rank)
            right = self._whole(change.a)
        add_product(values, first, columns, left, right, low, np.float32(change.scaling))
        return values

    def _norm(self, tensor: str, change: LowRank) -> np.ndarray:
        """(out,) float32, L2 norms of W + scaling * B A over the inputs: one read of the tensor, the first time."""
        from ties_dist.kernels.low_rank import add_squares

        with self._lock:
            if tensor not in self._norms:
                rows, columns = change.target.shape
                sums = np.zeros(columns if change.turned else rows)
                step = max(1, NORM_ITEMS // columns)
                for row in range(0, rows, step):
                    end = min(rows, row + step)
                    values = self._sum(change, row * columns, end * columns)
                    into = sums if change.turned else sums[row:end]
                    add_squares(values, columns, into, not change.turned)
                self._norms[tensor] = np.sqrt(sums).astype(np.float32)
            return self._norms[tensor]

    def _whole(self, entry: TensorEntry) -> np.ndarray:
        return self._elements(entry, 0, entry.numel, self.adapter).reshape(entry.shape)

    def _elements(self, entry: TensorEntry, first: int, last: int, reader: Reader | None = None) -> np.ndarray:
        """Elements [first, last) of a stored tensor, float32, a copy. reader: whose file it is, if not by its name."""
        item = entry.nbytes // max(1, entry.numel)
        place, file = (reader, entry.file) if reader is not None else self._place(entry.file)
        span = place.read(file, entry.start + first * item, entry.start + last * item)
        try:
            return np.array(widened(span.view, TYPES[entry.dtype]))
        finally:
            span.release()


def _repeated(name: str, start: int, stop: int) -> memoryview:
    dtype, value = name.removeprefix(CONSTANT).split("/")
    raw = np.float32(value).tobytes() if dtype == "F32" else np.float16(value).tobytes()
    raw = np.float32(value).tobytes()[2:] if dtype == "BF16" else raw  # numpy has no bfloat16: the upper half
    repeated = np.frombuffer(raw * (-(-stop // len(raw)) - start // len(raw)), np.uint8)
    return repeated.data[start % len(raw) :][: stop - start]
