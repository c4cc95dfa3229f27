"""A folder of which some files lie elsewhere and are read by ranges, each the price of a question over a network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ties_dist.errors import CheckpointError
from ties_dist.storage.readers import LocalSpan, PreadReader

GetRange = Callable[[str, int, int], bytes]
"""File, start, stop. Raises CheckpointError."""


@dataclass
class RangedReader:
    """A `Reader`. elsewhere: sizes of the files that are not in the folder, which `get` reads.

    known: what was read of them before, by file, as (start, bytes): read ahead, or kept.
    """

    folder: Path
    elsewhere: Mapping[str, int]
    get: GetRange
    known: dict[str, list[tuple[int, bytes]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._here = PreadReader(self.folder)

    def names(self) -> Sequence[str]:
        return sorted({*self._here.names(), *(name for name in self.elsewhere if "/" not in name)})

    def size(self, name: str) -> int:
        return self.elsewhere[name] if name in self.elsewhere else self._here.size(name)

    def read(self, name: str, start: int, stop: int) -> LocalSpan:
        if name not in self.elsewhere:
            return self._here.read(name, start, stop)
        if stop > self.elsewhere[name]:
            raise CheckpointError(f"{name} has {self.elsewhere[name]:,} bytes where at least {stop:,} are expected.")
        for first, content in self.known.get(name, ()):
            if first <= start and stop <= first + len(content):
                return LocalSpan(view=memoryview(content)[start - first : stop - first], done=_nothing)
        return LocalSpan(view=memoryview(self.get(name, start, stop)), done=_nothing)

    def learn(self, name: str, start: int, stop: int) -> bytes:
        """Read a range ahead; it is kept."""
        content = self.get(name, start, stop)
        self.known.setdefault(name, []).append((start, content))
        return content


def _nothing() -> None:
    """A range is no buffer of ours."""
