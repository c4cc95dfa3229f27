"""A parameter that is a tensor of a file: its bytes are its numbers, used where they lie."""

from __future__ import annotations

from dataclasses import dataclass

from ties_dist.checkpoints.header import TensorEntry
from ties_dist.checkpoints.parameters import Parameter
from ties_dist.dtypes import ITEM_BYTES, TYPES, DType
from ties_dist.storage.base import Span
from ties_dist.values.views import Files, Piece


@dataclass(frozen=True, slots=True)
class Plain:
    """first: byte of the file at which the elements begin."""

    file: str
    first: int
    dtype: str
    place: int = 0

    @property
    def grain(self) -> int:
        return 1

    def pieces(self, start: int, stop: int) -> tuple[Piece, ...]:
        item = ITEM_BYTES[self.dtype]
        return (Piece(self.place, self.file, self.first + start * item, self.first + stop * item),)

    def read(self, files: Files, start: int, stop: int) -> Stored:
        (piece,) = self.pieces(start, stop)
        return Stored(files.read(piece), self.dtype)


@dataclass(frozen=True, slots=True)
class Stored:
    """Numbers as they lie in a span."""

    span: Span
    dtype: str

    @property
    def type(self) -> DType:
        return TYPES[self.dtype]

    @property
    def content(self) -> memoryview:
        return self.span.view

    def release(self) -> None:
        self.span.release()


def parameter(entry: TensorEntry, place: int = 0) -> Parameter:
    """A tensor, as a parameter of its name."""
    view = Plain(entry.file, entry.start, entry.dtype, place)
    return Parameter(name=entry.name, dtype=entry.dtype, shape=entry.shape, view=view, file=entry.file)
