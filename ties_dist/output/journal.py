"""The append-only record of a run: what is durable, computed with which state, and what was counted on the way.

One JSON line per fact, each with a checksum, in `journal-<token>.jsonl`: a driver appends only to its own file, a
resuming one reads all of them. A line is written after the bytes it speaks of are synced, so a range in the journal is
a range on the disk.
"""

from __future__ import annotations

import json
import logging
from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import Field, NonNegativeInt, TypeAdapter, ValidationError, model_validator

from ties_dist.output.documents import FileName
from ties_dist.output.manifest import Document, KnownCut, KnownTensorCut
from ties_dist.storage.base import BLOCK_BYTES
from ties_dist.storage.digests import digest
from ties_dist.storage.place import Place
from ties_dist.thresholds import Cuts, ModelCut
from ties_dist.values.items import MergeResult, Range, WorkItem
from ties_dist.values.stretches import Stretch, Vector

logger = logging.getLogger(__name__)

_BEFORE, _BEHIND = "journal-", ".jsonl"
"""Of a token, in the name of a journal."""


@dataclass
class Journal:
    """Appends to the file of one driver in the folder of a run; `commit` makes what was added durable.

    counters: names of the numbers in a result's rows.
    """

    place: Place
    run: str
    token: str
    counters: Sequence[str]
    _pending: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.run}/{_BEFORE}{self.token}{_BEHIND}"

    def merged(self, result: MergeResult) -> None:
        self._add(
            "merged",
            {
                "ranges": [list(each) for each in result.item.ranges],
                "state": result.state_digest,
                "majority": result.majority,
                "blocks": list(result.blocks),
                "counters": list(self.counters),
                "counts": {name: list(row) for name, row in result.counts.items()},
                "dependent": result.dependent,
            },
        )

    def cuts(self, tensor: str, cuts: Cuts) -> None:
        """The exact thresholds of one tensor."""
        self._add("cuts", {"tensor": tensor, "cuts": [list(c) for c in cuts]})

    def sums(self, stretch: Stretch, vectors: Sequence[Vector]) -> None:
        """Of blocks, as the bits of float64."""
        content = np.array(vectors, "<f8").tobytes().hex()
        self._add("sums", {"tensor": stretch.tensor, "first": stretch.first, "stop": stretch.stop, "content": content})

    def thresholds(self, cuts: Sequence[ModelCut]) -> None:
        """The exact thresholds of the whole model."""
        self._add("thresholds", {"cuts": list(cuts)})

    def publishing(self) -> None:
        """From here on final names may exist."""
        self._add("publishing", {})

    def _add(self, kind: str, fact: Mapping[str, object]) -> None:
        text = json.dumps({"kind": kind, **fact}, separators=(",", ":"))
        self._pending.append(f"{digest(text.encode())[:16]} {text}\n")

    def commit(self) -> None:
        """Append and sync. Raises OutputError; nothing half-written is ever read back as a fact."""
        if self._pending:
            self.place.append(self.name, "".join(self._pending).encode())
            self._pending.clear()


KnownSums = dict[str, dict[int, Vector]]
"""By tensor and block."""


@dataclass
class Record:
    """What all journals of a run say together. unreadable: merged ranges whose counts are of other counters."""

    merged: list[MergeResult] = field(default_factory=list)
    unreadable: int = 0
    cuts: dict[str, Cuts] = field(default_factory=dict)
    sums: KnownSums = field(default_factory=dict)
    thresholds: tuple[ModelCut, ...] | None = None
    publishing: bool = False

    def covering(self, valid: Iterable[MergeResult]) -> list[MergeResult]:
        """Of the valid results the newest of each byte, and none that overlaps another: they count everything once.

        valid: oldest first. What a later range overlaps was found bad when that was written.
        """
        taken: dict[str, list[Range]] = {}
        chosen = []
        for result in reversed(list(valid)):
            if all(_is_free(taken.setdefault(each.file, []), each) for each in result.item.ranges):
                for each in result.item.ranges:
                    insort(taken[each.file], each)
                chosen.append(result)
        return sorted(chosen, key=lambda result: result.item)


def _is_free(taken: Sequence[Range], wanted: Range) -> bool:
    """Whether a range overlaps none of those taken, which are disjoint and sorted."""
    place = bisect_left(taken, wanted)
    free_before = place == 0 or taken[place - 1].stop <= wanted.start
    return free_before and (place == len(taken) or wanted.stop <= taken[place].start)


