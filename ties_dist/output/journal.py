"""The append-only record of a run: what is durable, computed with which state, and what was counted on the way.

One JSON line per fact, each with a checksum, in `journal-<token>.jsonl`: a driver appends only to its own file, a
resuming one reads all of them. A line is written after the bytes it speaks of are synced, so a range in the journal is
a range on the disk.
"""

from __future__ import annotations

import json
import os
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ties_dist.planning.plan import Unit, digest
from ties_dist.storage.local import output_error, sync_folder
from ties_dist.thresholds import Cuts, ModelCut, TensorCut, Threshold
from ties_dist.worker.merging import MergeResult


@dataclass
class Journal:
    """Appends to one file; `commit` makes what was added durable."""

    path: Path
    _pending: list[str] = field(default_factory=list)

    def merged(self, result: MergeResult) -> None:
        self._add(
            "merged",
            {
                "shard": result.unit.shard,
                "start": result.unit.start,
                "stop": result.unit.stop,
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
        chosen: dict[str, list[tuple[int, MergeResult]]] = {}
        for result in reversed(list(valid)):
            unit = result.unit
            taken = chosen.setdefault(unit.shard, [])
            place = bisect_left(taken, unit.start, key=lambda t: t[0])
            free_before = place == 0 or taken[place - 1][1].unit.stop <= unit.start
            if free_before and (place == len(taken) or unit.stop <= taken[place][0]):
                taken.insert(place, (unit.start, result))
        return [result for shard in sorted(chosen) for _, result in chosen[shard]]


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


def _result(fact: Mapping[str, object]) -> MergeResult:
    values: Mapping[str, object] = fact
    counts = values["counts"]
    assert isinstance(counts, dict)
    return MergeResult(
        unit=Unit(str(values["shard"]), int(str(values["start"])), int(str(values["stop"]))),
        state_digest=str(values["state"]),
        majority=int(str(values["majority"])),
        blocks=tuple(values["blocks"]),  # type: ignore[arg-type]
        counts={name: tuple(c) for name, c in counts.items()},
        dependent=int(str(values["dependent"])),
    )
