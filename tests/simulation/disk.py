"""A disk that loses what was not synced when the power goes: torn ranges, half a journal line, renames undone.

Real files in memory underneath. Every call of ours that makes bytes durable goes through here: it counts them, so that
a schedule can strike at any one of them, and remembers what a crash may take back.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

PAGE = 4096
HOOKED = ("pwrite", "fsync", "fdatasync", "replace", "unlink")


class PowerCut(BaseException):
    """Everything in memory is gone; nothing may handle this."""


@dataclass
class Disk:
    """strike: is told of each operation before it is done; may raise PowerCut, or hold it back."""

    root: Path
    draw: random.Random
    strike: Callable[[str], None] = lambda operation: None
    operations: int = 0
    _real: dict[str, Any] = field(default_factory=dict)
    _ranges: list[tuple[str, int, bytes]] = field(default_factory=list)
    """Written and not synced: path, offset, what was there before."""
    _sizes: dict[str, int] = field(default_factory=dict)
    """Of files as they were synced last, those that are appended to."""
    _moves: list[tuple[str, str | None, str]] = field(default_factory=list)
    """Folder entries that changed and were not synced: now, before (None: removed), a copy of what was replaced."""
    _kept: int = 0

    @contextmanager
    def hooked(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patched:
            for name in HOOKED:
                self._real[name] = getattr(os, name)
                patched.setattr(os, name, getattr(self, name))
            yield

    def _begin(self, operation: str) -> None:
        self.operations += 1
        self.strike(operation)

    def _ours(self, path: object) -> str | None:
        text = os.fspath(path) if isinstance(path, (str, os.PathLike)) else None
        text = os.path.abspath(text) if isinstance(text, str) else None
        return text if text is not None and text.startswith(str(self.root)) else None

    def _path(self, descriptor: int) -> str | None:
        return self._ours(os.readlink(f"/proc/self/fd/{descriptor}").removesuffix(" (deleted)"))

    # The hooked calls

    def pwrite(self, descriptor: int, content: Any, offset: int) -> int:
        path = self._path(descriptor)
        if path is None:
            return int(self._real["pwrite"](descriptor, content, offset))
        self._begin("pwrite")
        with open(path, "rb") as file:
            file.seek(offset)
            before = file.read(len(content))
        self._ranges.append((path, offset, before))
        return int(self._real["pwrite"](descriptor, content, offset))

    def fdatasync(self, descriptor: int) -> None:
        self._sync(descriptor, "fdatasync")

    def fsync(self, descriptor: int) -> None:
        self._sync(descriptor, "fsync")

    def _sync(self, descriptor: int, name: str) -> None:
        path = self._path(descriptor)
        if path is None:
            self._real[name](descriptor)
            return
        if path not in self._sizes and not os.path.isdir(path):
            self._sizes[path] = 0
        self._begin(name)
        self._ranges = [r for r in self._ranges if r[0] != path]
        if os.path.isdir(path):
            # A rename is one transaction: either folder makes it durable.
            self._moves = [m for m in self._moves if path not in (os.path.dirname(m[0]), os.path.dirname(m[1] or ""))]
        else:
            self._sizes[path] = os.fstat(descriptor).st_size

    def replace(self, source: Any, target: Any, **options: Any) -> None:
        new = self._ours(target)
        if new is None:
            self._real["replace"](source, target, **options)
            return
        self._begin("replace")
        old = os.path.abspath(os.fspath(source))
        copy = self._keep(new)
        self._real["replace"](source, target, **options)
        self._moves.append((new, old, copy))
        if old in self._sizes:
            self._sizes[new] = self._sizes.pop(old)

    def unlink(self, path: Any, **options: Any) -> None:
        gone = self._ours(path)
        if gone is None or options or not os.path.exists(gone):
            self._real["unlink"](path, **options)
            return
        self._begin("unlink")
        copy = self._keep(gone)
        self._real["unlink"](path)
        self._moves.append((gone, None, copy))

    def _keep(self, path: str) -> str:
        if not os.path.isfile(path):
            return ""
        self._kept += 1
        copy = f"{self.root}.kept-{self._kept}"
        os.link(path, copy)
        return copy

    # The power goes

    def crash(self) -> None:
        """Take back a random part of what was not synced; a folder's changes from some moment on."""
        for path, offset, before in reversed(self._ranges):
            if os.path.exists(path):
                with open(path, "r+b") as file:
                    for start in range(0, len(before), PAGE):
                        if self.draw.random() < 0.5:
                            file.seek(offset + start)
                            file.write(before[start : start + PAGE])
        for path, size in self._sizes.items():
            if os.path.isfile(path) and path.endswith(".jsonl") and (now := os.path.getsize(path)) > size:
                os.truncate(path, self.draw.randint(size, now))
        undone = self.draw.randint(0, len(self._moves))
        for new, old, copy in reversed(self._moves[undone:]):
            if old is not None and os.path.exists(new) and not os.path.exists(old):
                os.makedirs(os.path.dirname(old), exist_ok=True)
                self._real["replace"](new, old)
            if copy and not os.path.exists(new) and os.path.isdir(os.path.dirname(new)):
                os.link(copy, new)
        self.forget()

    def forget(self) -> None:
        """Everything is as durable as it will get."""
        self._ranges.clear()
        self._sizes.clear()
        self._moves.clear()
        for number in range(1, self._kept + 1):
            path = f"{self.root}.kept-{number}"
            if os.path.exists(path):
                self._real.get("unlink", os.unlink)(path)
        self._kept = 0


def remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
