"""What an output needs of where it lies, beside reading and writing by ranges: the steps that make it appear whole.

Kept to what an object store can do too: names with slashes, relative to the place; small files that are put whole or
under a condition; listing by folder; partial files that are written by ranges and then get their name. Who may do any
of it, and when, is the matter of `output`: a place only says what cannot be done by halves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import PurePosixPath, PureWindowsPath
from typing import Literal, NamedTuple, Protocol

from ties_dist.storage.base import Reader, Writer

Check = Callable[[], None]
"""Raises where a step must not be taken any more, since another driver has taken over."""


Keeping = Literal["disk", "shared", "cache"]


def unchecked() -> None:
    """For steps that harm nobody."""


def partial_name(name: str) -> str:
    """What a file is called until it is whole: a pre-laid-out shard of zeros is a valid one, and must not look it.

    All partial files lie in one folder, whatever folder they will have.
    """
    return f"{name.replace('%', '%25').replace('/', '%2F')}.partial"


def is_plain(name: str) -> bool:
    """Whether a name stays in its folder on any operating system: no separators, drives, dots alone, no control codes.

    Asked of every name that was read from a file: who wrote that may want another place touched.
    """
    inside = PurePosixPath(name).name == name == PureWindowsPath(name).name
    return inside and name not in ("", "..") and name.isprintable()


def is_inside(name: str) -> bool:
    """The same for a file or folder at any depth."""
    return all(map(is_plain, name.split("/")))


class Entry(NamedTuple):
    """What lies in a folder. size: bytes; None: a folder. used: bytes of the disk, fewer where there are holes.

    changed: nanoseconds by the place's clock, which say what is newer and nothing else.
    """

    name: str
    size: int | None
    used: int = 0
    changed: int = 0


class Place(Protocol):
    """Where an output lies. `str` gives what people call it; a place that travels means the same elsewhere.

    Whatever cannot be read or written raises OutputError; what is not there is None.
    """

    @property
    def reads_parts(self) -> bool:
        """Whether a partial file can be read back before it has its name (a disk: yes; an open upload: no).

        Where not, a writer's `create` begins it anew.
        """
        ...

    @property
    def keeps(self) -> Keeping:
        """Who keeps what is synced: a disk of this machine, something that other machines see, or a cache that stores
        it later, and loses it when its process ends."""
        ...

    def check(self, inputs: Sequence[str]) -> None:
        """Raises OutputError where nothing may be written: it is no folder, or lies among the files of these inputs."""
        ...

    def standing(self) -> Place:
        """Where files can be tried out before the place is made: itself, or what it would be made in."""
        ...

    def list(self, folder: str = "") -> Sequence[Entry]:
        """What lies directly in a folder, by name; nothing where there is no such folder."""
        ...

    def size(self, name: str) -> int | None:
        """Bytes of a file."""
        ...

    def read(self, name: str) -> bytes | None:
        """A small file."""
        ...

    def reader(self, folder: str = "") -> Reader:
        """For ranges of the files in a folder, of files as they are now."""
        ...

    def writer(self, parts: str, fence: Check = unchecked) -> Writer:
        """For ranges of partial files in a folder, and of those that `publish` has moved.

        fence: called before each range is written.
        """
        ...

    def make(self, folder: str = "") -> None:
        """Have a folder to write into. Nothing else makes one, so who was replaced finds its folders gone."""
        ...

    def put(
        self,
        name: str,
        content: bytes | memoryview | Iterable[memoryview],
        check: Check = unchecked,
        *,
        shared: bool = False,
    ) -> None:
        """Write a file, durably, so that it is there wholly or not at all.

        content: at once, or in pieces, each of which is done with when the next is asked for.
        check: called when the content is durable, before it gets its name. shared: whether others may put the same
        name at the same time, as in a cache, which no lock guards.
        """
        ...

    def overwrite(self, name: str, content: bytes) -> None:
        """Write a file that will be written again a moment later: readers may find it torn, a crash may take it."""
        ...

    def swap(self, name: str, old: bytes | None, new: bytes | None, *, patience: float) -> bool:
        """Write or remove (None) a file, durably, if it still is `old` (None: is not there); whether that was so.

        patience: seconds for which another's swap of the same file is waited for: it may have been stopped inside.
        """
        ...

    def append(self, name: str, content: bytes) -> None:
        """Add to a file's end, durably. Only one process appends to a file; a crash may leave part of the content."""
        ...

    def copy(self, source: str, target: str) -> None:
        """Replace a file, durably, by a copy of another or of itself: who has the old one open reaches only that."""
        ...

    def publish(self, part: str, name: str) -> None:
        """Give a partial file its name; durable after `sync`."""
        ...

    def sync(self, folder: str = "") -> None:
        """Make the names in a folder durable."""
        ...

    def remove(self, name: str) -> None:
        """Remove a file that nobody else will give this name, if it is there."""
        ...

    def retire(self, names: Sequence[str], into: str, check: Check) -> None:
        """Remove files, durably, but none that gets one of these names from whoever takes over in the middle of it.

        A folder that is empty then goes, too.

        check: called before each. into: a new folder's name, through which they go on a disk: once it is cleared, who
        was stopped inside removes nothing more. A store with conditional deletes has no use for it.
        """
        ...

    def clear(self, folder: str) -> None:
        """Remove a folder with all that is in it, if it is there."""
        ...

    def free(self) -> int | None:
        """Bytes that there is room for; None where nobody knows."""
        ...
