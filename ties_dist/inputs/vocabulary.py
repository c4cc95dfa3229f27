"""Experts with more or fewer rows per token than the base: which of their rows take part.

d is the base's: rows that only an expert has are dropped, rows that it lacks have a delta of zero. For methods on
deltas such rows are read from the base itself, so that nothing above knows of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ties_dist.checkpoints.catalogue import Checkpoint
from ties_dist.checkpoints.parameters import OpenFiles, Parameter
from ties_dist.compiler.slices import decoded
from ties_dist.dtypes import FLOATS, DType
from ties_dist.values.views import Files, Operand, Piece, View

if TYPE_CHECKING:
    from collections.abc import Callable

    from ties_dist.storage.base import Span

BASE_PLACE = 2
"""Of the base's files among those of an expert, behind its own and its adapter's."""


@dataclass(frozen=True, slots=True)
class FromBase(Files):
    """The base's files, as an expert has opened them."""

    files: Files

    def read(self, piece: Piece) -> Span:
        return self.files.read(piece._replace(place=BASE_PLACE))

    def kept(self, key: object, make: Callable[[], np.ndarray]) -> np.ndarray:
        return self.files.kept(("base", key), make)


@dataclass(frozen=True, kw_only=True, slots=True)
class Prolonged:
    """The first `own_numel` elements of an expert's, and the base's behind them."""

    own: View
    own_numel: int
    base: View
    dtype: str = "F32"

    @property
    def grain(self) -> int:
        return max(self.own.grain, self.base.grain)

    def pieces(self, start: int, stop: int) -> Sequence[Piece]:
        middle = min(max(start, self.own_numel), stop)
        own = self.own.pieces(start, middle) if start < middle else ()
        base = self.base.pieces(middle, stop) if middle < stop else ()
        return [*own, *(piece._replace(place=BASE_PLACE) for piece in base)]

    def read(self, files: Files, start: int, stop: int) -> Operand:
        middle = min(max(start, self.own_numel), stop)
        parts = [(self.own, files, start, middle), (self.base, FromBase(files), middle, stop)]
        return Joined(
            tuple((low - start, high - start, view.read(f, low, high)) for view, f, low, high in parts if low < high)
        )


@dataclass(frozen=True, slots=True)
class Joined:
    """Operands behind each other, decoded to float32: (first element, end, operand) of each."""

    parts: tuple[tuple[int, int, Operand], ...]

    @property
    def type(self) -> DType:
        return "float32"

    @property
    def content(self) -> Joined:
        return self

    def decode(self, low: int, high: int) -> np.ndarray:
        values = np.empty(high - low, np.float32)
        for first, end, operand in self.parts:
            a, b = max(low, first), min(high, end)
            if a < b:
                values[a - low : b - low] = decoded(operand, a - first, b - first)
        return values

    def release(self) -> None:
        for _, _, operand in self.parts:
            operand.release()


def beside_base(files: OpenFiles, base: OpenFiles) -> OpenFiles:
    """An expert's files, with the base's at `BASE_PLACE`."""
    own = [*files.readers, *files.readers][:BASE_PLACE]
    return OpenFiles((*own, base.readers[0]))


def fit_rows(
    base: Checkpoint, expert: Checkpoint, names: Sequence[str], *, prolong: bool
) -> tuple[Checkpoint, list[str]]:
    """An expert whose `names` have the base's rows, and a note. prolong: rows that it lacks are taken from the base."""
    fitted: dict[str, Parameter] = {}
    dropped = lacking = 0
    for name in names:
        ours, own = base.parameters[name], expert.parameters[name]
        if own.shape[0] > ours.shape[0]:
            fitted[name], dropped = replace(own, shape=ours.shape), own.shape[0] - ours.shape[0]
        elif prolong:
            view = Prolonged(own=own.view, own_numel=own.numel, base=ours.view)
            fitted[name] = replace(own, shape=ours.shape, view=view, dtype=view.dtype)
            lacking = ours.shape[0] - own.shape[0]
    said = [f"{dropped:,} rows that only it has are dropped"] if dropped else []
    said += [f"{lacking:,} rows that it lacks are not moved"] if lacking else []
    notes = [f"expert '{expert.name}': {len(fitted)} tensors have other rows than the base's: {', '.join(said)}"]
    opened = beside_base(expert.opened, base.opened) if lacking else expert.opened
    return replace(expert, parameters={**expert.parameters, **fitted}, opened=opened), notes if fitted else []


def with_other_rows(base: Checkpoint, expert: Checkpoint, names: Sequence[str]) -> list[str]:
    """Of `names`, tensors that differ from the base's in the number of rows, and in nothing else that matters."""
    return [
        name
        for name in names
        if (own := expert.parameters.get(name)) is not None
        if (ours := base.parameters[name]).dtype in FLOATS and own.dtype in FLOATS
        if len(own.shape) == len(ours.shape) > 0 and own.shape[1:] == ours.shape[1:] and own.shape[0] != ours.shape[0]
        if own.shape[0] > 0
    ]
