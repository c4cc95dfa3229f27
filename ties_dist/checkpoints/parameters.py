"""From tensors to parameters: everything above this file sees parameters only.

What files store under a name is a tensor; forms (`forms/`, one file each) say which tensors make up which parameter and
how its elements are read.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Protocol

from ties_dist.checkpoints.header import TensorEntry
from ties_dist.dtypes import DTYPE_BITS
from ties_dist.storage.base import Reader, Span
from ties_dist.values.views import Files, Piece, View

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameter:
    """One array of a model. dtype: what it reads as, as a header has it. file: the one that it is mainly stored in."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    view: View
    file: str

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """As it reads."""
        return self.numel * DTYPE_BITS[self.dtype] // 8


class Form(Protocol):
    """One way to store parameters. A module in `forms/` is one."""

    def parameters(self, tensors: Mapping[str, TensorEntry]) -> Iterator[tuple[Parameter, Collection[str]]]:
        """The parameters that are stored in this form, each with the names of its tensors. Raises CheckpointError."""
        ...


@dataclass
class OpenFiles(Files):
    """Readers by place: of the model's own files, then of its adapter's."""

    readers: Sequence[Reader]
    _kept: dict[object, np.ndarray] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def read(self, piece: Piece) -> Span:
        return self.readers[piece.place].read(piece.file, piece.start, piece.stop)

    def kept(self, key: object, make: Callable[[], np.ndarray]) -> np.ndarray:
        with self._lock:
            if key not in self._kept:
                self._kept[key] = make()
            return self._kept[key]
