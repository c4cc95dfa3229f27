"""What was written, read again before it is published: a file system may have lost what it acknowledged.

Seen on s3fs and on SeaweedFS's mount: of what two nodes wrote into one file the last one's stayed, with zeros between.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import NamedTuple

from ties_dist.errors import OutputError
from ties_dist.executors.base import Usage
from ties_dist.messages import listing
from ties_dist.output.folder import OutFolder
from ties_dist.planning.layout import OutputShard
from ties_dist.progress import Progress, phase
from ties_dist.storage.base import BLOCK_BYTES
from ties_dist.storage.digests import block_digests

SAMPLED = 32
"""Blocks that are read where nothing speaks against the file system: 32 MiB of the output."""
READERS = 4
AT_ONCE = 16
"""Blocks that one read takes at most."""


class Span(NamedTuple):
    """Blocks [first, stop) of a file."""

    file: str
    first: int
    stop: int


def reread(
    folder: OutFolder,
    shards: Sequence[OutputShard],
    blocks: Mapping[str, Sequence[str]],
    usage: Usage,
    progress: Progress,
) -> None:
    """All blocks where OUT is neither a disk of this machine nor proven between its writers; else a sample.

    Raises OutputError naming blocks that are not what was written.
    """
    if not folder.place.reads_parts:  # nothing can be read before it has its name
        return
    known = {shard.name: shard for shard in shards}
    chosen = [(name, at) for name in known for at in range(len(blocks[name]))]
    if folder.place.keeps == "disk" or usage.is_proven:
        chosen = sorted(random.sample(chosen, min(SAMPLED, len(chosen))))
    spans = _spans(chosen)

    def size(span: Span) -> int:
        return min(span.stop * BLOCK_BYTES, known[span.file].size) - span.first * BLOCK_BYTES

    def lost(span: Span) -> list[str]:
        part = folder.part(known[span.file], publishing=True)
        if part is None:
            return [f"{span.file}: missing"]
        parent, _, file = part.rpartition("/")
        start = span.first * BLOCK_BYTES
        found = folder.place.reader(parent).read(file, start, start + size(span))
        digests = block_digests(found.view)
        found.release()
        wanted = blocks[span.file][span.first : span.stop]
        pairs = enumerate(zip(digests, wanted, strict=True), span.first)
        return [f"{span.file}: MiB {at}" for at, (have, want) in pairs if have != want]

    gone: list[str] = []
    with phase(progress, "reread", sum(map(size, spans))), ThreadPoolExecutor(READERS) as pool:
        for span, problems in zip(spans, pool.map(lost, spans), strict=True):
            gone += problems
            progress.advance(size(span))
    if gone:
        raise OutputError(
            listing(
                f"{folder.place} did not keep {len(gone):,} MiB of what was written there:",
                gone,
                "Nothing was published. Where several machines wrote, its file system is unfit for that: choose "
                "another OUT, or merge on one machine (--executor local), which goes on with what is right.",
            )
        )


def _spans(chosen: Sequence[tuple[str, int]]) -> list[Span]:
    """Neighbouring blocks of a file together."""
    found = []
    for (file, _), group in groupby(enumerate(chosen), lambda each: (each[1][0], each[1][1] - each[0])):
        run = [at for _, (_, at) in group]
        parts = [run[i : i + AT_ONCE] for i in range(0, len(run), AT_ONCE)]
        found += [Span(file, part[0], part[-1] + 1) for part in parts]
    return found
