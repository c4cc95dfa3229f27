"""What the engine asks of a place where files live: ranged reads, ranged writes, publish.

Kept to what object stores can do too. A store knows names, bytes and ranges; tensors are
`checkpoint`'s matter. Names are relative to the store's root.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

BLOCK_BYTES = 1 << 20
"""Output is cut and hashed in blocks of 1 MiB: two clients of a network file system must not share a page."""


Backend = Literal["auto", "mmap", "pread", "direct"]
"""How files are read; `backends` chooses for `auto`."""


class Span(Protocol):
    """Bytes of one read. `view` is valid until `release`, which frees the pages or gives the buffer back."""

    @property
    def view(self) -> memoryview: ...

    def release(self) -> None: ...


class Reader(Protocol):
    """Random access to the immutable files of one checkpoint; safe to call from several threads."""

    def names(self) -> Sequence[str]:
        """Names of the files directly under the root, sorted."""
        ...

    def size(self, name: str) -> int:
        """Bytes in a file. Raises FileNotFoundError."""
        ...

    def read(self, name: str, start: int, stop: int) -> Span:
        """Bytes [start, stop) of a file.

        Raises FileNotFoundError, and CheckpointError where the file ends before `stop`.
        """
        ...


class Writer(Protocol):
    """Pre-laid-out files written by disjoint ranges, in any order, and then given their names."""

    def create(self, name: str, size: int) -> None:
        """Make a file of `size` bytes, or keep it if it is there with that size. Raises OutputError."""
        ...

    def write(self, name: str, start: int, block: memoryview) -> None:
        """Write a range. Raises OutputError (a full disk says how to go on)."""
        ...

    def sync(self, names: Sequence[str]) -> None:
        """Make all written ranges of these files durable."""
        ...

    def read(self, name: str, start: int, stop: int) -> memoryview:
        """Bytes written before. Raises OutputError where there are fewer."""
        ...

    def close(self) -> None:
        """Give back what is held open; nothing is written after."""
        ...
