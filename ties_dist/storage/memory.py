"""Files in memory: for merging tensors that are already there, and a peer of the real back end in tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ties_dist.errors import CheckpointError, OutputError


@dataclass(frozen=True, kw_only=True)
class MemorySpan:
    view: memoryview

    def release(self) -> None:
        """Nothing to give back."""


@dataclass
class MemoryReader:
    files: Mapping[str, memoryview]

    def names(self) -> Sequence[str]:
        return sorted(self.files)

    def size(self, name: str) -> int:
        if name not in self.files:
            raise FileNotFoundError(name)
        return len(self.files[name])

    def read(self, name: str, start: int, stop: int) -> MemorySpan:
        if stop > self.size(name):
            raise CheckpointError(f"{name} has {self.size(name):,} bytes where at least {stop:,} are expected.")
        return MemorySpan(view=self.files[name][start:stop])


@dataclass
class MemoryWriter:
    files: dict[str, bytearray] = field(default_factory=dict)

    def create(self, name: str, size: int) -> None:
        if len(self.files.get(name, b"")) != size or name not in self.files:
            self.files[name] = bytearray(size)

    def write(self, name: str, start: int, block: memoryview) -> None:
        self.files[name][start : start + len(block)] = block

    def sync(self, names: Sequence[str]) -> None:
        """Memory is as durable as it gets."""

    def close(self) -> None:
        """Nothing is open."""

    def read(self, name: str, start: int, stop: int) -> memoryview:
        held = len(self.files.get(name, b""))
        if name not in self.files or stop > held:
            raise OutputError(f"{name} ends at {held:,}, before {stop:,}.")
        return memoryview(self.files[name])[start:stop]
