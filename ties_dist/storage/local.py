"""Files on a mounted file system: writes by ranges, and the small steps that make them durable."""

from __future__ import annotations

import errno
import os
import stat
import threading
import uuid
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ties_dist.errors import OutputError
from ties_dist.storage.backends import is_network
from ties_dist.storage.buffers import ALIGNMENT
from ties_dist.storage.links import open_anew, open_itself
from ties_dist.storage.place import partial_name

DIRECT_FROM = 256 << 20
"""Bytes of a file: smaller ones are left in the page cache for who reads them next."""
COPY_PIECE = 8 << 20


@dataclass
class LocalWriter:
    """Ranges of pre-laid-out files in one folder; `final` is where a file is once publishing has renamed it.

    Large files are written past the page cache where the file system can: buffered writing of 2.2 GB took 6 to 13
    CPU-seconds on ext4, direct under 0.5, and inputs keep their pages.
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
            if not _is_ours(path, size):
                with os.fdopen(open_anew(path), "wb") as file:
                    file.truncate(size)  # sparse: posix_fallocate slows buffered writes
                sync_folder(self.root)
        except OSError as error:
            raise output_error(error, path) from error

    def write(self, name: str, start: int, block: memoryview) -> None:
        try:
            # Opened before the fence is asked: whoever is paused behind it goes on with the file it had. After a
            # take-over that is replaced by a copy; under its name there would be the published one.
            direct, file = self._open_direct(name), self._open(name)
            self.fence()
            position = self._write_direct(direct, name, start, block)
            while position < len(block):
                position += os.pwrite(file, block[position:], start + position)
        except OSError as error:
            raise output_error(error, self.root / name) from error

    def _write_direct(self, file: int | None, name: str, start: int, block: memoryview) -> int:
        """Write what direct I/O can of a range, and say how much that was: whole pages of an aligned buffer."""
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
                        file = open_itself(path, os.O_WRONLY | os.O_DIRECT)
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
                self._files[name] = open_itself(self._path(name), os.O_RDWR)
            return self._files[name]

    def _path(self, name: str) -> Path:
        path = self.root / partial_name(name)
        return self.final / name if self.final is not None and not path.exists() else path


def _is_ours(path: Path, size: int) -> bool:
    """Whether a file of this size is there, by this name alone: another one would be written to as well."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_size == size and found.st_nlink == 1


def copy_sparse(source: Path, target: Path) -> None:
    """Copy a file durably, holes as holes: a partial shard is mostly hole, and has the size of a whole one."""
    with (
        os.fdopen(open_itself(source, os.O_RDONLY), "rb", buffering=0) as old,
        os.fdopen(open_anew(target), "wb", buffering=0) as new,
    ):
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
                block = os.pread(old.fileno(), min(COPY_PIECE, hole - position), position)
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


def write_durably(
    path: Path,
    content: str | bytes | memoryview | Iterable[memoryview],
    check: Callable[[], None] = lambda: None,
    *,
    shared: bool = False,
) -> None:
    """Write a file so that it is there wholly or not at all.

    content: at once, or in pieces, each of which is done with when the next is asked for.
    check: called when the content is durable, before it gets its name; raises where that must not happen any more.
    shared: whether other processes may write it at the same time, as in a cache, which no lock guards.
    """
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp" if shared else f"{path.name}.tmp")
    try:
        with os.fdopen(open_anew(temporary), "wb") as file:
            for piece in _pieces(content):
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        check()
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise output_error(error, path) from error


def _pieces(content: str | bytes | memoryview | Iterable[memoryview]) -> Iterable[bytes | memoryview]:
    if isinstance(content, str):
        return [content.encode()]
    return [content] if isinstance(content, bytes | memoryview) else content


def output_error(error: OSError, path: Path) -> OutputError:
    """What to tell a person about a failed write."""
    return error if isinstance(error, OutputError) else OutputError(f"cannot write {path}: {why(error)}")


def why(error: OSError) -> str:
    """What a failed system call means here, and what to do."""
    return {
        errno.ENOSPC: "the disk is full. Free some space and run the same command again: it resumes.",
        errno.EDQUOT: "the disk quota is used up. Free some space and run the same command again: it resumes.",
        errno.EROFS: "the file system is read-only. Make it writable and run again, or choose another OUT.",
        errno.ENOTDIR: "Not a directory, but a file, is a part of that path. Choose another OUT.",
        errno.ELOOP: "it is a link, and none in OUT is followed. Remove it and run the same command again: it resumes.",
        errno.EACCES: "permission denied. Make it writable or choose another OUT.",
        errno.EFBIG: "the file system, or a limit of this shell (ulimit -f), does not allow a file that large.",
    }.get(error.errno or 0, f"{error.strerror or error}. Mend that and run the same command again: it resumes.")
