"""A merge's writes, done once with a file of a few pages, before anything is computed.

Permissions tell too little: a root-squashed share, a full quota of inodes or a bucket's mount without ranged writes
look writable until somebody writes there.
"""

from __future__ import annotations

import secrets
from contextlib import closing, suppress

from ties_dist.errors import OutputError
from ties_dist.storage.local import why
from ties_dist.storage.place import Place, partial_name

PROBE = ".ties_dist-probe-"
"""Begins the name of a file that is there for a moment."""
PROBE_BYTES = 3 << 12
OFFSET = 2 << 12
WORD = b"ties"


def rehearse(place: Place, parts: str = "", *, into: str = "") -> None:
    """Write at an offset, sync, read back and rename: what a merge does to its partial shards; leaves nothing.

    parts, into: folders that are there, of the partial file and of the one with a name.
    Raises OutputError saying which of it cannot be done.
    """
    probe = f"{PROBE}{secrets.token_hex(8)}"
    part, moved = f"{parts}/{partial_name(probe)}".lstrip("/"), f"{into}/{probe}".lstrip("/")
    step = "created"
    try:
        with closing(place.writer(parts)) as writer:
            writer.create(probe, PROBE_BYTES)
            step = "written at an offset"
            writer.write(probe, OFFSET, memoryview(WORD))
            step = "synced"
            writer.sync([probe])
        if place.reads_parts:
            step = "read back"
            with closing(place.writer(parts)) as again:
                if bytes(again.read(probe, OFFSET, OFFSET + len(WORD))) != WORD:
                    raise OutputError("it is not what was written.")
        step = "renamed"
        place.publish(part, moved)
    except OutputError as error:
        reason = why(error.__cause__) if isinstance(error.__cause__, OSError) else str(error)
        raise OutputError(f"cannot write {place}: a file there cannot be {step}: {reason}") from error
    finally:
        for name in (part, moved):
            with suppress(OutputError):
                place.remove(name)
