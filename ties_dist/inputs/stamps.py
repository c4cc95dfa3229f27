"""Are the files that a merge reads still those it began with? Only their content decides.

Size, times and inode of a file are hints: a copy, a remount or a `touch` changes them, and a file can be replaced by
another of equal size and time. So whoever resumes reads again some pages of every file, at places drawn from a secret
of the interrupted run: nobody can have left just those alone.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import pairwise, zip_longest
from pathlib import Path

from ties_dist.errors import CheckpointError
from ties_dist.recipe.references import ADAPTER_CONFIG, ADAPTER_WEIGHTS, is_adapter
from ties_dist.statistics.collected import is_statistics
from ties_dist.storage.arrays import GROUP_FILE
from ties_dist.storage.digests import digest
from ties_dist.storage.readers import open_reader
from ties_dist.values.inputs import Input, Sight, Stamp

SAMPLED_PAGES = 64
"""Of each file, one from each of as many equal parts, beside its last: other weights differ in every page, a change of
two adjoining parts is always found, one of a tenth of all pages is missed once in 848 times."""
PAGE_BYTES = 4096
ABSENT = "absent"
_READS = 16  # at once: on network storage a page takes a millisecond, and 8 models of 90 shards have 46,000


def see(models: Sequence[Input], secret: str | None = None) -> Sight:
    """Look at every file that is read. secret: of an earlier look that this one is to be compared with.

    Stamps are taken first: what is written while pages are read has another one afterwards.
    """
    secret, files = secret or secrets.token_hex(16), list(_files(models).values())
    stamps = [_stamp(file) for file in files]
    with ThreadPoolExecutor(_READS) as pool:
        samples = list(pool.map(_sample, files, (f"{secret} {i}" for i in range(len(files)))))
    return Sight(secret=secret, stamps=stamps, samples=samples)


def changed_since(before: Sight, models: Sequence[Input]) -> list[str]:
    """Names of files that hold other content than before, whatever their stamps say.

    Of a file that is not there, a hub's before its download, nothing is known.
    """
    names, now = list(_files(models)), see(models, before.secret).samples
    pairs = zip_longest(names, before.samples, now)
    return sorted(name or "a file that is gone" for name, old, new in pairs if old != new and new != ABSENT)


def changed_meanwhile(before: Sight, models: Sequence[Input]) -> list[str]:
    """The same within one run: only where a stamp changed are pages read again, as no file changes without one."""
    if [_stamp(file) for file in _files(models).values()] == before.stamps:
        return []
    return changed_since(before, models)


def stamp_inputs(models: Sequence[Input]) -> dict[str, Stamp]:
    """Of every file that is read, by `model/file`."""
    return {name: _stamp(file) for name, file in _files(models).items()}


def _files(models: Sequence[Input]) -> dict[str, Path]:
    found = {}
    for model in models:
        folder = Path(model.path)
        for file in files_of(model):
            found[f"{model.name}/{file.relative_to(folder) if folder in file.parents else file.name}"] = file
    return found


def _stamp(file: Path) -> Stamp:
    with suppress(OSError):
        found = file.stat()
        return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino
    return -1, -1, -1, -1


def _sample(file: Path, seed: str) -> str:
    """Digest of a file's size and of some pages of it, or of all of it where it is small."""
    try:
        reader = open_reader(file, "pread")
        size, draw, pages = reader.size(file.name), random.Random(seed), []
        count = min(SAMPLED_PAGES, -(-size // PAGE_BYTES))
        bounds = [size * i // max(1, count) for i in range(count + 1)]
        starts = [draw.randint(a, max(a, b - PAGE_BYTES)) for a, b in pairwise(bounds)]
        for start in (*starts, max(0, size - PAGE_BYTES)):
            span = reader.read(file.name, start, min(start + PAGE_BYTES, size))
            pages.append(digest(span.view))
            span.release()
        return digest(repr([size, pages]).encode())
    except FileNotFoundError:
        return ABSENT
    except (OSError, CheckpointError):  # cut off meanwhile
        return "unreadable"


def files_of(model: Input) -> list[Path]:
    """What is read of a model."""
    path = Path(model.path)
    if is_statistics(path):
        return [path / GROUP_FILE]  # written last, with the digests of all arrays
    applied = Path(model.adapter) if model.adapter else path if is_adapter(path) else None
    beside = [applied / name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)] if applied else []
    if applied == path:
        return beside
    pieces = (piece for view in model.views.values() for piece in view.pieces(0, 1))
    names = sorted({piece.file for piece in pieces if piece.place == 0})
    return [path, *beside] if path.is_file() else [*(path / name for name in names), *beside]
