"""How input files are read, and how `auto` chooses: a look that costs about a millisecond, then a pure rule.

A map is fastest for what lies in the page cache; for what does not, direct I/O read 2.3 GB/s where a map read 1.4, at a
tenth of its CPU time (ext4, two cores, 8 MiB at a time). Page faults over a network are every loader's most frequent
complaint, hence `pread` there.
"""

from __future__ import annotations

import errno
import os
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Literal, NamedTuple

import psutil

from ties_dist.storage.buffers import ALIGNMENT, Buffers

Chosen = Literal["mmap", "pread", "direct"]

NETWORK = ("nfs", "lustre", "cifs", "smb", "ceph", "gluster", "fuse", "9p", "beegfs", "gpfs", "afs", "virtiofs")
DISKS = frozenset(
    ("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "bcachefs", "jfs", "tmpfs", "ramfs", "overlay", "apfs")
)
"""File systems of one machine, which keep what they have synced."""
WRITE_BACK = frozenset(("fuse.rclone", "fuse.s3ql"))
"""Acknowledge a sync when bytes are in a cache of theirs: they are stored later, or lost with the mount's process."""
SMALL_MODEL = 256 << 20
"""Bytes that take a fraction of a second either way, and are left in the page cache for the next run."""
MOSTLY_CACHED = 0.5
"""Share from which a map is faster: below it the disk decides, which direct I/O keeps busier."""
LOOKS = 64
"""Pages looked at per model: the share is right to 0.06 (standard error)."""
NO_LIMIT = 1 << 60
"""cgroup v1 writes "no limit" as the largest whole page below 2^63."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What `auto` goes by.

    size: bytes of the model's files. cached: share of them in the page cache, None where that cannot be told.
    direct: whether direct I/O works. mapped: bytes of all that would be mapped, other models' included. memory_limit:
    of this process's control group, bytes. reread: bytes are read again while the page cache will still hold them.
    """

    size: int
    network: bool
    cached: float | None
    direct: bool
    mapped: int
    memory_limit: int | None
    reread: bool = False


class Choice(NamedTuple):
    backend: Chosen
    reason: str

    def __str__(self) -> str:
        by = {"mmap": "memory map", "pread": "pread", "direct": "direct I/O"}[self.backend]
        return f"by {by} ({self.reason})"


def choose(facts: Facts) -> Choice:
    """The rule of `auto`."""
    if facts.network:
        return Choice("pread", "on a network file system")
    if facts.memory_limit is not None and facts.mapped > facts.memory_limit:
        # Mapped pages that were touched count as used memory, for which monitors (Ray's, Kubernetes') kill.
        fallback: Chosen = "pread" if facts.reread or not facts.direct else "direct"
        return Choice(fallback, "the memory limit is smaller than a map of all inputs")
    if facts.size < SMALL_MODEL:
        return Choice("mmap", "it is small")
    if facts.reread:
        return Choice("mmap", "it is read twice, the second time from the page cache")
    if facts.cached is None:
        return Choice("mmap", "what is cached cannot be told")
    share = f"{100 * facts.cached:.0f} % of it is cached"
    if facts.cached >= MOSTLY_CACHED:
        return Choice("mmap", share)
    return Choice("direct", share) if facts.direct else Choice("mmap", f"{share}, but direct I/O does not work here")


def look(files: Sequence[Path], *, mapped: int | None = None, reread_bytes: int | None = None) -> Facts:
    """Facts of one model's files. mapped: None for these alone.

    reread_bytes: what is read between two reads of the same byte, None where each is read once. A file that is gone is
    the reader's matter to report.
    """
    sizes = file_sizes(files)
    size, limit = sum(sizes.values()), memory_limit()
    network = bool(sizes) and is_network(next(iter(sizes)))
    looked_at = sizes if size >= SMALL_MODEL and not network else {}
    room = min(psutil.virtual_memory().available, limit or NO_LIMIT)
    return Facts(
        size=size,
        network=network,
        cached=cached_share(looked_at),
        direct=bool(sizes) and not network and direct_works(max(sizes, key=sizes.__getitem__)),
        mapped=size if mapped is None else mapped,
        memory_limit=limit,
        reread=reread_bytes is not None and reread_bytes < room,
    )


def file_sizes(files: Sequence[Path]) -> dict[Path, int]:
    """Bytes of the files that are there."""
    sizes = {}
    for file in files:
        with suppress(OSError):
            sizes[file] = file.stat().st_size
    return sizes


def cached_share(sizes: dict[Path, int]) -> float | None:
    """Share of the files' bytes in the page cache, from `LOOKS` random pages; None where it cannot be told.

    By reads that refuse to wait. mincore(2) would say that all is cached to anyone but the owner (Linux 5.2), and a
    model is often another user's. Not at fixed places: a look brings its page in, and the next one must not find it.
    """
    if not any(sizes.values()) or not hasattr(os, "RWF_NOWAIT"):
        return None
    files, ends = list(sizes), list(accumulate(sizes.values()))
    wanted: defaultdict[Path, list[int]] = defaultdict(list)
    for place in random.choices(range(len(files)), cum_weights=ends, k=LOOKS):
        wanted[files[place]].append(random.randrange(sizes[files[place]]))
    found = 0
    try:
        for file, positions in wanted.items():
            descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            try:
                for position in positions:
                    with suppress(BlockingIOError):
                        found += os.preadv(descriptor, [bytearray(1)], position, os.RWF_NOWAIT)
            finally:
                os.close(descriptor)
    except OSError:  # not every file system can refuse to wait
        return None
    return found / LOOKS


def direct_works(file: Path) -> bool:
    """Whether a file opens for direct I/O and can be read so: some file systems open it and refuse the read."""
    try:
        descriptor = open_direct(file)
    except OSError:
        return False
    try:
        return os.preadv(descriptor, [Buffers().take(ALIGNMENT).data], 0) > 0
    except OSError:
        return False
    finally:
        os.close(descriptor)


def open_direct(file: Path) -> int:
    """A descriptor for reads past the page cache. Raises OSError, EINVAL where there is no such thing."""
    if not hasattr(os, "O_DIRECT"):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), str(file))
    return os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)


def is_network(path: Path) -> bool:
    """Whether a path lies on a file system served over a network or by a user process."""
    return mount_kind(path).startswith(NETWORK)


def mount_kind(path: Path) -> str:
    """The kind of file system that a path lies on; empty where that cannot be told."""
    target = str(path.resolve())
    mounts = [
        p
        for p in psutil.disk_partitions(all=True)
        if target == p.mountpoint or target.startswith(p.mountpoint.rstrip("/") + "/")
    ]
    return max(mounts, key=lambda p: len(p.mountpoint)).fstype.lower() if mounts else ""


def memory_limit(groups: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")) -> int | None:
    """The lowest memory limit of this process's control groups, version 1 or 2, in bytes; None: unlimited."""
    limits = [NO_LIMIT]
    with suppress(OSError):
        for line in groups.read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if not controllers:
                limits += _limits(mount, group, "memory.max")
            elif "memory" in controllers.split(","):
                limits += _limits(mount / "memory", group, "memory.limit_in_bytes")
    return min(limits) if min(limits) < NO_LIMIT else None


def _limits(root: Path, group: str, name: str) -> Iterator[int]:
    """Of a group and those it lies in. A container may be told its host's path: its own limit is at the root."""
    folder = root / group.lstrip("/")
    for place in (folder, *folder.parents):
        with suppress(OSError, ValueError):  # ValueError: "max"
            yield int((place / name).read_text())
        if place == root:
            return
