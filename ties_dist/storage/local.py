"""Files on a mounted file system: reads by memory map or `pread`, writes by ranges.

A map is the fast way for warm and local files; network file systems punish page faults, so `auto` takes `pread`
there (facts.md). A map's touched pages count in the resident set: a released span drops its own.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import psutil

from ties_dist.errors import CheckpointError, OutputError
from ties_dist.storage.buffers import ALIGNMENT, Buffers

Backend = Literal["auto", "mmap", "pread"]

NETWORK = ("nfs", "lustre", "cifs", "smb", "ceph", "gluster", "fuse", "9p", "beegfs", "gpfs", "afs", "virtiofs")
FAULT_WINDOW = 2 << 20
"""A fault maps 64 KiB around it, since Linux 6.18 the whole folio of the page cache, up to 2 MiB. Dropping less leaves
pages of neighbours behind: 1,000 slices of 8 KiB left 141 MiB resident with a window of 64 KiB, 1 MiB with this one."""
READ_WINDOW = 64 << 10
"""What is asked of the disk around a small slice."""
DIRECT_FROM = 256 << 20
"""Bytes of a file: smaller ones are left in the page cache for who reads them next."""
SMALL_READ = 64 << 10
READ_PIECE = 1 << 20
"""pread from the page cache is fastest in pieces that fit the second-level cache (facts.md: 6.3 against 3.5 GB/s)."""


@dataclass(frozen=True, kw_only=True)
class LocalSpan:
    view: memoryview
    done: Callable[[], None]

    def release(self) -> None:
        self.done()


@dataclass
class _Directory:
    """Names and sizes, shared by both readers. A path to a single file is a directory with that file alone."""

    path: Path

    def __post_init__(self) -> None:
        self.root = self.path if self.path.is_dir() else self.path.parent
        self._lock = threading.Lock()

    def names(self) -> Sequence[str]:
        if not self.path.is_dir():
            return [self.path.name]
        return sorted(entry.name for entry in os.scandir(self.path) if entry.is_file())

    def size(self, name: str) -> int:
        return (self.root / name).stat().st_size

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
                with open(self.root / name, "rb") as file:
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
        file = self._open(name)
        position = start
        while position < stop:
            piece = view[position - start : min(position - start + READ_PIECE, stop - start)]
            got = os.preadv(file, [piece], position)
            if got == 0:
                self._buffers.give(buffer)
                raise self._ends_early(name, position, stop)
            position += got
        return LocalSpan(view=view, done=lambda: self._buffers.give(buffer))

    def _open(self, name: str) -> int:
        with self._lock:
            if name not in self._files:
                self._files[name] = os.open(self.root / name, os.O_RDONLY | os.O_CLOEXEC)
            return self._files[name]

    def __del__(self) -> None:
        for file in self._files.values():
            with suppress(OSError):
                os.close(file)


def open_reader(path: Path, backend: Backend = "auto") -> MappedReader | PreadReader:
    """A reader of the files under `path` (a folder, or one file)."""
    if backend == "auto":
        backend = "pread" if is_network(path) else "mmap"
    return MappedReader(path) if backend == "mmap" else PreadReader(path)


def is_network(path: Path) -> bool:
    """Whether a path lies on a file system served over a network or by a user process."""
    target = str(path.resolve())
    mounts = [
        p
        for p in psutil.disk_partitions(all=True)
        if target == p.mountpoint or target.startswith(p.mountpoint.rstrip("/") + "/")
    ]
    return bool(mounts) and max(mounts, key=lambda p: len(p.mountpoint)).fstype.lower().startswith(NETWORK)


def partial_name(name: str) -> str:
    """What a file is called until it is whole: a pre-laid-out shard of zeros is a valid one, and must not look it."""
    return f"{name}.partial"


@dataclass
class LocalWriter:
    """Ranges of pre-laid-out files in one folder; `final` is where a file is once publishing has renamed it.

    Large files are written past the page cache where the file system can: buffered writing of 2.2 GB took 6 to 13
    CPU-seconds on ext4, direct under 0.5 (facts.md), and inputs keep their pages.
    fence: called before each range is written; raises where another run has taken over, whose bytes must stay.
    """

    root: Path
    final: Path | None = None
    direct_from: int = DIRECT_FROM
    fence: Callable[[], None] = lambda: None
    _files: dict[str, int] = field(default_factory=dict)
    _direct: dict[str, int | None] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def create(self, name: str, size: int) -> None:
        path = self.root / partial_name(name)
        try:
            if not path.exists() or path.stat().st_size != size:
                with open(path, "wb") as file:
                    file.truncate(size)  # sparse: posix_fallocate slows buffered writes (facts.md)
                sync_folder(self.root)
        except OSError as error:
            raise output_error(error, path) from error

    def write(self, name: str, start: int, block: memoryview) -> None:
        self.fence()
        try:
            position = self._write_direct(name, start, block)
            file = self._open(name)
            while position < len(block):
                position += os.pwrite(file, block[position:], start + position)
        except OSError as error:
            raise output_error(error, self.root / name) from error

    def _write_direct(self, name: str, start: int, block: memoryview) -> int:
        """Write what direct I/O can of a range, and say how much that was: whole pages of an aligned buffer."""
        file = self._open_direct(name)
        size = len(block) // ALIGNMENT * ALIGNMENT
        aligned = np.frombuffer(block, dtype=np.uint8).ctypes.data % ALIGNMENT == 0 if size else False
        if file is None or not aligned or start % ALIGNMENT:
            return 0
        position = 0
        while position < size:
            try:
                written = os.pwrite(file, block[position:size], start + position)
            except OSError as error:
                if error.errno == errno.EINVAL:  # opened, but not done here: some network and overlay file systems
                    self._direct[name] = None
                    return position
                raise
            if written % ALIGNMENT:
                return position + written // ALIGNMENT * ALIGNMENT
            position += written
        return position

    def _open_direct(self, name: str) -> int | None:
        with self._lock:
            if name not in self._direct:
                path, file = self._path(name), None
                if hasattr(os, "O_DIRECT") and path.stat().st_size >= self.direct_from and not is_network(path):
                    with suppress(OSError):
                        file = os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
                self._direct[name] = file
            return self._direct[name]

    def sync(self, names: Sequence[str]) -> None:
        for name in names:
            try:
                os.fdatasync(self._open(name))
            except OSError as error:
                raise output_error(error, self.root / name) from error

    def read(self, name: str, start: int, stop: int) -> memoryview:
        block = memoryview(bytearray(stop - start))
        try:
            file, position = self._open(name), start
            while position < stop and (got := os.preadv(file, [block[position - start :]], position)):
                position += got
        except OSError as error:
            raise output_error(error, self.root / name) from error
        if position < stop:
            raise OutputError(f"{self.root / name} ends at {position:,}, before {stop:,}.")
        return block

    def close(self) -> None:
        with self._lock:
            for file in (*self._files.values(), *(f for f in self._direct.values() if f is not None)):
                os.close(file)
            self._files.clear()
            self._direct.clear()

    def _open(self, name: str) -> int:
        with self._lock:
            if name not in self._files:
                self._files[name] = os.open(self._path(name), os.O_RDWR | os.O_CLOEXEC)
            return self._files[name]

    def _path(self, name: str) -> Path:
        path = self.root / partial_name(name)
        return self.final / name if self.final is not None and not path.exists() else path


def copy_sparse(source: Path, target: Path) -> None:
    """Copy a file durably, holes as holes: a partial shard is mostly hole, and has the size of a whole one."""
    with open(source, "rb", buffering=0) as old, open(target, "wb", buffering=0) as new:
        size = os.fstat(old.fileno()).st_size
        new.truncate(size)
        position = 0
        while position < size:
            try:
                position = os.lseek(old.fileno(), position, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:  # nothing but a hole is left
                    break
                raise
            hole = os.lseek(old.fileno(), position, os.SEEK_HOLE)
            while position < hole:
                block = os.pread(old.fileno(), min(8 * READ_PIECE, hole - position), position)
                if not block:
                    raise OutputError(f"{source} became shorter while it was copied. Run the same command again.")
                position += os.pwrite(new.fileno(), block, position)
        os.fsync(new.fileno())


def sync_folder(path: Path) -> None:
    """Make renames and removals in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, content: str | bytes, check: Callable[[], None] = lambda: None) -> None:
    """Write a small file so that it is there wholly or not at all.

    check: called when the content is durable, before it gets its name; raises where that must not happen any more.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        check()
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise output_error(error, path) from error


def output_error(error: OSError, path: Path) -> OutputError:
    """What to tell a person about a failed write."""
    if isinstance(error, OutputError):
        return error
    reason = {
        errno.ENOSPC: "the disk is full. Free some space and run the same command again: it resumes.",
        errno.EDQUOT: "the disk quota is used up. Free some space and run the same command again: it resumes.",
        errno.EROFS: "the file system is read-only. Make it writable and run again, or choose another OUT.",
        errno.ENOTDIR: "Not a directory, but a file, is a part of that path. Choose another OUT.",
        errno.EACCES: "permission denied. Make it writable or choose another OUT.",
        errno.EFBIG: "the file system, or a limit of this shell (ulimit -f), does not allow a file that large.",
    }.get(error.errno or 0, f"{error.strerror or error}. Mend that and run the same command again: it resumes.")
    return OutputError(f"cannot write {path}: {reason}")
