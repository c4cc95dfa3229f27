"""Small reads of one unit, done together: neighbours in a file become one range.

A unit of a model with very many small tensors has ten thousand slices of each input. A buffer and a system call for
each took 8 KiB and 20 us for what are 64 bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from ties_dist.storage.base import Span
from ties_dist.values.views import Files, Piece

SMALL = 64 << 10
"""Bytes of a piece that is read with its neighbours; a system call costs a larger one nothing."""
GAP = 4 << 10
"""Bytes between two that are read, too: as much as a page."""
LONGEST = 1 << 20


@dataclass
class Range:
    """One span that several pieces look into; given back with the last of them."""

    span: Span
    start: int
    users: int

    def part(self, piece: Piece) -> Part:
        return Part(self.span.view[piece.start - self.start : piece.stop - self.start], self)

    def give_back(self) -> None:
        self.users -= 1
        if self.users == 0:
            self.span.release()


@dataclass(slots=True)
class Part:
    view: memoryview
    _of: Range

    def release(self) -> None:
        self._of.give_back()


@dataclass
class Joined(Files):
    """The files of a model, for one unit: `expect` says what will be read, once each. Used by one thread at a time."""

    files: Files
    _ranges: dict[Piece, Range] = field(default_factory=dict)

    def expect(self, pieces: Iterable[Piece]) -> None:
        """Reads what is worth reading together. Raises as `read`."""
        for together in runs(sorted(p for p in pieces if p.stop - p.start <= SMALL)):
            first = together[0]
            whole = Piece(first.place, first.file, first.start, max(p.stop for p in together))
            shared = Range(self.files.read(whole), first.start, len(together))
            self._ranges |= dict.fromkeys(together, shared)

    def read(self, piece: Piece) -> Span:
        shared = self._ranges.get(piece)
        return self.files.read(piece) if shared is None else shared.part(piece)

    def kept(self, key: object, make: Callable[[], np.ndarray]) -> np.ndarray:
        return self.files.kept(key, make)


def runs(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Of sorted pieces those, two or more, that lie next to each other."""
    run: list[Piece] = []
    for piece in pieces:
        near = bool(run) and piece[:2] == run[-1][:2] and piece.start - run[-1].stop <= GAP
        if near and piece.stop - run[0].start <= LONGEST:
            run.append(piece)
            continue
        if len(run) > 1:
            yield run
        run = [piece]
    if len(run) > 1:
        yield run
