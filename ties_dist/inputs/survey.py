"""The models of a recipe as a plan finds them: of what is on the hub and not in its cache, everything but the weights.

A merge downloads (`references.fetch`). A plan asks the hub for headers, and for the pages by which a model is named, so
that its fingerprint is the merge's: about 160 KB of a file, whatever its size. Weights are not kept.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from xxhash import xxh3_128_hexdigest

from ties_dist.checkpoints.catalogue import MAX_HEADER_BYTES, FileHeader
from ties_dist.checkpoints.header import LENGTH_BYTES
from ties_dist.errors import CheckpointError, PlanError, RecipeError
from ties_dist.inputs.opening import pages_of
from ties_dist.messages import readable
from ties_dist.recipe.hub import Repository, cache_disk, check_room, read_range
from ties_dist.recipe.references import Location, fetch, find, unreachable
from ties_dist.storage.base import Backend, Reader
from ties_dist.storage.ranges import RangedReader
from ties_dist.storage.readers import open_reader

WEIGHTS = ".safetensors"
HEAD_BYTES = 100_000
"""Asked for at once: 97 % of the headers on the hub are smaller, says huggingface_hub."""
QUESTIONS_AT_ONCE = 16


@dataclass
class Survey:
    """Finds models for one plan; what it made for that is gone at the end of its block.

    absent: bytes that are to be downloaded, by what the recipe calls the model.
    """

    absent: dict[str, int] = field(default_factory=dict)
    _readers: dict[Path, RangedReader] = field(default_factory=dict)
    _known: dict[tuple[str, str], Path] = field(default_factory=dict)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for folder in self._readers:
            shutil.rmtree(folder.parent, ignore_errors=True)

    @property
    def download_bytes(self) -> int:
        return sum(self.absent.values())

    def fetch(self, location: Location) -> Path:
        """The folder of a model; of one that is not downloaded one without its weights, which `reader` has.

        Raises RecipeError.
        """
        if location.path is not None:
            return location.path
        found = find(location)
        if isinstance(found, Exception):
            try:
                return fetch(location, offline=True)
            except RecipeError:
                raise unreachable(location, found) from found
        if not found.absent:
            return found.folder
        key = found.name, found.commit
        if key not in self._known:
            self._known[key] = self._lay_out(location, found)
        return self._known[key]

    def _lay_out(self, location: Location, found: Repository) -> Path:
        try:
            folder = Path(tempfile.mkdtemp(prefix="ties_dist-plan-")) / location.short_name
            folder.mkdir()
            elsewhere = {name: size for name, size in found.absent.items() if name.endswith(WEIGHTS)}
            self._readers[folder] = RangedReader(folder, elsewhere, _getter(found))
            with ThreadPoolExecutor(QUESTIONS_AT_ONCE) as pool:
                rest = [name for name in found.sizes if name not in elsewhere]
                for name, path in zip(rest, pool.map(found.download, rest), strict=True):
                    (folder / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, folder / name)
                list(pool.map(lambda name: _read_ahead(self._readers[folder], name), elsewhere))
        except Exception as error:  # as in `references.fetch`
            raise unreachable(location, error) from error
        if elsewhere:
            self.absent[location.text] = sum(elsewhere.values())
        return folder

    def reader(self, path: Path, backend: Backend = "auto") -> Reader:
        """As `open_reader`, and of what `fetch` has given."""
        return self._readers.get(path) or open_reader(path, backend)

    def onto(self, path: Path) -> int:
        """Bytes that will be downloaded onto the disk of a folder."""
        return self.download_bytes if self.absent and cache_disk().stat().st_dev == path.stat().st_dev else 0

    def check(self, *, sample: bool) -> None:
        """Raises PlanError where the downloads find no room, or weights would be needed now."""
        if not self.absent:
            return
        check_room(self.download_bytes)
        if sample:
            told = ", ".join(f"'{text}' ({readable(size)})" for text, size in self.absent.items())
            raise PlanError(f"a sample needs weights, and these are not downloaded: {told}. Plan without --sample.")


def _getter(found: Repository) -> Callable[[str, int, int], bytes]:
    places: dict[str, str] = {}

    def get(name: str, start: int, stop: int) -> bytes:
        if name not in places:
            places[name] = found.place(name)
        try:
            return read_range(places[name], start, stop)
        except CheckpointError as error:
            raise CheckpointError(f"{found.name}/{name}: {error}") from error

    return get


def _read_ahead(reader: RangedReader, name: str) -> None:
    """The header of a file and the pages by which it is named, as far as its first bytes make sense."""
    size = reader.size(name)
    if size < LENGTH_BYTES:
        return
    head = reader.learn(name, 0, min(size, HEAD_BYTES))
    data_start = LENGTH_BYTES + int.from_bytes(head[:LENGTH_BYTES], "little")
    if data_start > min(size, LENGTH_BYTES + MAX_HEADER_BYTES):
        return  # the catalogue says what is wrong
    raw = head[LENGTH_BYTES:data_start]
    if data_start > len(head):
        raw = reader.learn(name, LENGTH_BYTES, data_start)
    for start, stop in pages_of(FileHeader(size=size, data_start=data_start, header_digest=xxh3_128_hexdigest(raw))):
        if stop > len(head):
            reader.learn(name, start, stop)
