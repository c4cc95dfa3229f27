"""The arrays of a Zarr group as a reader sees files: names, bytes, ranges. Float32 in rows of one dimension, chunked.

Zarr, because Fisher diagonals and Gram matrices are written piece by piece, by a run that may be killed, and are as
large as the model; safetensors needs all sizes before the first byte.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import numpy as np

from ties_dist.errors import CheckpointError
from ties_dist.storage.memory import MemorySpan

CHUNK_ITEMS = 1 << 20
"""4 MiB: a unit of a merge touches a few, and reads at most two of them in vain."""
GROUP_FILE = "zarr.json"
KEPT_CHUNKS = 8
"""Neighbouring units share a chunk."""


@dataclass
class ArrayReader:
    """Reads the arrays of a group; safe to call from several threads."""

    path: Path
    _arrays: dict[str, Any] = field(default_factory=dict)
    _chunks: OrderedDict[tuple[str, int], np.ndarray] = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def names(self) -> Sequence[str]:
        return sorted(unquote(path.name) for path in self.path.iterdir() if (path / GROUP_FILE).is_file())

    def size(self, name: str) -> int:
        return int(self._array(name).shape[0]) * 4

    def read(self, name: str, start: int, stop: int) -> MemorySpan:
        """Bytes [start, stop), multiples of four. Raises FileNotFoundError, CheckpointError."""
        first, last = start // 4, stop // 4
        if last > self._array(name).shape[0]:
            raise CheckpointError(f"{self.path}: {name} ends before {stop:,} bytes. Collect it again.")
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
        array = self._array(name)
        try:
            return np.asarray(array[number * CHUNK_ITEMS : (number + 1) * CHUNK_ITEMS], dtype=np.float32)
        except Exception as error:  # zarr's, numcodecs' and the disk's errors share no root
            raise CheckpointError(f"{self.path}: {name} cannot be read: {error}. Collect it again.") from error

    def _array(self, name: str) -> Any:
        with self._lock:
            if name not in self._arrays:
                import zarr  # 0.3 s, and only few merges need it

                if not (self.path / quote(name, safe="") / GROUP_FILE).is_file():
                    raise FileNotFoundError(f"{self.path}: no array {name}")
                self._arrays[name] = zarr.open_array(self.path / quote(name, safe=""), mode="r")
            return self._arrays[name]


def is_group(path: Path) -> bool:
    return (path / GROUP_FILE).is_file()
