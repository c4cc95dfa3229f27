"""Links in a model's folder: followed as long as they stay in it.

Who made a folder could otherwise have any file of this machine read, and published with the merged model. The hub's
cache keeps the files of its snapshots beside them, under names that are digests: links there are its own.
"""

from __future__ import annotations

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
