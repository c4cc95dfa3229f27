"""A folder of a mounted file system as a place for an output.

POSIX renames and fsyncs do what an object store does by conditions: a file gets its name only when it is durable, one
that might be another's by now is first moved to where nobody else looks, and the lock changes hands under a flock.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ties_dist.errors import OutputError
from ties_dist.storage.base import Reader, Writer
from ties_dist.storage.local import LocalWriter, copy_sparse, output_error, sync_folder, write_durably
from ties_dist.storage.place import Check, Entry, unchecked
from ties_dist.storage.readers import open_reader

GUARD_POLL_SECONDS = 0.01
UNGUARDED_SECONDS = 0.2
"""After which a swap without flock looks whether another came in between."""


@dataclass(frozen=True)
class LocalPlace:
    """`root` is as the user gave it, for messages; where the place travels, it is absolute."""

    root: Path
    reads_parts = True

    def __str__(self) -> str:
        return str(self.root)

    def __reduce__(self) -> tuple[Callable[[Path], LocalPlace], tuple[Path]]:
        return LocalPlace, (self.root.absolute(),)

    def check(self, inputs: Sequence[str]) -> None:
        target = self.root.resolve()
        for model in (Path(path).resolve() for path in inputs):
            if target == model or (model.is_dir() and model in target.parents):
                raise OutputError(f"OUT {self} lies inside the input {model}. Choose a folder of its own.")
            # A folder's shards may be links to another's.
            for file in (p.resolve() for p in (model.glob("*.safetensors") if model.is_dir() else [model])):
                if target == file.parent:
                    raise OutputError(f"the input {file} lies in OUT {self}. Choose a folder of its own.")
        if self.root.is_symlink() and not self.root.exists():
            raise OutputError(f"OUT {self} is a broken link. Choose a folder.")
        if self.root.exists() and not self.root.is_dir():
            raise OutputError(f"OUT {self} is a file. Choose a folder.")

    def list(self, folder: str = "") -> Sequence[Entry]:
        with _reading(self.root / folder):
            try:
                with os.scandir(self.root / folder) as found:
                    return sorted(entry for each in found if (entry := _entry(each)) is not None)
            except (FileNotFoundError, NotADirectoryError):
                return []

    def size(self, name: str) -> int | None:
        path = self.root / name
        with _reading(path):
            try:
                return path.stat().st_size if path.is_file() else None
            except FileNotFoundError:
                return None

    def read(self, name: str) -> bytes | None:
        with _reading(self.root / name):
            try:
                return (self.root / name).read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                return None

    def reader(self, folder: str = "") -> Reader:
        return open_reader(self.root / folder)

    def writer(self, parts: str, fence: Check = unchecked) -> Writer:
        return LocalWriter(self.root / parts, self.root, fence=fence)

    def make(self, folder: str = "") -> None:
        with _writing(self.root / folder):
            (self.root / folder).mkdir(parents=True, exist_ok=True)

    def put(
        self,
        name: str,
        content: bytes | memoryview | Iterable[memoryview],
        check: Check = unchecked,
        *,
        shared: bool = False,
    ) -> None:
        write_durably(self.root / name, content, check, shared=shared)

    def overwrite(self, name: str, content: bytes) -> None:
        with _writing(self.root / name):
            (self.root / name).write_bytes(content)

    def swap(self, name: str, old: bytes | None, new: bytes | None, *, patience: float) -> bool:
        with _writing(self.root / name), self._guard(name, patience) as guarded:
            if self.read(name) != old:
                return False
            if new is None:
                self.remove(name)
                return True
            self.put(name, new, shared=True)
            # Where the file system has no flock, two may both get here: the later write wins.
            time.sleep(0 if guarded else UNGUARDED_SECONDS)
            return self.read(name) == new

    @contextmanager
    def _guard(self, name: str, patience: float) -> Iterator[bool]:
        """Serialises swaps on this machine, and on network file systems with flock; gives whether it does.

        One that is held for longer is of a process that was stopped inside: it is passed by.
        """
        with open(self.root / f"{name}.guard", "wb") as guard:
            guarded, until = False, time.monotonic() + patience
            while not guarded and time.monotonic() <= until:
                try:
                    fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    guarded = True
                except BlockingIOError:
                    time.sleep(GUARD_POLL_SECONDS)
                except OSError:  # no flock here
                    break
            yield guarded

    def append(self, name: str, content: bytes) -> None:
        path = self.root / name
        with _writing(path):
            known = path.exists()
            with open(path, "ab") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            if not known:
                sync_folder(path.parent)

    def copy(self, source: str, target: str) -> None:
        path = self.root / target
        fresh = path.with_name(f"{path.name}.copy")
        with _writing(path):
            copy_sparse(self.root / source, fresh)
            os.replace(fresh, path)
            sync_folder(path.parent)

    def publish(self, part: str, name: str) -> None:
        with _writing(self.root / name):
            (self.root / part).replace(self.root / name)

    def sync(self, folder: str = "") -> None:
        with _writing(self.root / folder):
            sync_folder(self.root / folder)

    def remove(self, name: str) -> None:
        with _writing(self.root / name):
            (self.root / name).unlink(missing_ok=True)

    def retire(self, names: Sequence[str], into: str, check: Check) -> None:
        # `unlink` would remove whatever has the name by then: the model of whoever took over.
        aside, paths = self.root / into, [self.root / name for name in names]
        with _writing(self.root):
            aside.mkdir()
            for path in paths:
                if not (path.exists() or path.is_symlink()):
                    continue
                check()
                with suppress(FileNotFoundError):  # we were replaced meanwhile, as the next check will say
                    path.replace(aside / path.name).unlink()
            check()
            for folder in dict.fromkeys(path.parent for path in paths if path.parent.is_dir()):
                sync_folder(folder)
                if folder != self.root:
                    with suppress(OSError):  # not empty
                        folder.rmdir()
            aside.rmdir()

    def clear(self, folder: str) -> None:
        path = self.root / folder
        shutil.rmtree(path, ignore_errors=True)  # fails where a move came in between: then once more
        with _writing(path):
            if path.exists():
                shutil.rmtree(path)

    def free(self) -> int | None:
        existing = next(p for p in (self.root.absolute(), *self.root.absolute().parents) if p.exists())
        return shutil.disk_usage(existing).free


def _entry(found: os.DirEntry[str]) -> Entry | None:
    """None for what is gone since it was listed."""
    with suppress(FileNotFoundError):
        stat = found.stat(follow_symlinks=os.path.exists(found.path))  # of a broken link, the link
        size = None if found.is_dir() else stat.st_size
        return Entry(found.name, size, stat.st_blocks * 512, stat.st_mtime_ns)
    return None


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"cannot read {path}: {error.strerror or error}.") from error


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        raise output_error(error, path) from error
