"""Catalogues made by hand, of checkpoints that no test reads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ties_dist.checkpoints.catalogue import Checkpoint
from ties_dist.checkpoints.forms.known import parameters_of
from ties_dist.checkpoints.header import TensorEntry
from ties_dist.checkpoints.parameters import OpenFiles
from ties_dist.dtypes import DTYPE_BITS

Shape = tuple[int, ...]


class NoReader:
    """A comparison reads nothing."""

    def names(self) -> Sequence[str]:
        raise AssertionError

    def size(self, name: str) -> int:
        raise AssertionError

    def read(self, name: str, start: int, stop: int) -> Any:
        raise AssertionError


def checkpoint(
    name: str, tensors: Mapping[str, tuple[str, Shape]], config: Mapping[str, object] | None = None
) -> Checkpoint:
    """A catalogue from {tensor: (dtype, shape)}."""
    entries, start = {}, 0
    for tensor, (dtype, shape) in tensors.items():
        stop = start + math.prod(shape) * DTYPE_BITS[dtype] // 8
        entries[tensor] = TensorEntry(name=tensor, dtype=dtype, shape=shape, file="f", start=start, stop=stop)
        start = stop
    return Checkpoint(
        name=name,
        opened=OpenFiles((NoReader(),)),
        shards=("f",),
        files={},
        tensors=entries,
        parameters=parameters_of(entries),
        config=config,
        metadata={},
        index_file=None,
        index_metadata={},
        notes=(),
    )
