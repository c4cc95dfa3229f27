"""Exact order statistics from histograms, against sorting."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ties_dist.compiler.slices import loadable as as_counted
from ties_dist.dtypes import DType
from ties_dist.kernels.histogram import count_equal, count_magnitudes, find_equal
from ties_dist.thresholds import (
    NO_WINDOW,
    Histogram,
    ModelCut,
    TensorCut,
    Threshold,
    Window,
    from_bits,
    guess_window,
    predict,
    proves,
    resolve,
    split_points,
    to_bits,
)


def loadable(tensor: torch.Tensor) -> np.ndarray:
    kinds: dict[torch.dtype, DType] = {
        torch.float32: "float32",
        torch.bfloat16: "bfloat16",
        torch.float16: "float16",
    }
    return as_counted(memoryview(tensor.view(torch.uint8).numpy().tobytes()), kinds[tensor.dtype])


def counted(base: torch.Tensor, expert: torch.Tensor, window: Window) -> Histogram:
    histogram = Histogram(window)
    count_magnitudes(loadable(base), loadable(expert), histogram.coarse, histogram.fine, np.uint32(window.start_bits))
    return histogram


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [1, 2, 3, 1000])
def test_histograms_give_the_exact_order_statistic(dtype: torch.dtype, n: int) -> None:
    draw = torch.Generator().manual_seed(n)
    base = torch.randn(n, generator=draw).to(dtype)
    expert = (base.float() + torch.randn(n, generator=draw) * 0.01).to(dtype)
    ordered = np.sort((expert.float() - base.float()).abs().numpy())[::-1]
    for rank in sorted({1, n // 2 + 1, n}):
        bucket = resolve(counted(base, expert, NO_WINDOW), rank)
        assert isinstance(bucket, int)
        found = resolve(counted(base, expert, Window(bucket, 1)), rank)
        assert isinstance(found, Threshold)
        value = ordered[rank - 1]
        assert found.value == value
        assert (found.above, found.equal) == ((ordered > value).sum(), (ordered == value).sum())
        assert proves(rank, found.above, found.equal)


def test_mixed_types_are_counted_as_float32_differences() -> None:
    base, expert = torch.tensor([1.0, 1.0, -2.0]), torch.tensor([1.5, 0.75, -2.0], dtype=torch.bfloat16)
    histogram = counted(base, expert, NO_WINDOW)
    for magnitude in (0.5, 0.25, 0.0):
        assert histogram.coarse[to_bits(magnitude) >> 16] == 1
    assert histogram.total == 3


def test_nonfinite_deltas_are_counted_apart() -> None:
    base = torch.tensor([0.0, torch.inf, 1.0, 2.0])
    expert = torch.tensor([torch.nan, torch.inf, torch.inf, 2.0])
    assert counted(base, expert, NO_WINDOW).nonfinite == 3


def test_subnormal_deltas_keep_their_order() -> None:
    tiny = torch.tensor([1e-45, 3e-45, 0.0, 1e-40])
    histogram = counted(torch.zeros(4), tiny, Window(0, 1))
    found = resolve(histogram, 3)
    assert isinstance(found, Threshold)
    assert found.value == float(tiny[0])


def test_a_weighted_sample_predicts_value_and_shares() -> None:
    # Sorted from the top: 4 (2 entries), 3 (1), 3 (2), 1 (5): of 10 entries 20 % lie above 3 and 30 % at it.
    magnitudes = np.array([3.0, 1.0, 4.0, 3.0], dtype=np.float32)
    found = predict(magnitudes, np.array([1.0, 5.0, 2.0, 2.0]), 0.4)
    assert (found.value, found.above, found.equal) == (3.0, 0.2, pytest.approx(0.3))
    assert predict(magnitudes, np.array([1.0, 5.0, 2.0, 2.0]), 0.1).value == 4.0
    assert predict(magnitudes, np.array([1.0, 5.0, 2.0, 2.0]), 1.0).value == 1.0


def test_a_window_is_guessed_around_a_value() -> None:
    window = guess_window(1.0)
    assert window.buckets == 4
    assert {to_bits(1.0) >> 16, to_bits(0.999) >> 16} <= set(range(window.first, window.first + 4))
    assert guess_window(0.0) == Window(0, 4)


def test_ties_are_found_in_order() -> None:
    base, expert = loadable(torch.zeros(6)), loadable(torch.tensor([2.0, 1.0, -2.0, 2.0, 0.0, -2.0]))
    bits = np.uint32(to_bits(2.0))
    assert count_equal(base, expert, bits) == 4
    assert [find_equal(base, expert, bits, rank) for rank in range(5)] == [0, 2, 3, 5, -1]


def test_a_whole_model_cut_falls_on_each_tensor_in_canonical_order() -> None:
    cut = ModelCut(Threshold(bits=7, above=0, equal=9), tensor="m", before=3)
    assert [cut.of(name, 10) for name in ("a", "m", "z")] == [TensorCut(7, 10), TensorCut(7, 3), TensorCut(7, 0)]
    assert ModelCut(Threshold(bits=7, above=0, equal=9)).of("z", 10) == TensorCut(7, 10)


def test_slices_are_split_only_inside() -> None:
    cuts = (TensorCut(1, 0), TensorCut(1, 5), TensorCut(1, 5), TensorCut(1, 8), TensorCut(1, 10))
    assert split_points(cuts, 0, 10) == [5, 8]
    assert split_points(cuts, 5, 8) == []


def test_bit_patterns_order_like_magnitudes() -> None:
    values = [0.0, 1e-45, 1e-38, 0.1, 1.0, 3e38, float("inf")]
    patterns = [to_bits(v) for v in values]
    assert patterns == sorted(patterns)
    assert [from_bits(p) for p in patterns] == [float(np.float32(v)) for v in values]
