"""Reused buffers, aligned for direct I/O. A fresh 8 MiB costs a page fault per 4 KiB, as much as copying it."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import numpy as np

ALIGNMENT = 4096


@dataclass
class Buffers:
    """Gives out uint8 arrays that start at a multiple of 4096; keeps no more than were ever in use at once."""

    _free: list[np.ndarray] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, size: int) -> np.ndarray:
        """An array of at least `size` bytes, its content undefined."""
        with self._lock:
            fitting = [i for i, buffer in enumerate(self._free) if buffer.nbytes >= size]
            if fitting:
                return self._free.pop(min(fitting, key=lambda i: self._free[i].nbytes))
            self._free.clear()  # too small for today's units
        raw = np.empty(max(size, ALIGNMENT) + ALIGNMENT, dtype=np.uint8)
        start = -raw.ctypes.data % ALIGNMENT
        return raw[start : start + max(size, ALIGNMENT)]

    def give(self, buffer: np.ndarray) -> None:
        """Back from its user, who must not touch it any more."""
        with self._lock:
            self._free.append(buffer)
