"""What a method may have to know of an expert beside its weights: a Fisher diagonal, or Gram matrices of its inputs.

One Zarr group per checkpoint, made by `ties-dist collect`: an array of float32 per tensor, and attributes that say of
which checkpoint it is, so that a merge refuses statistics of another model, or of one that was changed since. Format 2
checks every chunk that is read, and says of how many rows a Gram matrix is; format 1 could not, and is refused.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import numpy as np
import xxhash

from ties_dist.checkpoints.catalogue import Checkpoint
from ties_dist.checkpoints.forms.known import parameters_of
from ties_dist.checkpoints.header import TensorEntry
from ties_dist.checkpoints.parameters import OpenFiles
from ties_dist.errors import CheckpointError
from ties_dist.storage.arrays import GROUP_FILE, ArrayReader, is_group, write_array
from ties_dist.storage.local import sync_folder

Kind = Literal["fisher", "gram"]
ATTRIBUTES = "ties_dist"
VERSION = 2


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What a store was collected from. checkpoint: identity of the model; calibration: digest of the examples used."""

    kind: Kind
    checkpoint: str
    calibration: str
    examples: int
    version: int = VERSION


@dataclass(frozen=True, kw_only=True)
class StoredArray:
    """shape: of the array, (in, in) for a Gram matrix; that is a sum over `rows` inputs. digest: names the content.

    transposed: whether the weight is stored (in, out).
    """

    shape: tuple[int, ...]
    digest: str
    rows: int = 0
    transposed: bool = False


@dataclass
class ExpertStatistics:
    """A store on disk. Arrays are added one by one, each durable at once; `finish` makes it whole."""

    path: Path
    origin: Origin
    arrays: dict[str, StoredArray] = field(default_factory=dict)
    finished: bool = False

    @classmethod
    def open(cls, path: Path) -> ExpertStatistics:
        """Raises CheckpointError where there is no finished store of this format."""
        found = cls.look(path)
        if found is None:
            raise CheckpointError(f"{path} is no store of statistics. {how_to_collect()}")
        if problem := found.outdated():
            raise CheckpointError(problem)
        if not found.finished:
            raise CheckpointError(
                f"{path} is not finished ({len(found.arrays):,} arrays so far). Run its `ties-dist collect` again."
            )
        return found

    @classmethod
    def look(cls, path: Path) -> ExpertStatistics | None:
        """What stands there, finished or not; None where it is nothing of ours. Of another format only the origin."""
        try:
            attributes = json.loads((path / GROUP_FILE).read_text())["attributes"][ATTRIBUTES]
            origin, finished = Origin(**attributes["origin"]), bool(attributes["finished"])
            if origin.version != VERSION:
                return cls(path, origin, finished=finished)
            arrays = {
                name: StoredArray(**{**entry, "shape": tuple(entry["shape"])})
                for name, entry in attributes["arrays"].items()
            }
            return cls(path, origin, arrays, finished=finished)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None

    def outdated(self) -> str | None:
        """Why a store of another format is not taken, and what to do; None for one of this format."""
        if self.origin.version == VERSION:
            return None
        why = ": a lost or damaged part of it would read as zeros" if self.origin.version < VERSION else ""
        return (
            f"{self.path} is a store of format {self.origin.version}, and {VERSION} is needed{why}. "
            f"{self.how_to_collect_again()}"
        )

    def how_to_collect_again(self) -> str:
        return how_to_collect("", self.origin.kind, out=f"{self.path} --fresh", again=" again")

    def create(self) -> None:
        """An empty store; what an earlier one left is removed, and nothing else."""
        import zarr

        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / GROUP_FILE).unlink(missing_ok=True)
        for old in [p for p in self.path.iterdir() if is_group(p)]:
            shutil.rmtree(old)
        zarr.create_group(self.path, attributes=self._attributes())

    def add(self, name: str, values: np.ndarray, *, rows: int = 0, transposed: bool = False) -> None:
        """Write one array, of any shape, and only then say that it is there."""
        content = write_array(self.path, name, np.ascontiguousarray(values, dtype=np.float32).reshape(-1))
        _sync(self.path / quote(name, safe=""))
        self.arrays[name] = StoredArray(shape=tuple(values.shape), digest=content, rows=rows, transposed=transposed)
        self._save()

    def finish(self) -> None:
        self.finished = True
        self._save()

    def _save(self) -> None:
        import zarr

        zarr.open_group(self.path, mode="r+").update_attributes(self._attributes())
        _sync(self.path, depth=0)

    def _attributes(self) -> dict[str, Any]:
        arrays = {name: asdict(entry) for name, entry in sorted(self.arrays.items())}
        return {ATTRIBUTES: {"origin": asdict(self.origin), "arrays": arrays, "finished": self.finished}}

    @property
    def identity(self) -> str:
        """Names the content; costs no read, since the arrays were hashed when they were written."""
        content = [(name, entry.shape, entry.rows, entry.digest) for name, entry in sorted(self.arrays.items())]
        return xxhash.xxh3_128_hexdigest(repr((self.origin.kind, content)).encode())

    def read(self, name: str) -> np.ndarray:
        """A whole array, float32. Raises CheckpointError where it is damaged."""
        shape = self.arrays[name].shape
        span = self.reader().read(name, 0, 4 * math.prod(shape))
        return np.frombuffer(span.view, np.float32).reshape(shape)

    def reader(self) -> ArrayReader:
        """Of all arrays; refuses what is not as it was written."""
        contents = {name: entry.digest for name, entry in self.arrays.items()}
        return ArrayReader(self.path, contents, self.how_to_collect_again())

    def as_checkpoint(self, name: str) -> Checkpoint:
        """The catalogue that a merge compares and plans with: its arrays are tensors, each a file of its own."""
        tensors = {
            tensor: TensorEntry(
                name=tensor, dtype="F32", shape=entry.shape, file=tensor, start=0, stop=4 * math.prod(entry.shape)
            )
            for tensor, entry in self.arrays.items()
        }
        return Checkpoint(
            name=name,
            opened=OpenFiles((self.reader(),)),
            shards=(),
            files={},
            tensors=tensors,
            parameters=parameters_of(tensors),
            config=None,
            metadata={},
            index_file=None,
            index_metadata={},
            notes=(),
        )

    def check(self, kind: Kind, checkpoint: str, *, name: str) -> str | None:
        """What is wrong with taking this store for a model of that identity; None if nothing is."""
        if self.origin.kind != kind:
            return f"{self.path} holds {self.origin.kind} statistics, {kind} is needed. {how_to_collect(name, kind)}"
        if self.origin.checkpoint != checkpoint:
            return (
                f"{self.path} was collected from another checkpoint than '{name}', or '{name}' was changed since. "
                f"{how_to_collect(name, kind)}"
            )
        return None


def _sync(folder: Path, depth: int = 9) -> None:
    """Make the files of a folder durable: Zarr does not."""
    for path in folder.iterdir():
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        elif depth:
            _sync(path, depth - 1)
    sync_folder(folder)


def how_to_collect(name: str = "", kind: str = "fisher|gram", *, out: str = "STORE", again: str = "") -> str:
    model = name or "CHECKPOINT"
    return f"Collect it{again} with `ties-dist collect {kind} {model} --data FILE.jsonl --out {out}`."


def is_statistics(path: Path) -> bool:
    return path.is_dir() and is_group(path)
