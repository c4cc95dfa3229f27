"""How the elements of a parameter are read: what every storage form fulfils.

A *tensor* is what a file stores, a *parameter* what a model computes with. A `View` says which bytes some elements of a
parameter take and how these become numbers; it is a small value that travels. `Files` is what a process has opened, an
`Operand` some elements that were read. Numbers that are stored as such are used where they lie; others are decoded
inside the kernel call, a few thousand at a time, so that memory holds bytes as stored and never a whole unit widened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from ties_dist.dtypes import DType
from ties_dist.storage.base import Span

if TYPE_CHECKING:
    import numpy as np

DECODED_AT_ONCE = 1 << 16
"""Elements: 256 KiB of float32 for each operand, which stay in the second-level cache."""


class Piece(NamedTuple):
    """Bytes [start, stop) of a file. place: of the model's own files 0, of its adapter's 1."""

    place: int
    file: str
    start: int
    stop: int


class Files(Protocol):
    """The opened files of one model; safe to use from several threads."""

    def read(self, piece: Piece) -> Span:
        """Raises FileNotFoundError, CheckpointError."""
        ...

    def kept(self, key: object, make: Callable[[], np.ndarray]) -> np.ndarray:
        """What `make` gave the first time: for the few small arrays that a view needs again and again."""
        ...


class Encoded(Protocol):
    """Elements that have to be decoded."""

    def decode(self, low: int, high: int) -> np.ndarray:
        """(high - low,) float32 of its own, at most `DECODED_AT_ONCE`; counted from the first element that was read."""
        ...


class Operand(Protocol):
    """Some elements of one parameter, read. content: their bytes, of `type`; or what decodes them, as float32."""

    @property
    def type(self) -> DType: ...

    @property
    def content(self) -> memoryview | Encoded: ...

    def release(self) -> None:
        """Nothing of the content may be used afterwards."""
        ...


class View(Protocol):
    """Where a parameter is stored, and how it is read.

    dtype: what it reads as, as a header has it. grain: elements that can only be read together, from a multiple on.
    """

    @property
    def dtype(self) -> str: ...

    @property
    def grain(self) -> int: ...

    def pieces(self, start: int, stop: int) -> Sequence[Piece]:
        """The bytes that reading elements [start, stop) takes."""
        ...

    def read(self, files: Files, start: int, stop: int) -> Operand:
        """Raises FileNotFoundError, CheckpointError."""
        ...


def read_bytes(view: View, start: int, stop: int) -> int:
    """What reading elements [start, stop) reads."""
    return sum(piece.stop - piece.start for piece in view.pieces(start, stop))


def blocks(contents: Sequence[memoryview | Encoded], elements: int) -> Iterator[tuple[int, int]]:
    """Elements to work on at once: all of them, or where something has to be decoded a few thousand at a time."""
    if all(isinstance(content, memoryview) for content in contents):
        yield 0, elements
        return
    for low in range(0, elements, DECODED_AT_ONCE):
        yield low, min(elements, low + DECODED_AT_ONCE)


def decode(encoded: Encoded, low: int, high: int) -> np.ndarray:
    """(high - low,) float32: what a form decoded, and where it comes in. Raises TypeError where that is something else,
    whose bytes would be taken for float32."""
    values = encoded.decode(low, high)
    if values.dtype.str != "<f4" or values.shape != (high - low,):
        found = f"{values.dtype} of shape {values.shape}"
        raise TypeError(f"{type(encoded).__name__}.decode gave {found}, not float32 of shape {(high - low,)}")
    return values


class Shifted:
    """Encoded elements from a later one on."""

    def __init__(self, encoded: Encoded, by: int) -> None:
        self._encoded, self._by = encoded, by

    def decode(self, low: int, high: int) -> np.ndarray:
        return decode(self._encoded, self._by + low, self._by + high)
