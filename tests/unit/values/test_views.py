"""What a form decodes is looked at where it comes in: its bytes would be taken for float32, whatever they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

from ties_dist.compiler.slices import Slice, decoded, numbers, sliced
from ties_dist.dtypes import DType
from ties_dist.values.views import Encoded


@dataclass
class Coded:
    """Elements that count up, as some type, and as many as a function says of those that are asked for."""

    dtype: str = "float32"
    length: Callable[[int], int] = lambda asked: asked
    type: DType = "float32"

    @property
    def content(self) -> Encoded:
        return self

    def decode(self, low: int, high: int) -> np.ndarray:
        return np.arange(low, high)[: self.length(high - low)].astype(self.dtype)

    def release(self) -> None:
        pass


def merged_from(coded: Coded) -> list[float]:
    out = memoryview(bytearray(12))
    each = Slice(operands=[coded], types=("float32",), state={}, position=0, out=out, out_type="float32")
    ((_, (content,), _),) = each.ready
    return np.frombuffer(content, np.float32).tolist()


WAYS: list[Callable[[Coded], object]] = [
    merged_from,
    lambda coded: numbers(coded, "float32", 0, 3),
    lambda coded: numbers(sliced(coded, "float32", 1, 9), "float32", 0, 3),
    lambda coded: decoded(coded, 0, 3),
    lambda coded: decoded(coded, 0, (1 << 16) + 3),
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("coded", "found"),
    [
        (Coded("float64"), r"Coded\.decode gave float64 of shape \(\d+,\), not float32"),
        (Coded("int32"), r"Coded\.decode gave int32"),
        (Coded(">f4"), r"Coded\.decode gave >f4"),
        (Coded(length=lambda asked: asked // 2), r"Coded\.decode gave float32 of shape \(\d+,\), not float32 of shape"),
    ],
)
def test_what_is_not_as_many_float32_is_refused(coded: Coded, found: str, way: Callable[[Coded], object]) -> None:
    with pytest.raises(TypeError, match=found):
        way(coded)


def test_what_is_float32_comes_in() -> None:
    assert merged_from(Coded()) == [0.0, 1.0, 2.0]
