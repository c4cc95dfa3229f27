"""The matrix lane: tensors that a method merges whole. Each is merged once, by one worker, and kept in the run's
folder; units then copy their ranges from there: they stay small, and writes, digests and resuming stay as they are.

A matrix is a function of the plan alone, computed in one fixed order, and gets its name by a rename: whoever merges it
again, late or twice, writes the same bytes.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from ties_dist.errors import OutputError
from ties_dist.storage.digests import digest
from ties_dist.storage.local import output_error, write_durably
from ties_dist.storage.memory import MemorySpan

if TYPE_CHECKING:
    pass


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


@dataclass
class Matrices:
    """Merged matrices by tensor. folder: where they are kept; None: in memory, for merges that are only looked at.

    fence: raises where another run has taken over.
    """

    folder: Path | None = None
    fence: Callable[[], None] = lambda: None
    _known: dict[str, Solved] = field(default_factory=dict)
    _content: dict[str, memoryview] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def put(self, tensor: str, solved: Solved, content: bytes | memoryview = b"") -> None:
        if self.folder is None:
            with self._lock:
                self._known[tensor], self._content[tensor] = solved, memoryview(content)
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise output_error(error, self.folder) from error
        write_durably(self._path(tensor, "bytes"), content, self.fence)
        write_durably(self._path(tensor, "json"), json.dumps(vars(solved)), self.fence)

    def get(self, tensor: str) -> Solved | None:
        """None where it was not merged yet."""
        with self._lock:
            if tensor not in self._known and self.folder is not None:
                try:
                    found = json.loads(self._path(tensor, "json").read_text())
                    self._known[tensor] = Solved(**{**found, "nonfinite": tuple(found["nonfinite"])})
                except (OSError, ValueError, TypeError, KeyError):
                    return None
            return self._known.get(tensor)

    def intact(self, tensor: str) -> bool:
        """Whether it is there and has the bytes that were written."""
        solved = self.get(tensor)
        try:
            whole = solved is not None and digest(self._all(tensor)) == (solved.digest or digest(b""))
        except OSError:
            whole = False
        if not whole:
            with self._lock:
                self._known.pop(tensor, None)
        return whole

    def read(self, tensor: str, start: int, stop: int) -> MemorySpan:
        """Bytes [start, stop) of a matrix as the output has it. Raises OutputError."""
        content = self._all(tensor)[start:stop]
        if len(content) != stop - start:
            raise OutputError(f"{self._path(tensor, 'bytes')} was cut short. Run the same command again.")
        return MemorySpan(view=content)

    def _all(self, tensor: str) -> memoryview:
        if self.folder is None:
            return self._content[tensor]
        return np.memmap(self._path(tensor, "bytes"), mode="r").data if self._size(tensor) else memoryview(b"")

    def _size(self, tensor: str) -> int:
        return self._path(tensor, "bytes").stat().st_size

    def _path(self, tensor: str, kind: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{xxhash.xxh3_64_hexdigest(tensor.encode())}.{kind}"
