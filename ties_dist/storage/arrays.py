"""The arrays of a Zarr group as a reader sees files: names, bytes, ranges. Float32 in rows of one dimension, chunked.

Zarr, because Fisher diagonals and Gram matrices are written piece by piece, by a run that may be killed, and are as
large as the model; safetensors needs all sizes before the first byte. A chunk that is lost reads as the fill value, and
zeros are good numbers: so that is NaN, chunks end in a checksum, and an array lists the digests of its chunks.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import xxhash

from ties_dist.errors import CheckpointError
from ties_dist.storage.digests import digest
from ties_dist.storage.memory import MemorySpan

CHUNK_ITEMS = 1 << 20
"""4 MiB: a unit of a merge touches a few, and reads at most two of them in vain."""
GROUP_FILE = "zarr.json"
KEPT_CHUNKS = 8
"""Neighbouring units share a chunk."""
CHUNKS = "chunks"
"""Attribute of an array: the digests of its chunks."""


def write_array(group: Path, name: str, values: np.ndarray) -> str:
    """Write (n,) float32, finite, in the place of what was there. Returns what names the content: see `ArrayReader`."""
    import zarr
    from zarr.codecs import Crc32cCodec

    chunks = [_digest(values[at : at + CHUNK_ITEMS]) for at in range(0, values.size, CHUNK_ITEMS)]
    array = zarr.create_array(
        group / quote(name, safe=""),
        shape=values.shape,
        chunks=(min(CHUNK_ITEMS, max(1, values.size)),),
        dtype="float32",
        compressors=[Crc32cCodec()],  # numbers like these do not shrink
        fill_value=np.nan,
        attributes={CHUNKS: chunks},
        overwrite=True,
    )
    array[:] = values
    return _all_of(chunks)


def _digest(chunk: np.ndarray) -> str:
    return xxhash.xxh3_64_hexdigest(chunk.data)


def _all_of(chunks: Sequence[str]) -> str:
    return digest(" ".join(chunks).encode())


@dataclass
class ArrayReader:
    """Reads the arrays of a group, every chunk against its digest; safe to call from several threads.

    contents: by name, what `write_array` returned. remedy: what to do about a damaged array.
    """

    path: Path
    contents: Mapping[str, str]
    remedy: str
    _arrays: dict[str, tuple[Any, Sequence[str]]] = field(default_factory=dict)
    _chunks: OrderedDict[tuple[str, int], np.ndarray] = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def names(self) -> Sequence[str]:
        return sorted(self.contents)

    def size(self, name: str) -> int:
        return int(self._array(name)[0].shape[0]) * 4

    def read(self, name: str, start: int, stop: int) -> MemorySpan:
        """Bytes [start, stop), multiples of four. Raises CheckpointError."""
        first, last = start // 4, stop // 4
        if last > self._array(name)[0].shape[0]:
            raise self._damaged(f"{name} ends before {stop:,} bytes")
        out = np.empty(last - first, np.float32)
        at = first
        while at < last:
            number = at // CHUNK_ITEMS
            low, high = number * CHUNK_ITEMS, (number + 1) * CHUNK_ITEMS
            end = min(last, high)
            whole = at == low and end == high  # nobody else will ask for it
            chunk = self._read(name, number) if whole else self._chunk(name, number)
            out[at - first : end - first] = chunk[at - low : end - low]
            at = end
        return MemorySpan(view=out.data.cast("B"))

    def _chunk(self, name: str, number: int) -> np.ndarray:
        key = name, number
        with self._lock:
            if key in self._chunks:
                self._chunks.move_to_end(key)
                return self._chunks[key]
        found = self._read(name, number)
        with self._lock:
            self._chunks[key] = found
            while len(self._chunks) > KEPT_CHUNKS:
                self._chunks.popitem(last=False)
        return found

    def _read(self, name: str, number: int) -> np.ndarray:
        array, chunks = self._array(name)
        try:
            found = np.asarray(array[number * CHUNK_ITEMS : (number + 1) * CHUNK_ITEMS], dtype=np.float32)
        except Exception as error:  # zarr's, its codecs' and the disk's errors share no root
            raise self._damaged(f"chunk {number} of {name} cannot be read: {error}") from error
        if _digest(found) != chunks[number]:
            lost = np.isnan(found).all()
            raise self._damaged(f"chunk {number} of {name} is {'lost' if lost else 'not what was written'}")
        return found

    def _array(self, name: str) -> tuple[Any, Sequence[str]]:
        """An array and the digests of its chunks."""
        with self._lock:
            if name not in self._arrays:
                self._arrays[name] = self._open(name)
            return self._arrays[name]

    def _open(self, name: str) -> tuple[Any, Sequence[str]]:
        import zarr  # 0.3 s, and only few merges need it

        if not (self.path / quote(name, safe="") / GROUP_FILE).is_file():
            raise self._damaged(f"{name} is lost")
        try:
            array = zarr.open_array(self.path / quote(name, safe=""), mode="r")
            chunks = [str(each) for each in array.attrs[CHUNKS]]  # type: ignore[union-attr]
            whole = -(-array.shape[0] // CHUNK_ITEMS) == len(chunks)
        except Exception as error:
            raise self._damaged(f"{name} cannot be opened: {error}") from error
        if not whole or _all_of(chunks) != self.contents.get(name):
            raise self._damaged(f"{name} is not what was written")
        return array, chunks

    def _damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {what}. {self.remedy}")


def is_group(path: Path) -> bool:
    return (path / GROUP_FILE).is_file()
