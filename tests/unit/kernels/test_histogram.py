"""The counting loops against NumPy's, with and without a window, below and above the size at which they change."""

from __future__ import annotations

import numpy as np
import pytest

from ties_dist.kernels.histogram import count_magnitudes


@pytest.mark.parametrize("size", [0, 1, 1000, 65535, 65536, 300_001])
@pytest.mark.parametrize("buckets", [0, 1, 4])
def test_counts_are_those_of_numpy(size: int, buckets: int) -> None:
    draw = np.random.default_rng(size + buckets)
    base = (draw.standard_normal(size) * 0.02).astype(np.float32)
    expert = base + (draw.standard_normal(size) * 1e-4).astype(np.float32)
    expert[: size // 2] = base[: size // 2]  # exact zeros, as in 16-bit fine-tunes
    bits = np.abs(expert - base).view(np.uint32)
    first = int(np.float32(1e-4).view(np.uint32)) >> 16
    coarse, fine = np.zeros(1 << 15, np.int64), np.zeros(buckets << 16, np.int64)
    for _ in range(2):  # into what is there
        count_magnitudes(base, expert, coarse, fine, np.uint32(first << 16))
    assert np.array_equal(coarse, 2 * np.bincount(bits >> 16, minlength=1 << 15))
    places = bits.astype(np.int64) - (first << 16)
    inside = places[(places >= 0) & (places < fine.size)]
    assert np.array_equal(fine, 2 * np.bincount(inside, minlength=fine.size))
    assert size <= 1000 or buckets == 0 or fine.any()
