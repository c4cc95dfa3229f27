"""The report of a run, whole on disk after every finding: `report.md` to read, `report.json` to compute with."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.device.parts import Part
from benchmarks.measure import table

ENDS = ("done", "skipped", "failed", "killed", "stopped")
"""stopped: with the whole run, by a signal."""


@dataclass
class Findings:
    """What one part has told so far. tables: title -> rows, each column -> cell. checks: what -> said of it, holds.

    state: 'waiting', 'running' or one of ENDS. reason: why it was skipped or failed, or when it was killed.
    """

    part: Part
    state: str = "waiting"
    reason: str = ""
    seconds: float = 0.0
    tables: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    checks: dict[str, tuple[str, bool]] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)

    def take(self, told: Mapping[str, Any]) -> None:
        """One line of a `Teller`."""
        match told["kind"]:
            case "note":
                self.notes.append(told["text"])
            case "row":
                self._place(self.tables.setdefault(told["table"], []), told["cells"])
            case "check":
                self.checks[told["what"]] = (told["said"], told["holds"])
            case "figure":
                self.figures[told["name"]] = told["value"]
            case "skipped":
                self.skipped.append(told["text"])

    @staticmethod
    def _place(rows: list[dict[str, str]], cells: dict[str, str]) -> None:
        name = next(iter(cells.values()))
        for i, row in enumerate(rows):
            if next(iter(row.values())) == name:
                rows[i] = cells
                return
        rows.append(cells)

    @property
    def bad(self) -> bool:
        return self.state in ("failed", "killed", "stopped") or not all(self.verdicts)

    @property
    def verdicts(self) -> list[bool]:
        return [holds for _, holds in self.checks.values()]

    @property
    def held(self) -> str:
        return f"{sum(self.verdicts)} of {len(self.verdicts)} hold" if self.checks else ""

    def section(self) -> str:
        lines = [f"## {self.part.title}", f"Proves: {self.part.proves}."]
        if self.reason:
            lines.append(f"**{self.state.capitalize()}**: {self.reason}")
        for title, rows in self.tables.items():
            columns = list(dict.fromkeys(name for row in rows for name in row))
            cells = table(columns, [[row.get(name, "") for name in columns] for row in rows])
            lines.append(f"{title}:\n\n{cells}")
        said = [*self.notes, *(f"Skipped: {text}" for text in self.skipped)]
        for what, (said_of_it, holds) in self.checks.items():
            said.append(f"{'Holds' if holds else '**DOES NOT HOLD**'}: {what}{said_of_it and f' ({said_of_it})'}")
        return "\n\n".join(lines + (["\n".join(f"- {each}" for each in said)] if said else []))


@dataclass
class Report:
    """All parts. head: lines about the run as a whole, said before anything else."""

    out: Path
    parts: Sequence[Part]
    head: list[str] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    findings: dict[str, Findings] = field(init=False)

    def __post_init__(self) -> None:
        self.findings = {part.name: Findings(part) for part in self.parts}

    @property
    def figures(self) -> dict[str, float]:
        return {name: value for found in self.findings.values() for name, value in found.figures.items()}

    @property
    def bad(self) -> list[str]:
        """Parts that failed, were killed, or whose checks do not all hold."""
        return [name for name, found in self.findings.items() if found.bad]

    def write(self) -> None:
        seconds = time.monotonic() - self.began
        content = {"head": self.head, "seconds": seconds, "parts": [asdict(f) for f in self.findings.values()]}
        _replace(self.out / "report.json", json.dumps(content, indent=1) + "\n")
        _replace(self.out / "report.md", self.text(seconds))

    def text(self, seconds: float) -> str:
        ended = sum(found.state in ENDS for found in self.findings.values())
        state = "All parts have ended" if ended == len(self.parts) else f"{ended} of {len(self.parts)} parts have ended"
        rows = [
            (f.part.name, f.state, f"{f.seconds:.0f}", f"{f.part.limit_seconds:.0f}", f.held)
            for f in self.findings.values()
        ]
        parts = [
            "# Device",
            *self.head,
            f"{state}, {seconds:.0f} s.",
            table(["part", "state", "s", "limit, s", "checks"], rows),
            *(found.section() for found in self.findings.values() if found.state != "waiting"),
        ]
        return "\n\n".join(parts) + "\n"


def _replace(path: Path, text: str) -> None:
    """Readers, and a kill, see the old file or the new one."""
    beside = path.with_suffix(path.suffix + ".new")
    beside.write_text(text)
    os.replace(beside, path)
