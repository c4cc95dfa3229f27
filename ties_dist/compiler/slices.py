"""Slices to be merged, and stored numbers as numpy sees them (no bfloat16, so bits and shifts): without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ties_dist.dtypes import LOOP_BYTES, STORED, DType
from ties_dist.methods.base import State


def stored(content: memoryview, dtype: DType) -> np.ndarray:
    """(n,) array over a slice's bytes, without a copy; bfloat16 as uint16."""
    return np.frombuffer(content, dtype=STORED[dtype])


def loadable(content: memoryview, dtype: DType) -> np.ndarray:
    """As the histograms take it: float32, or uint16 holding bfloat16; float16 is widened."""
    values = stored(content, dtype)
    return values.astype(np.float32) if dtype == "float16" else values


def widened(content: memoryview, dtype: DType) -> np.ndarray:
    """(n,) float32."""
    values = stored(content, dtype)
    if dtype == "bfloat16":
        return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values.astype(np.float32, copy=False)


def narrowed(values: np.ndarray, dtype: DType) -> np.ndarray:
    """(n,) float32 as they are stored, rounded to nearest even: the kernels' one cast, for what numpy computes."""
    if dtype != "bfloat16":
        with np.errstate(over="ignore"):
            return values.astype(STORED[dtype])
    bits = values.view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (np.where(np.isnan(values), np.uint32(0x7FC00000), rounded) >> np.uint32(16)).astype(STORED[dtype])


def beyond(values: np.ndarray, dtype: DType) -> int:
    """How many of (n,) float32 are NaN, Inf or become so in `dtype`."""
    return int((~np.isfinite(widened(narrowed(values, dtype).data.cast("B"), dtype))).sum())


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Some consecutive elements of one tensor, to be merged into `out` with one state.

    operands: bytes of base, experts and extras as stored, of `types` (see `eager.fuse`). position: flat index of the
    first element in its tensor. out: bytes of the result, of `out_type`.
    """

    operands: Sequence[memoryview]
    types: tuple[DType, ...]
    state: State
    position: int
    out: memoryview
    out_type: DType

    @property
    def elements(self) -> int:
        return len(self.out) // LOOP_BYTES[self.out_type]


def flat(state: State) -> np.ndarray:
    """All numbers of a state behind each other, float32, as a compiled loop takes them."""
    return np.concatenate([np.reshape(value, -1) for value in state.values()] or [np.zeros(0)]).astype(np.float32)
