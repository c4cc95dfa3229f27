"""Neighbours are read in one go, and each reader of them sees its own bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest

from ties_dist.values.views import Files, Piece
from ties_dist.worker.joined import GAP, LONGEST, SMALL, Joined, runs


@dataclass
class Bytes:
    view: memoryview
    given: list[int]

    def release(self) -> None:
        self.given.append(len(self.view))


@dataclass
class Recorded(Files):
    """Files whose bytes say where they are."""

    reads: list[Piece] = field(default_factory=list)
    released: list[int] = field(default_factory=list)

    def read(self, piece: Piece) -> Bytes:
        self.reads.append(piece)
        return Bytes(memoryview(expected(piece)), self.released)

    def kept(self, key: object, make: Callable[[], np.ndarray]) -> np.ndarray:
        raise AssertionError("nothing is kept")


def expected(piece: Piece) -> bytes:
    return bytes((ord(piece.file) + i) % 251 for i in range(piece.start, piece.stop))


PIECES = [
    *(Piece(0, "a", 64 * i, 64 * i + 64) for i in range(100)),
    Piece(0, "a", 6400 + GAP, 6400 + GAP + 5),
    Piece(0, "a", 2_000_000, 2_000_064),
    Piece(1, "a", 6400 + GAP + 5, 6500 + GAP),
    Piece(0, "b", 0, SMALL + 1),
    Piece(0, "b", SMALL + 1, SMALL + 9),
]


def test_pieces_give_their_own_bytes_and_neighbours_are_one_read() -> None:
    files = Recorded()
    joined = Joined(files)
    joined.expect(reversed(PIECES))
    assert files.reads == [Piece(0, "a", 0, 6400 + GAP + 5)]
    spans = [joined.read(piece) for piece in PIECES]
    assert [bytes(span.view) for span in spans] == [expected(piece) for piece in PIECES]
    assert len(files.reads) == 1 + 4
    for span in spans[:100]:
        span.release()
    assert files.released == [], "one of its users is left"
    for span in spans[100:]:
        span.release()
    assert len(files.released) == 5


@pytest.mark.parametrize(("gap", "together"), [(0, True), (GAP, True), (GAP + 1, False)])
def test_a_small_gap_is_read_too(gap: int, together: bool) -> None:
    pieces = [Piece(0, "a", 0, 10), Piece(0, "a", 10 + gap, 20 + gap)]
    assert list(runs(pieces)) == ([pieces] if together else [])


def test_a_range_is_no_longer_than_a_block() -> None:
    pieces = [Piece(0, "a", i * SMALL, (i + 1) * SMALL) for i in range(40)]
    found = list(runs(pieces))
    assert [p for run in found for p in run] == pieces
    assert max(run[-1].stop - run[0].start for run in found) == LONGEST
