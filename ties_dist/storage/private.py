"""A folder that only this user can have written to, for what is run as code once it is read.

Compiled loops are loaded into the process. A cache folder may be shared or lie in /tmp, where anybody can put a file
under the name that we look for, or a link in the folder's place. So the folder is opened once, its owner and mode are
asked of what was opened, and every file is reached from there: no name is resolved again.
"""

from __future__ import annotations

import os
import stat
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


class NotPrivateError(OSError):
    """Another user owns it, or may write to it."""


@dataclass(frozen=True)
class PrivateFolder:
    """`read` and `write` raise OSError; NotPrivateError where what is there cannot be trusted."""

    path: Path

    def read(self, name: str) -> bytes:
        with self._opened() as folder:
            file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=folder)
            with open(file, "rb") as content:
                self._check(os.fstat(file), stat.S_ISREG, name)
                return content.read()

    def write(self, name: str, content: bytes) -> None:
        """So that the file is there wholly or not at all; several processes may write the same name."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            self.path.mkdir(mode=0o700)
        with self._opened() as folder:
            fresh = f".{uuid.uuid4().hex}.new"
            file = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=folder)
            try:
                with open(file, "wb") as target:
                    target.write(content)
                os.replace(fresh, name, src_dir_fd=folder, dst_dir_fd=folder)
            except OSError:
                with suppress(OSError):
                    os.unlink(fresh, dir_fd=folder)
                raise

    @contextmanager
    def _opened(self) -> Iterator[int]:
        """By this user's own link, too; one that somebody else planted would choose where we write."""
        if (owner := os.lstat(self.path).st_uid) != os.geteuid():
            raise NotPrivateError(f"{self.path} belongs to user {owner}, not to {os.geteuid()}")
        folder = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._check(os.fstat(folder), stat.S_ISDIR)
            yield folder
        finally:
            os.close(folder)

    def _check(self, found: os.stat_result, kind: Callable[[int], bool], name: str = "") -> None:
        path, me = self.path / name, os.geteuid()
        if not kind(found.st_mode):
            raise NotPrivateError(f"{path} is no {'file' if name else 'folder'}")
        if found.st_uid != me:
            raise NotPrivateError(f"{path} belongs to user {found.st_uid}, not to {me}")
        if found.st_mode & OTHERS_WRITE:
            raise NotPrivateError(f"others may write to {path}: chmod go-w")
