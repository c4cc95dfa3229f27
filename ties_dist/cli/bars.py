"""Progress on a terminal: one bar a phase, by rich."""

from __future__ import annotations

from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as Bars


@dataclass
class BarProgress:
    """One bar a phase, in bytes, with rate and time left; on stderr."""

    _bars: Bars | None = field(default=None)

    def begin(self, phase: str, total_bytes: int) -> None:
        columns = (
            TextColumn(f"{phase:<7}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
        )
        self._bars = Bars(*columns, console=Console(stderr=True))
        self._bars.start()
        self._task = self._bars.add_task(phase, total=total_bytes)

    def advance(self, done_bytes: int) -> None:
        if self._bars is not None:
            self._bars.advance(self._task, done_bytes)

    def end(self) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None