def read_journals(place: Place, run: str, counters: Sequence[str] | None = None) -> Record:
    """All facts of all journals of a run; torn or damaged lines are passed over.

    counters: of the plan, as of `Journal`: a range that another version counted differently is passed over, too, and is
    merged again. None: for those who want ranges only.
    Raises FileNotFoundError where a journal vanishes meanwhile, as when its merge is published.
    """
    record = Record()
    found = [e for e in place.list(run) if e.name.startswith(_BEFORE) and e.name.endswith(_BEHIND)]
    for entry in sorted(found, key=lambda entry: entry.changed):
        content = place.read(f"{run}/{entry.name}")
        if content is None:
            raise FileNotFoundError(f"{place}/{run}/{entry.name}")
        for line in content.splitlines():
            checksum, _, text = line.partition(b" ")
            if digest(text)[:16].encode() != checksum:
                continue
            with suppress(ValidationError):  # of a later version, or never written by us
                _take(record, _facts().validate_json(text), counters)
    if record.unreadable:
        logger.warning(
            "%d merged ranges in the journal have the counts of another version: they are merged again, with the same "
            "thresholds",
            record.unreadable,
        )
    return record


def _take(record: Record, fact: Fact, counters: Sequence[str] | None) -> None:
    match fact:
        case MergedFact() if counters is not None and not fact.counted_by(counters):
            record.unreadable += 1
        case MergedFact():
            record.merged.append(fact.result)
        case CutsFact():
            record.cuts[fact.tensor] = fact.cuts
        case SumsFact():
            record.sums.setdefault(fact.tensor, {}).update(fact.blocks)
        case ThresholdsFact():
            record.thresholds = fact.cuts
        case PublishingFact():
            record.publishing = True


# -- the lines as they are read: each is whole and sensible, or is passed over -----------------------------------------

Number = Annotated[int, Field(gt=-(1 << 62), lt=1 << 62)]


class MergedFact(Document):
    """counters: None in lines of version 0.1.0, which named none."""

    kind: Literal["merged"]
    ranges: Annotated[tuple[tuple[FileName, NonNegativeInt, NonNegativeInt], ...], Field(min_length=1)]
    state: str
    majority: Number
    blocks: tuple[str, ...]
    counters: tuple[str, ...] | None = None
    counts: Mapping[str, tuple[Number, ...]]
    dependent: Number

    @model_validator(mode="before")
    @classmethod
    def _listed(cls, values: Any) -> Any:
        """A line of version 0.1.0 names its only range without a list."""
        if isinstance(values, dict) and "ranges" not in values:
            return {**values, "ranges": [[values.get(name) for name in ("shard", "start", "stop")]]}
        return values

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        ranges = self.result.item.ranges
        if any(each.start % BLOCK_BYTES or each.nbytes <= 0 for each in ranges):
            raise ValueError("a range of no blocks")
        if sum(each.blocks for each in ranges) != len(self.blocks):
            raise ValueError("as many digests as blocks are due")
        return self

    @property
    def result(self) -> MergeResult:
        return MergeResult(
            item=WorkItem(tuple(Range(*each) for each in self.ranges)),
            state_digest=self.state,
            majority=self.majority,
            blocks=self.blocks,
            counts=self.counts,
            dependent=self.dependent,
        )

    def counted_by(self, counters: Sequence[str]) -> bool:
        """Whether the rows are of these counters.

        Version 0.1.0 had today's order but where a method from elsewhere trims: those rows were two numbers an expert
        shorter.
        """
        named = self.counters is None or self.counters == tuple(counters)
        return named and all(len(row) == len(counters) for row in self.counts.values())


class CutsFact(Document):
    kind: Literal["cuts"]
    tensor: str
    cuts: tuple[KnownTensorCut, ...]


class SumsFact(Document):
    """content: a row of float64 for each of the blocks, in hexadecimal."""

    kind: Literal["sums"]
    tensor: str
    first: NonNegativeInt
    stop: Annotated[int, Field(le=1 << 40)]
    content: Annotated[str, Field(pattern=r"^([0-9a-f]{16})+$")]

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if self.stop <= self.first or len(self.content) // 16 % (self.stop - self.first):
            raise ValueError("as many numbers for each block are due")
        return self

    @property
    def blocks(self) -> dict[int, Vector]:
        rows = np.frombuffer(bytes.fromhex(self.content), "<f8").reshape(self.stop - self.first, -1)
        return {block: tuple(row) for block, row in enumerate(rows.tolist(), self.first)}


class ThresholdsFact(Document):
    kind: Literal["thresholds"]
    cuts: tuple[KnownCut, ...]


class PublishingFact(Document):
    kind: Literal["publishing"]


Fact = MergedFact | CutsFact | SumsFact | ThresholdsFact | PublishingFact


@cache
def _facts() -> TypeAdapter[Fact]:
    """Made where a journal is read: it takes milliseconds that a merge which finds none does not spend."""
    return TypeAdapter(Annotated[Fact, Field(discriminator="kind")])
