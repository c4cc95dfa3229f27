"""Links in folders that others may have written to: read as long as they stay inside, and never written through.

Who made a folder could otherwise have any file of this machine read and published with the merged model, or replaced
by it. The hub's cache keeps the files of its snapshots beside them, under their digests: links there are its own.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from ties_dist.errors import CheckpointError

_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def followed(root: Path, name: str) -> Path:
    """Where a file of a folder lies, if it is there. Raises CheckpointError where a link leads out of it."""
    path = root / name
    try:
        home, real = root.resolve(), path.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: before Python 3.13
        raise CheckpointError(f"{path} is a link that leads nowhere: {error}.") from error
    if not real.is_relative_to(home) and not _is_of_hub(real):
        raise CheckpointError(
            f"{path} is a link to {real}, outside of its folder. Copy the file there, or name its own folder."
        )
    return real


def _is_of_hub(real: Path) -> bool:
    """Whether a file is `models--NAME/blobs/DIGEST`."""
    folder = real.parent
    kept = folder.name == "blobs" and folder.parent.name.startswith("models--")
    return kept and _DIGEST.fullmatch(real.name) is not None


def open_itself(path: Path, flags: int) -> int:
    """A descriptor of a file, never of what a link in its place leads to. Raises OSError: ELOOP where it is a link."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)  # a pipe must not hold us up


def open_anew(path: Path) -> int:
    """A descriptor of a new file in place of whatever has its name, a link of somebody else's included."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
    try:
        return open_itself(path, flags)
    except FileExistsError:
        path.unlink()
        return open_itself(path, flags)
