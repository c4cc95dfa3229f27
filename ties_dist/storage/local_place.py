"""A folder of a mounted file system as a place for an output.

POSIX renames and fsyncs do what an object store does by conditions: a file gets its name only when it is durable, one
that might be another's by now is first moved to where nobody else looks, and the lock changes hands under a flock.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ties_dist.errors import CheckpointError, OutputError
from ties_dist.storage.backends import DISKS, WRITE_BACK, mount_kind
from ties_dist.storage.base import Reader, Writer
from ties_dist.storage.links import followed, open_itself
from ties_dist.storage.local import LocalWriter, copy_sparse, output_error, sync_folder, write_durably
from ties_dist.storage.place import Check, Entry, Keeping, unchecked
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

    @property
    def keeps(self) -> Keeping:
        kind = mount_kind(self.standing().root)
        return "disk" if kind in DISKS else "cache" if kind in WRITE_BACK else "shared"

    def check(self, inputs: Sequence[str]) -> None:
        target = self.root.resolve()
        for model in (Path(path).resolve() for path in inputs):
            if any(_is_same(model, folder) for folder in (target, *target.parents)):
                raise OutputError(f"OUT {self} lies inside the input {model}. Choose a folder of its own.")
            if any(_is_same(target, folder) for folder in model.parents):
                raise OutputError(f"the input {model} lies in OUT {self}. Choose a folder of its own.")
        if self.root.is_symlink() and not self.root.exists():
            raise OutputError(f"OUT {self} is a broken link. Choose a folder.")
        if self.root.exists() and not self.root.is_dir():
            raise OutputError(f"OUT {self} is a file. Choose a folder.")

    def standing(self) -> LocalPlace:
        above = (self.root.absolute(), *self.root.absolute().parents)
        return LocalPlace(next(folder for folder in above if folder.exists()))

    def list(self, folder: str = "") -> Sequence[Entry]:
        with _reading(self.root / folder):
            try:
                with os.scandir(self._folder(folder)) as found:
                    return sorted(entry for each in found if (entry := _entry(each)) is not None)
            except (FileNotFoundError, NotADirectoryError):
                return []

    def size(self, name: str) -> int | None:
        with _reading(self.root / name):
            try:
                found = self._path(name).lstat()
                if stat.S_ISLNK(found.st_mode):
                    found = followed(self.root, name).lstat()
                return found.st_size if stat.S_ISREG(found.st_mode) else None
            except (FileNotFoundError, NotADirectoryError, CheckpointError):
                return None

    def read(self, name: str) -> bytes | None:
        with _reading(self.root / name):
            try:
                path = self._path(name)
                if path.is_symlink():
                    path = followed(self.root, name)
                with os.fdopen(open_itself(path, os.O_RDONLY), "rb") as file:
                    return file.read()
            except (FileNotFoundError, NotADirectoryError):
                return None
            except CheckpointError as error:
                raise OutputError(str(error)) from error

    def reader(self, folder: str = "") -> Reader:
        return open_reader(self._folder(folder))

    def writer(self, parts: str, fence: Check = unchecked) -> Writer:
        return LocalWriter(self._folder(parts), self.root, fence=fence)

    def make(self, folder: str = "") -> None:
        with _writing(self.root / folder):
            self._folder(folder).mkdir(parents=True, exist_ok=True)

    def put(
        self,
        name: str,
        content: bytes | memoryview | Iterable[memoryview],
        check: Check = unchecked,
        *,
        shared: bool = False,
    ) -> None:
        write_durably(self._path(name), content, check, shared=shared)

    def overwrite(self, name: str, content: bytes) -> None:
        with _writing(self.root / name):
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            with os.fdopen(open_itself(self._path(name), flags), "wb") as file:
                file.write(content)

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
        with os.fdopen(open_itself(self._path(f"{name}.guard"), os.O_WRONLY | os.O_CREAT), "wb") as guard:
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
        path = self._path(name)
        with _writing(path):
            known = path.exists()
            with os.fdopen(open_itself(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "ab") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            if not known:
                sync_folder(path.parent)

    def copy(self, source: str, target: str) -> None:
        path = self._path(target)
        fresh = path.with_name(f"{path.name}.copy")
        with _writing(path):
            copy_sparse(self._path(source), fresh)
            os.replace(fresh, path)
            sync_folder(path.parent)

    def publish(self, part: str, name: str) -> None:
        with _writing(self.root / name):
            self._path(part).replace(self._path(name))

    def sync(self, folder: str = "") -> None:
        with _writing(self.root / folder):
            sync_folder(self._folder(folder))

    def remove(self, name: str) -> None:
        with _writing(self.root / name):
            self._path(name).unlink(missing_ok=True)

    def retire(self, names: Sequence[str], into: str, check: Check) -> None:
        # `unlink` would remove whatever has the name by then: the model of whoever took over.
        aside, paths = self._path(into), [self._path(name) for name in names]
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
        path = self._path(folder)
        shutil.rmtree(path, ignore_errors=True)  # fails where a move came in between: then once more
        with _writing(path):
            if path.is_symlink():
                path.unlink()
            elif path.exists():
                shutil.rmtree(path)

    def _path(self, name: str) -> Path:
        """Of a file here. Raises OutputError where a folder on the way is a link: we make none, so it is another's."""
        path, folders = self.root, name.split("/")[:-1]
        for folder in folders:
            path /= folder
            if path.is_symlink():
                raise OutputError(f"{path} is a link, and none in OUT is followed. Remove it, or choose another OUT.")
        return self.root / name

    def _folder(self, name: str) -> Path:
        return self._path(f"{name}/file").parent if name else self.root

    def free(self) -> int | None:
        return shutil.disk_usage(self.standing().root).free


def _entry(found: os.DirEntry[str]) -> Entry | None:
    """None for what is gone since it was listed."""
    with suppress(FileNotFoundError):
        facts = found.stat(follow_symlinks=False)
        size = None if found.is_dir(follow_symlinks=False) else facts.st_size
        return Entry(found.name, size, facts.st_blocks * 512, facts.st_mtime_ns)
    return None


def _is_same(path: Path, folder: Path) -> bool:
    """Whether two paths are one place, by whatever names: mounts have several."""
    with suppress(OSError):
        return path == folder or os.path.samefile(path, folder)
    return False


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OutputError:
        raise
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
