"""Readers of files on a mounted file system: by memory map, by `pread`, and past the page cache.

All three give the same bytes and the same errors; `backends` says which is faster when. A map's touched pages count in
the resident set, so a released span drops its own; the other two read into reused buffers.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from ties_dist.errors import CheckpointError
from ties_dist.storage.backends import choose, look, open_direct
from ties_dist.storage.base import Backend
from ties_dist.storage.buffers import ALIGNMENT, Buffers
from ties_dist.storage.links import followed

logger = logging.getLogger(__name__)

FAULT_WINDOW = 2 << 20
"""A fault maps 64 KiB around it, since Linux 6.18 the whole folio of the page cache, up to 2 MiB. Dropping less leaves
pages of neighbours behind: 1,000 slices of 8 KiB left 141 MiB resident with a window of 64 KiB, 1 MiB with this one."""
READ_WINDOW = 64 << 10
"""What is asked of the disk around a small slice."""
SMALL_READ = 64 << 10
READ_PIECE = 1 << 20
"""pread from the page cache is fastest in pieces that fit the second-level cache (6.3 against 3.5 GB/s)."""


@dataclass(frozen=True, kw_only=True)
class LocalSpan:
    view: memoryview
    done: Callable[[], None]

    def release(self) -> None:
        self.done()


@dataclass
class _Directory:
    """Names and sizes, shared by all readers. A path to a single file is a directory with that file alone."""

    path: Path

    def __post_init__(self) -> None:
        self.root = self.path if self.path.is_dir() else self.path.parent
        self._lock = threading.Lock()

    def names(self) -> Sequence[str]:
        if not self.path.is_dir():
            return [self.path.name]
        return sorted(entry.name for entry in os.scandir(self.path) if entry.is_file())

    def size(self, name: str) -> int:
        return self._locate(name).stat().st_size

    def _locate(self, name: str) -> Path:
        """Where a file lies. A file that was named by itself may be a link to anywhere: who named it wants that."""
        return followed(self.root, name) if self.root == self.path else self.root / name

    def _ends_early(self, name: str, size: int, stop: int) -> CheckpointError:
        return CheckpointError(
            f"{self.root / name} has {size:,} bytes where at least {stop:,} are expected: it is truncated, or was "
            "replaced while it was read. Restore the file and run again."
        )


@dataclass
class MappedReader(_Directory):
    """Zero-copy reads; one map per file, opened at first use. Small ones are copied: a fault maps up to 2 MiB."""

    _maps: dict[str, mmap.mmap] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._small = PreadReader(self.path)

    def read(self, name: str, start: int, stop: int) -> LocalSpan:
        if stop - start <= SMALL_READ:
            return self._small.read(name, start, stop)
        pages = self._map(name)
        if stop > len(pages):
            raise self._ends_early(name, len(pages), stop)

        # Starts the disk; of cached pages it only takes note.
        pages.madvise(mmap.MADV_WILLNEED, *_aligned(start, stop, READ_WINDOW, len(pages)))
        mapped = _aligned(start, stop, FAULT_WINDOW, len(pages))
        return LocalSpan(view=memoryview(pages)[start:stop], done=lambda: pages.madvise(mmap.MADV_DONTNEED, *mapped))

    def _map(self, name: str) -> mmap.mmap:
        with self._lock:
            if name not in self._maps:
                with open(self._locate(name), "rb") as file:
                    if os.fstat(file.fileno()).st_size == 0:
                        raise self._ends_early(name, 0, 1)
                    self._maps[name] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            return self._maps[name]


def _aligned(start: int, stop: int, window: int, end: int) -> tuple[int, int]:
    """(first byte, size) of [start, stop) widened to multiples of `window`, but not past `end`."""
    first = start // window * window
    return first, min(-(-stop // window) * window, end) - first


@dataclass
class PreadReader(_Directory):
    """Reads into reused buffers: a fresh one costs a page fault per 4 KiB, as much as the copy itself."""

    _files: dict[str, int] = field(default_factory=dict)
    _buffers: Buffers = field(default_factory=Buffers)

    def read(self, name: str, start: int, stop: int) -> LocalSpan:
        buffer = self._buffers.take(stop - start)
        view = buffer.data[: stop - start]
        self._fill(name, view, start)
        return LocalSpan(view=view, done=lambda: self._buffers.give(buffer))

    def _fill(self, name: str, view: memoryview, start: int) -> None:
        file, filled = self._open(name), 0
        while filled < len(view):
            got = os.preadv(file, [view[filled : filled + READ_PIECE]], start + filled)
            if got == 0:
                raise self._ends_early(name, os.fstat(file).st_size, start + len(view))
            filled += got

    def _open(self, name: str) -> int:
        with self._lock:
            if name not in self._files:
                self._files[name] = os.open(self._locate(name), os.O_RDONLY | os.O_CLOEXEC)
            return self._files[name]

    def __del__(self) -> None:
        for file in self._files.values():
            with suppress(OSError):
                os.close(file)


@dataclass
class DirectReader(PreadReader):
    """Reads whole blocks of 4096 bytes past the page cache; the ends of files, and small reads, go through it.

    One read is one system call, which the kernel cuts and keeps in flight; more depth comes from threads that call.
    For bytes that are read once: nothing is cached, a second read costs the disk again. The engine knows which merges
    read twice, and `backends.choose` gives those another reader. Where a file system refuses (EINVAL: no direct I/O,
    or larger blocks), the file is read as PreadReader does.
    """

    _direct: dict[str, int] = field(default_factory=dict)
    _refused: set[str] = field(default_factory=set)

    def read(self, name: str, start: int, stop: int) -> LocalSpan:
        if stop - start < SMALL_READ:
            return super().read(name, start, stop)
        first = start // ALIGNMENT * ALIGNMENT
        size = -(-(stop - first) // ALIGNMENT) * ALIGNMENT
        buffer = self._buffers.take(size)
        filled = min(self._fill_directly(name, buffer.data[:size], first), stop - first)
        rest = max(filled, start - first)
        self._fill(name, buffer.data[rest : stop - first], first + rest)
        return LocalSpan(view=buffer.data[start - first : stop - first], done=lambda: self._buffers.give(buffer))

    def _fill_directly(self, name: str, view: memoryview, start: int) -> int:
        """Bytes read: fewer than asked for at the end of a file, and where direct I/O is refused."""
        file, filled = self._open_directly(name), 0
        while file is not None and filled < len(view):
            try:
                got = os.preadv(file, [view[filled:]], start + filled)
            except OSError as error:
                with self._lock:
                    self._refuse(name, error)
                break
            filled += got
            if got == 0 or filled % ALIGNMENT:  # going on from inside a block would be refused
                break
        return filled

    def _open_directly(self, name: str) -> int | None:
        with self._lock:
            if name not in self._direct and name not in self._refused:
                try:
                    self._direct[name] = open_direct(self._locate(name))
                except OSError as error:
                    self._refuse(name, error)
            return None if name in self._refused else self._direct[name]

    def _refuse(self, name: str, error: OSError) -> None:
        """Read a file through the page cache from now on; the lock is held. Any other error is raised."""
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise error
        if not self._refused:
            logger.info("reads: no direct I/O in %s (%s): by pread", self.path, error.strerror)
        self._refused.add(name)  # its descriptor stays open: other threads may be reading

    def __del__(self) -> None:
        super().__del__()
        for file in self._direct.values():
            with suppress(OSError):
                os.close(file)


def open_reader(path: Path, backend: Backend = "auto") -> MappedReader | PreadReader:
    """A reader of the files under `path` (a folder, or one file). `auto` takes each byte to be read once."""
    if backend == "auto":
        files = [path / name for name in _Directory(path).names()] if path.is_dir() else [path]
        backend = choose(look([f for f in files if f.suffix == ".safetensors"] or files)).backend
    if backend == "mmap":
        return MappedReader(path)
    return DirectReader(path) if backend == "direct" else PreadReader(path)
