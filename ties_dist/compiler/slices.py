"""Slices to be merged, and stored numbers as numpy sees them (no bfloat16, so bits and shifts): without torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ties_dist.dtypes import LOOP_BYTES, STORED, DType
from ties_dist.values.views import DECODED_AT_ONCE, Encoded, Operand, Shifted, blocks, decode


def as_stored(content: memoryview, dtype: DType) -> np.ndarray:
    """(n,) array over a slice's bytes, without a copy; bfloat16 as uint16."""
    return np.frombuffer(content, dtype=STORED[dtype])


def loadable(content: memoryview, dtype: DType) -> np.ndarray:
    """As the histograms take it: float32, or uint16 holding bfloat16; float16 is widened."""
    values = as_stored(content, dtype)
    return values.astype(np.float32) if dtype == "float16" else values


def widened(content: memoryview, dtype: DType) -> np.ndarray:
    """(n,) float32."""
    values = as_stored(content, dtype)
    if dtype == "bfloat16":
        return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values.astype(np.float32, copy=False)


def numbers(content: memoryview | Encoded, dtype: DType, low: int, high: int) -> np.ndarray:
    """(high - low,) elements of an operand as the histograms take them (`loadable`)."""
    if isinstance(content, memoryview):
        return loadable(part(content, dtype, low, high), dtype)
    return decode(content, low, high)


def part(content: memoryview, dtype: DType, low: int, high: int) -> memoryview:
    """The bytes of some elements."""
    item = LOOP_BYTES[dtype]
    return content[low * item : high * item]


def sliced(content: memoryview | Encoded, dtype: DType, low: int, high: int) -> memoryview | Encoded:
    """Elements [low, high) of an operand."""
    return part(content, dtype, low, high) if isinstance(content, memoryview) else Shifted(content, low)


def stored(operand: Operand) -> memoryview:
    """The bytes of an operand that is copied as it is stored."""
    assert isinstance(operand.content, memoryview), "what is copied needs no decoding"
    return operand.content


def decoded(operand: Operand, low: int, high: int) -> np.ndarray:
    """(high - low,) float32 of its own: elements of an operand, however many."""
    content = operand.content
    if isinstance(content, memoryview):
        return np.array(widened(part(content, operand.type, low, high), operand.type))
    if high - low <= DECODED_AT_ONCE:
        return decode(content, low, high)
    values = np.empty(high - low, np.float32)
    for start in range(low, high, DECODED_AT_ONCE):
        stop = min(high, start + DECODED_AT_ONCE)
        values[start - low : stop - low] = decode(content, start, stop)
    return values


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

    operands: bytes of base, experts and extras as stored, of `types` (see `fuse.fuse`), or what decodes them as
    float32. position: flat index of the first element in its tensor. out: bytes of the result, of `out_type`.
    """

    operands: Sequence[memoryview | Encoded]
    types: tuple[DType, ...]
    state: Mapping[str, np.ndarray]
    position: int
    out: memoryview
    out_type: DType

    @property
    def elements(self) -> int:
        return len(self.out) // LOOP_BYTES[self.out_type]

    @property
    def ready(self) -> Iterator[tuple[int, list[memoryview], memoryview]]:
        """The slice in pieces whose operands are all bytes of `types`: first element, operands and `out` of each."""
        for low, high in blocks(self.operands, self.elements):
            given = zip(self.operands, self.types, strict=True)
            contents = [
                part(c, t, low, high) if isinstance(c, memoryview) else decode(c, low, high).data.cast("B")
                for c, t in given
            ]
            yield low, contents, part(self.out, self.out_type, low, high)


def flat(state: Mapping[str, np.ndarray]) -> np.ndarray:
    """All numbers of a state behind each other, float32, as a compiled loop takes them."""
    return np.concatenate([value.ravel() for value in state.values()] or [np.zeros(0)], dtype=np.float32)
