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
from dataclasses import dataclass, field
from typing import Any

from ties_dist.storage.digests import digest
from ties_dist.storage.place import Place
from ties_dist.thresholds import Cuts, ModelCut, TensorCut, Threshold
from ties_dist.values.items import MergeResult, Range, WorkItem

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


@dataclass
class Record:
    """What all journals of a run say together. unreadable: merged ranges whose counts are of other counters."""

    merged: list[MergeResult] = field(default_factory=list)
    unreadable: int = 0
    cuts: dict[str, Cuts] = field(default_factory=dict)
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


def _unpacked(packed: Sequence[Any]) -> tuple[ModelCut, ...]:
    return tuple(ModelCut(Threshold(*threshold), tensor, before) for threshold, tensor, before in packed)


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
            _take(record, json.loads(text), counters)
    if record.unreadable:
        logger.warning(
            "%d merged ranges in the journal have the counts of another version: they are merged again, with the same "
            "thresholds",
            record.unreadable,
        )
    return record


def _take(record: Record, fact: dict[str, Any], counters: Sequence[str] | None) -> None:
    match fact:
        case {"kind": "merged"} if counters is not None and not _counted_by(fact, counters):
            record.unreadable += 1
        case {"kind": "merged"}:
            record.merged.append(_result(fact))
        case {"kind": "cuts", "tensor": str(tensor), "cuts": list(cuts)}:
            record.cuts[tensor] = tuple(TensorCut(*c) for c in cuts)
        case {"kind": "thresholds", "cuts": list(cuts)}:
            record.thresholds = _unpacked(cuts)
        case {"kind": "publishing"}:
            record.publishing = True


def _counted_by(fact: Mapping[str, Any], counters: Sequence[str]) -> bool:
    """Whether the rows of a line are of these counters.

    Version 0.1.0 named none. It had today's order but where a method from elsewhere trims: those rows were two numbers
    an expert shorter.
    """
    if "counters" in fact:
        return bool(list(counters) == fact["counters"])
    return all(len(row) == len(counters) for row in fact["counts"].values())


def _ranges(values: Mapping[str, Any]) -> tuple[Range, ...]:
    """Of a line; one of version 0.1.0 names its only range without a list."""
    listed = values["ranges"] if "ranges" in values else [[values["shard"], values["start"], values["stop"]]]
    return tuple(Range(str(file), int(start), int(stop)) for file, start, stop in listed)


def _result(fact: Mapping[str, object]) -> MergeResult:
    values: Mapping[str, object] = fact
    counts = values["counts"]
    assert isinstance(counts, dict)
    return MergeResult(
        item=WorkItem(_ranges(values)),
        state_digest=str(values["state"]),
        majority=int(str(values["majority"])),
        blocks=tuple(values["blocks"]),  # type: ignore[arg-type]
        counts={name: tuple(c) for name, c in counts.items()},
        dependent=int(str(values["dependent"])),
    )
