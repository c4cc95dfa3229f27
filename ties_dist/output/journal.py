"""The append-only record of a run: what is durable, computed with which state, and what was counted on the way.

One JSON line per fact, each with a checksum, in `journal-<token>.jsonl`: a driver appends only to its own file, a
resuming one reads all of them. A line is written after the bytes it speaks of are synced, so a range in the journal is
a range on the disk.
"""

from __future__ import annotations

import json
import os
from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ties_dist.storage.digests import digest
from ties_dist.storage.local import output_error, sync_folder
from ties_dist.thresholds import Cuts, ModelCut, TensorCut, Threshold
from ties_dist.values.items import MergeResult, Range, WorkItem


@dataclass
class Journal:
    """Appends to one file; `commit` makes what was added durable."""

    path: Path
    _pending: list[str] = field(default_factory=list)

    def merged(self, result: MergeResult) -> None:
        self._add(
            "merged",
            {
                "ranges": [list(each) for each in result.item.ranges],
                "state": result.state_digest,
                "majority": result.majority,
                "blocks": list(result.blocks),
                "counts": {name: list(counts) for name, counts in result.counts.items()},
                "dependent": result.dependent,
            },
        )

    def cuts(self, tensor: str, cuts: Cuts) -> None:
        """The exact thresholds of one tensor."""
        self._add("cuts", {"tensor": tensor, "cuts": [list(c) for c in cuts]})

    def thresholds(self, cuts: Sequence[ModelCut]) -> None:
        """The exact thresholds of the whole model."""
        self._add("thresholds", {"cuts": pack(cuts)})

    def publishing(self) -> None:
        """From here on final names may exist."""
        self._add("publishing", {})

    def _add(self, kind: str, fact: Mapping[str, object]) -> None:
        text = json.dumps({"kind": kind, **fact}, separators=(",", ":"))
        self._pending.append(f"{digest(text.encode())[:16]} {text}\n")

    def commit(self) -> None:
        """Append and sync. Raises OutputError; nothing half-written is ever read back as a fact."""
        if not self._pending:
            return
        try:
            known = self.path.exists()
            with open(self.path, "ab") as file:
                file.write("".join(self._pending).encode())
                file.flush()
                os.fsync(file.fileno())
            if not known:
                sync_folder(self.path.parent)
        except OSError as error:
            raise output_error(error, self.path) from error
        self._pending.clear()


@dataclass
class Record:
    """What all journals of a run say together."""

    merged: list[MergeResult] = field(default_factory=list)
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


def pack(cuts: Sequence[ModelCut]) -> list[object]:
    """Whole-model thresholds as JSON holds them."""
    return [[list(c.threshold), c.tensor, c.before] for c in cuts]


def unpack(packed: Sequence[Any]) -> tuple[ModelCut, ...]:
    return tuple(ModelCut(Threshold(*threshold), tensor, before) for threshold, tensor, before in packed)


def read_journals(folder: Path) -> Record:
    """All facts of all journals in a folder; torn or damaged lines are passed over."""
    record = Record()
    for path in sorted(folder.glob("journal-*.jsonl"), key=lambda p: p.stat().st_mtime_ns):
        for line in path.read_bytes().splitlines():
            checksum, _, text = line.partition(b" ")
            if digest(text)[:16].encode() != checksum:
                continue
            _take(record, json.loads(text))
    return record


def _take(record: Record, fact: dict[str, object]) -> None:
    match fact:
        case {"kind": "merged"}:
            record.merged.append(_result(fact))
        case {"kind": "cuts", "tensor": str(tensor), "cuts": list(cuts)}:
            record.cuts[tensor] = tuple(TensorCut(*c) for c in cuts)
        case {"kind": "thresholds", "cuts": list(cuts)}:
            record.thresholds = unpack(cuts)
        case {"kind": "publishing"}:
            record.publishing = True


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
