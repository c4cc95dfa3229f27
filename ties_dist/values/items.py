"""What travels between a driver and its workers: pieces of work, and what became of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from ties_dist.methods.scalars import Scalars
from ties_dist.storage.base import BLOCK_BYTES
from ties_dist.storage.digests import digest
from ties_dist.thresholds import Cuts
from ties_dist.values.counters import Row

UNITS_AROUND = 4
"""Items in memory, being read ahead (2) and written behind (2) those that are computed, one per thread."""


class Range(NamedTuple):
    """Bytes [start, stop) of one output file; bounds are multiples of 1 MiB but for the file's end."""

    file: str
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    @property
    def blocks(self) -> int:
        """Of 1 MiB, the last of a file may be shorter."""
        return -(-self.nbytes // BLOCK_BYTES)


class Portion(NamedTuple):
    """How much work something is: bytes, or as many as take as long. group: what it is best handed out with, if any."""

    weight: int
    group: str = ""


class WorkItem(NamedTuple):
    """A unit of work: byte ranges, possibly of several output files, that one worker writes together.

    A plain model has one range per item. An encoded block and its scale, or a bucket's part, is one item of several.
    """

    ranges: tuple[Range, ...]

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in self.ranges)

    @property
    def portion(self) -> Portion:
        """Grouped by shard: reads and writes of one worker stay sequential, and two machines rarely meet in a file."""
        return Portion(self.nbytes, self.ranges[0].file)

    def __str__(self) -> str:
        return " and ".join(f"{r.file}, bytes {r.start:,} to {r.stop:,}" for r in self.ranges)


@dataclass(frozen=True, kw_only=True)
class MergeTask:
    """One item and the state it is merged with: cuts and scalars by source tensor, and the sign of exact
    cancellations."""

    item: WorkItem
    cuts: Mapping[str, Cuts]
    majority: int
    scalars: Mapping[str, Scalars] = field(default_factory=dict)

    @cached_property
    def state_digest(self) -> str:
        """Digest of thresholds and scalars alone; the majority sign stands beside it in the journal."""
        found = [*sorted(self.cuts.items()), *sorted(self.scalars.items())]
        return digest(repr(found).encode())


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeResult:
    """An item whose bytes are written, not yet durable.

    blocks: digest of each 1 MiB block that the item covers, range after range. counts: a row per source
    tensor (`Counters`). dependent: entries that depend on the majority sign; sign_sum: of elected signs.
    """

    item: WorkItem
    state_digest: str
    majority: int
    blocks: tuple[str, ...]
    counts: Mapping[str, Row]
    dependent: int
    sign_sum: int = 0

    def __str__(self) -> str:
        return str(self.item)

    @property
    def by_range(self) -> Iterator[tuple[Range, tuple[str, ...]]]:
        """Each range with the digests of its blocks."""
        first = 0
        for each in self.item.ranges:
            yield each, self.blocks[first : first + each.blocks]
            first += each.blocks


def as_item(kept: Sequence[Sequence[Sequence[Any]]]) -> WorkItem:
    """From what JSON makes of one: [[[file, start, stop], ...]]."""
    (ranges,) = kept
    return WorkItem(tuple(Range(str(file), int(start), int(stop)) for file, start, stop in ranges))


def blocks_by_file(results: Iterable[MergeResult]) -> dict[str, list[str]]:
    """Digests of the blocks of every output file, in file order, where the results cover each byte once."""
    blocks: dict[str, list[str]] = {}
    for each, digests in sorted(part for result in results for part in result.by_range):
        blocks.setdefault(each.file, []).extend(digests)
    return blocks


def output_files(items: Iterable[WorkItem]) -> list[str]:
    """The output files that some items touch, sorted."""
    return sorted({each.file for item in items for each in item.ranges})


class Seat(NamedTuple):
    """One of several nodes that do something together."""

    place: int
    of: int
