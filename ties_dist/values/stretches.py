"""Sums of blocks of a parameter, as they are asked for and come back."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import NamedTuple

BLOCK_ELEMENTS = 1 << 18
"""Of a parameter in one block: part of what a sum is, since float64 addition is rounded."""
BLOCKS_AT_ONCE = 16
"""Of a stretch: as many elements as a unit of 16 bits has."""

Vector = tuple[float, ...]
"""The sums of one block, one for each product that is asked for."""


class Stretch(NamedTuple):
    """Blocks [first, stop) of a parameter, the last of which may end before it is full."""

    tensor: str
    first: int
    stop: int


def blocks_of(elements: int) -> int:
    return -(-elements // BLOCK_ELEMENTS)


def stretches(tensor: str, elements: int, known: Collection[int]) -> Iterator[Stretch]:
    """What covers every block that is not known."""
    missing = [block for block in range(blocks_of(elements)) if block not in known]
    first = 0
    for i, block in enumerate(missing):
        last = i + 1 == len(missing) or missing[i + 1] != block + 1 or i + 1 - first == BLOCKS_AT_ONCE
        if last:
            yield Stretch(tensor, missing[first], block + 1)
            first = i + 1
