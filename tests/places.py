"""A place in a dictionary: what an output needs of where it lies, without a file system."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ties_dist.errors import OutputError
from ties_dist.storage.base import Reader
from ties_dist.storage.memory import MemoryReader
from ties_dist.storage.place import Check, Entry, Keeping, partial_name, unchecked


@dataclass
class DictPlace:
    """files: by name; folders: those that were made. As a disk has it, nothing is written where no folder is."""

    reads_parts: bool = True
    keeps: Keeping = "disk"
    files: dict[str, bytearray] = field(default_factory=dict)
    folders: set[str] = field(default_factory=lambda: {""})
    _changed: dict[str, int] = field(default_factory=dict)
    _ticks: Iterable[int] = field(default_factory=lambda: itertools.count(1))
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def __str__(self) -> str:
        return "a dictionary"

    def check(self, inputs: Sequence[str]) -> None:
        """No input lies here."""

    def standing(self) -> DictPlace:
        return self

    def list(self, folder: str = "") -> Sequence[Entry]:
        inside = f"{folder}/" if folder else ""
        files = {n: f for n, f in self.files.items() if n.startswith(inside) and "/" not in n[len(inside) :]}
        found = [Entry(n[len(inside) :], len(f), len(f), self._changed[n]) for n, f in files.items()]
        below = {n for n in self.folders if n and n.startswith(inside) and n != folder}
        folders = {n[len(inside) :].partition("/")[0] for n in below}
        return sorted([*found, *(Entry(name, None) for name in folders)])

    def size(self, name: str) -> int | None:
        return len(self.files[name]) if name in self.files else None

    def read(self, name: str) -> bytes | None:
        return bytes(self.files[name]) if name in self.files else None

    def reader(self, folder: str = "") -> Reader:
        return MemoryReader({e.name: memoryview(self.files[_in(folder, e.name)]) for e in self.list(folder)
                             if e.size is not None})  # fmt: skip

    def writer(self, parts: str, fence: Check = unchecked) -> DictWriter:
        return DictWriter(self, parts, fence)

    def make(self, folder: str = "") -> None:
        parts = folder.split("/")
        self.folders |= {"/".join(parts[: i + 1]) for i in range(len(parts))}

    def put(
        self,
        name: str,
        content: bytes | memoryview | Iterable[memoryview],
        check: Check = unchecked,
        *,
        shared: bool = False,
    ) -> None:
        content = content if isinstance(content, bytes | bytearray | memoryview) else b"".join(map(bytes, content))
        check()
        with self._lock:
            if name.rpartition("/")[0] not in self.folders:
                raise OutputError(f"cannot write {name}: there is no such folder.")
            self.files[name], self._changed[name] = bytearray(content), next(iter(self._ticks))

    def overwrite(self, name: str, content: bytes) -> None:
        self.put(name, content)

    def swap(self, name: str, old: bytes | None, new: bytes | None, *, patience: float) -> bool:
        with self._lock:
            if self.read(name) != old:
                return False
            self.remove(name) if new is None else self.put(name, new)
            return True

    def append(self, name: str, content: bytes) -> None:
        self.put(name, (self.read(name) or b"") + content)

    def copy(self, source: str, target: str) -> None:
        self.put(target, bytes(self.files[source]))

    def publish(self, part: str, name: str) -> None:
        self.put(name, self.files.pop(part))

    def sync(self, folder: str = "") -> None:
        """A dictionary is as durable as it gets."""

    def remove(self, name: str) -> None:
        self.files.pop(name, None)

    def retire(self, names: Sequence[str], into: str, check: Check) -> None:
        for name in names:
            if name in self.files:
                check()
                self.remove(name)
                if not self.list(folder := name.rpartition("/")[0]):
                    self.folders -= {folder} - {""}
        check()

    def clear(self, folder: str) -> None:
        self.files = {n: f for n, f in self.files.items() if not n.startswith(f"{folder}/")}
        self.folders = {n for n in self.folders if n != folder and not n.startswith(f"{folder}/")}

    def free(self) -> int | None:
        return None


@dataclass
class DictWriter:
    """As of a disk: what it has open it writes to, though that has lost its name to a copy."""

    place: DictPlace
    parts: str
    fence: Check
    _open: dict[str, bytearray] = field(default_factory=dict)

    def _file(self, name: str) -> bytearray:
        part = _in(self.parts, partial_name(name))
        found = self._open.get(name, self.place.files.get(part, self.place.files.get(name)))
        if found is None:
            raise OutputError(f"cannot write {name}: it is missing.")
        return self._open.setdefault(name, found)

    def create(self, name: str, size: int) -> None:
        part = _in(self.parts, partial_name(name))
        if self.place.size(part) != size or not self.place.reads_parts:
            self.place.put(part, bytes(size))
            self._open.pop(name, None)

    def write(self, name: str, start: int, block: memoryview) -> None:
        file = self._file(name)
        self.fence()
        file[start : start + len(block)] = block

    def sync(self, names: Sequence[str]) -> None:
        """As durable as it gets."""

    def read(self, name: str, start: int, stop: int) -> memoryview:
        found = self._file(name)
        if stop > len(found):
            raise OutputError(f"{name} ends at {len(found):,}, before {stop:,}.")
        return memoryview(bytes(found[start:stop]))

    def close(self) -> None:
        self._open.clear()


def _in(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name
