"""Nodes write alternating blocks of one file and read all of it back: do they keep each other's writes?

One node alone proves nothing: on s3fs, or SeaweedFS's mount, each reads what it wrote, and who closes last wins. So all
have the file open while all write, as in a merge; only then do they close, and only then read. A worker does one round
when it is asked to; who asks waits for all before the next.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass

from ties_dist.errors import OutputError
from ties_dist.storage.base import BLOCK_BYTES, Writer
from ties_dist.storage.place import Place
from ties_dist.values.items import Seat
from ties_dist.worker.merging import MergeStep

SHARED = "seen-together"
"""A file among the partial shards, while workers start."""
BLOCKS_EACH = 2


def size_for(nodes: int) -> int:
    return nodes * BLOCKS_EACH * BLOCK_BYTES


@dataclass(frozen=True)
class WriteBlocks:
    """Every so manieth block, and leave the file open."""

    def __call__(self, step: MergeStep, seat: Seat) -> str | None:
        for at in range(seat.place, seat.of * BLOCKS_EACH, seat.of):
            step.writer.write(SHARED, at * BLOCK_BYTES, memoryview(_content(at)))
        return None


@dataclass(frozen=True)
class CloseFile:
    """Make it durable, and let go of it: nothing else is open yet."""

    def __call__(self, step: MergeStep, seat: Seat) -> str | None:
        step.writer.sync([SHARED])
        step.writer.close()
        return None


@dataclass(frozen=True)
class ReadBlocks:
    """What is wrong with what all have written, as this node sees it."""

    place: Place
    parts: str

    def __call__(self, step: MergeStep, seat: Seat) -> str | None:
        with closing(self.place.writer(self.parts)) as fresh:
            lost = [at for at in range(seat.of * BLOCKS_EACH) if not _is_there(fresh, at)]
        if not lost:
            return None
        return (
            f"{self.place}: {len(lost)} of {seat.of * BLOCKS_EACH} MiB that {seat.of} nodes wrote into one file are "
            "not what was written: this file system loses what another node writes. Choose another OUT, or merge on "
            "one machine (--executor local)"
        )


def _content(at: int) -> bytes:
    return (at + 1).to_bytes(8, "little") * (BLOCK_BYTES // 8)


def _is_there(file: Writer, at: int) -> bool:
    try:
        return bytes(file.read(SHARED, at * BLOCK_BYTES, (at + 1) * BLOCK_BYTES)) == _content(at)
    except OutputError:  # it ends before
        return False
