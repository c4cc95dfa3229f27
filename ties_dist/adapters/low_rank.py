"""Views of an adapted model: the base's elements, changed where they are decoded, in float32.

Nothing adapted is ever stored, and nothing wider than the base's own bytes is held: a few thousand elements at a time
are widened and changed inside the kernel call. Every sum runs in one fixed order (`kernels.low_rank`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from ties_dist.checkpoints.forms.plain import Stored
from ties_dist.compiler.slices import decoded
from ties_dist.dtypes import ITEM_BYTES, DType
from ties_dist.storage.memory import MemorySpan
from ties_dist.values.views import Files, Operand, Piece, View

if TYPE_CHECKING:
    from collections.abc import Callable

NORM_ITEMS = 1 << 22
"""Elements read at a time where whole rows are needed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Factor:
    """One of an adapter's small matrices, read whole or by rows."""

    view: View
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return int(np.prod(self.shape))

    def read(self, files: Files, low: int = 0, high: int | None = None) -> np.ndarray:
        """Rows [low, high) as float32, a copy."""
        width = self.numel // max(1, self.shape[0])
        rows = self.shape[0] if high is None else high
        operand = self.view.read(files, low * width, rows * width)
        try:
            return decoded(operand, 0, (rows - low) * width).reshape(rows - low, *self.shape[1:])
        finally:
            operand.release()


@dataclass(frozen=True, slots=True)
class Changed:
    """Elements of a view's target that are changed where they are decoded. change: in place, from the first on."""

    target: Operand
    change: Callable[[np.ndarray, int], None]

    @property
    def type(self) -> DType:
        return "float32"

    @property
    def content(self) -> Changed:
        return self

    def decode(self, low: int, high: int) -> np.ndarray:
        values = decoded(self.target, low, high)
        self.change(values, low)
        return values

    def release(self) -> None:
        self.target.release()


@dataclass(frozen=True, kw_only=True, slots=True)
class LowRank:
    """W + scaling * B A, or its transpose where `turned`; with a magnitude, its outputs rescaled to that norm (DoRA).

    target: W, of this shape. a: (r, in), b: (out, r); magnitude: (out,).
    """

    target: View
    shape: tuple[int, int]
    a: Factor
    b: Factor
    turned: bool
    scaling: float
    magnitude: Factor | None = None
    dtype: str = "F32"
    grain: int = 1

    def pieces(self, start: int, stop: int) -> Sequence[Piece]:
        factors = [self.a, self.b, *([self.magnitude] if self.magnitude is not None else [])]
        return [*self.target.pieces(start, stop), *(p for f in factors for p in f.view.pieces(0, f.numel))]

    def read(self, files: Files, start: int, stop: int) -> Operand:
        added = self._added(files, start, stop)
        if self.magnitude is None:
            return added
        from ties_dist.kernels.low_rank import scale  # numba takes half a second to import

        factors = self.magnitude.read(files).reshape(-1) / files.kept(self, partial(self._norm, files))
        columns, by_row = self.shape[1], not self.turned

        def rescale(values: np.ndarray, low: int) -> None:
            scale(values, start + low, columns, factors, by_row)

        return Changed(added, rescale)

    def _added(self, files: Files, start: int, stop: int) -> Operand:
        """W + scaling * B A."""
        from ties_dist.kernels.low_rank import add_product

        columns = self.shape[1]
        first, last = start // columns, -(-stop // columns)
        if self.turned:
            left = np.ascontiguousarray(self.a.read(files)[:, first:last].T)
            right = np.ascontiguousarray(self.b.read(files).T)
        else:
            left, right = self.b.read(files, first, last), self.a.read(files)
        scaling = np.float32(self.scaling)

        def add(values: np.ndarray, low: int) -> None:
            add_product(values, start + low, columns, left, right, first, scaling)

        return Changed(self.target.read(files, start, stop), add)

    def _norm(self, files: Files) -> np.ndarray:
        """(out,) float32, L2 norms of W + scaling * B A over the inputs: one read of the tensor, the first time."""
        from ties_dist.kernels.low_rank import add_squares

        rows, columns = self.shape
        sums = np.zeros(columns if self.turned else rows)
        step = max(1, NORM_ITEMS // columns)
        for row in range(0, rows, step):
            end = min(rows, row + step)
            operand = self._added(files, row * columns, end * columns)
            try:
                values = decoded(operand, 0, (end - row) * columns)
            finally:
                operand.release()
            add_squares(values, columns, sums if self.turned else sums[row:end], not self.turned)
        return np.sqrt(sums).astype(np.float32)


@dataclass(frozen=True, kw_only=True, slots=True)
class Scaled:
    """W times a factor of each row, or of each column. by_output: the factors are of the layer's outputs."""

    target: View
    columns: int
    factors: Factor
    by_row: bool
    by_output: bool
    dtype: str = "F32"
    grain: int = 1

    def pieces(self, start: int, stop: int) -> Sequence[Piece]:
        return [*self.target.pieces(start, stop), *self.factors.view.pieces(0, self.factors.numel)]

    def read(self, files: Files, start: int, stop: int) -> Operand:
        from ties_dist.kernels.low_rank import scale  # numba takes half a second to import

        factors = self.factors.read(files).reshape(-1)

        def rescale(values: np.ndarray, low: int) -> None:
            scale(values, start + low, self.columns, factors, self.by_row)

        return Changed(self.target.read(files, start, stop), rescale)


@dataclass(frozen=True, kw_only=True, slots=True)
class Multiple:
    """W times one number."""

    target: View
    factor: float
    dtype: str = "F32"
    grain: int = 1

    def pieces(self, start: int, stop: int) -> Sequence[Piece]:
        return self.target.pieces(start, stop)

    def read(self, files: Files, start: int, stop: int) -> Operand:
        factor = np.float32(self.factor)

        def multiply(values: np.ndarray, low: int) -> None:
            values *= factor

        return Changed(self.target.read(files, start, stop), multiply)


@dataclass(frozen=True, kw_only=True, slots=True)
class Constant:
    """One number, everywhere."""

    value: float
    dtype: str
    grain: int = 1

    def pieces(self, start: int, stop: int) -> Sequence[Piece]:
        return ()

    def read(self, files: Files, start: int, stop: int) -> Operand:
        raw = np.float32(self.value).tobytes() if self.dtype == "F32" else np.float16(self.value).tobytes()
        raw = np.float32(self.value).tobytes()[2:] if self.dtype == "BF16" else raw  # numpy has none: the upper half
        assert len(raw) == ITEM_BYTES[self.dtype]
        return Stored(MemorySpan(view=memoryview(raw * (stop - start))), self.dtype)
