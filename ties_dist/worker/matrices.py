"""The matrix lane: tensors that a method merges whole. Each is merged once, by one worker, and kept in the run's
folder; units then copy their ranges from there: they stay small, and writes, digests and resuming stay as they are.

A matrix is a function of the plan alone, computed in one fixed order, and gets its name by a rename: whoever merges it
again, late or twice, writes the same bytes.
"""

from __future__ import annotations

import json
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

import xxhash

from ties_dist.errors import CheckpointError, OutputError
from ties_dist.output.documents import load_document
from ties_dist.storage.base import BLOCK_BYTES, Reader, Span
from ties_dist.storage.digests import digest
from ties_dist.storage.memory import MemorySpan
from ties_dist.storage.place import Check, Place, unchecked

READ_BYTES = 16 * BLOCK_BYTES
"""At once, of a matrix that is checked."""


@dataclass(frozen=True, kw_only=True)
class Solved:
    """How a matrix was merged. plain: there was no solution, so its units merge it element by element.

    digest: of its bytes as the output has them. nonfinite: per expert, of its weights and its Gram matrix together;
    overflowing: entries of the result.
    """

    plain: bool
    digest: str = ""
    nonfinite: tuple[int, ...] = ()
    overflowing: int = 0


class Matrices(Protocol):
    """Merged matrices by tensor."""

    def put(self, tensor: str, solved: Solved, content: bytes | memoryview = b"") -> None: ...

    def get(self, tensor: str) -> Solved | None:
        """None where it was not merged yet."""
        ...

    def intact(self, tensor: str) -> bool:
        """Whether it is there and has the bytes that were written."""
        ...

    def read(self, tensor: str, start: int, stop: int) -> Span:
        """Bytes [start, stop) of a matrix as the output has it. Raises OutputError."""
        ...


@dataclass
class MemoryMatrices:
    """For merges that are only looked at."""

    _known: dict[str, Solved] = field(default_factory=dict)
    _content: dict[str, memoryview] = field(default_factory=dict)

    def put(self, tensor: str, solved: Solved, content: bytes | memoryview = b"") -> None:
        self._known[tensor], self._content[tensor] = solved, memoryview(content)

    def get(self, tensor: str) -> Solved | None:
        return self._known.get(tensor)

    def intact(self, tensor: str) -> bool:
        return tensor in self._known

    def read(self, tensor: str, start: int, stop: int) -> Span:
        return MemorySpan(view=self._content[tensor][start:stop])


@dataclass
class KeptMatrices:
    """In a folder, for all workers of a merge, and for who resumes it.

    fence: raises where another run has taken over.
    """

    place: Place
    folder: str
    fence: Check = unchecked
    _known: dict[str, Solved] = field(default_factory=dict)
    _reader: Reader | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def put(self, tensor: str, solved: Solved, content: bytes | memoryview = b"") -> None:
        self.place.put(self._name(tensor, "bytes"), content, self.fence)
        self.place.put(self._name(tensor, "json"), json.dumps(vars(solved)).encode(), self.fence)
        with self._lock:
            self._reader = None  # it may have the bytes open that these replace

    def get(self, tensor: str) -> Solved | None:
        with self._lock:
            if tensor not in self._known:
                with suppress(OutputError):
                    if (found := load_document(self.place, self._name(tensor, "json"), Solved)) is not None:
                        self._known[tensor] = found
            return self._known.get(tensor)

    def intact(self, tensor: str) -> bool:
        if (solved := self.get(tensor)) is not None:
            with suppress(OutputError):
                if self._digest(tensor) == (solved.digest or digest(b"")):
                    return True
        with self._lock:
            self._known.pop(tensor, None)
        return False

    def _digest(self, tensor: str) -> str:
        hashed, size = xxhash.xxh3_128(), self.place.size(self._name(tensor, "bytes")) or 0
        for start in range(0, size, READ_BYTES):
            span = self.read(tensor, start, min(size, start + READ_BYTES))
            hashed.update(span.view)
            span.release()
        return hashed.hexdigest()

    def read(self, tensor: str, start: int, stop: int) -> Span:
        with self._lock:
            reader = self._reader = self._reader or self.place.reader(self.folder)
        name = self._name(tensor, "bytes")
        try:
            return reader.read(name.rpartition("/")[2], start, stop)
        except (FileNotFoundError, CheckpointError) as error:
            raise OutputError(f"{self.place}/{name} was cut short. Run the same command again.") from error

    def _name(self, tensor: str, kind: str) -> str:
        return f"{self.folder}/{xxhash.xxh3_64_hexdigest(tensor.encode())}.{kind}"
