"""Sums against their definition: the i-th product in lane i mod 8, lanes in one tree, whatever the pieces."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ties_dist.kernels.sums import add_products, combined


def by_definition(left: np.ndarray, right: np.ndarray) -> float:
    """In Python's own float64, one addition after another."""
    lanes = [0.0] * 8
    for i, (a, b) in enumerate(zip(left.tolist(), right.tolist(), strict=True)):
        lanes[i % 8] += a * b
    a, b, c, d, e, f, g, h = lanes
    return ((a + b) + (c + d)) + ((e + f) + (g + h))


def summed(left: np.ndarray, right: np.ndarray, at_once: int) -> float:
    lanes = np.zeros(8)
    for low in range(0, left.size, at_once):
        add_products(left[low : low + at_once], right[low : low + at_once], lanes)
    return combined(lanes)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 4097, 20_011])
def test_a_sum_is_the_same_in_any_pieces(size: int) -> None:
    draw = np.random.default_rng(size)
    left, right = (draw.standard_normal((2, size)) * 10.0 ** draw.integers(-6, 6, (2, size))).astype(np.float32)
    expected = by_definition(left, right)
    assert [summed(left, right, at_once) for at_once in (8, 24, 4096, 1 << 15)] == [expected] * 4


def test_the_order_of_the_lanes_can_be_seen() -> None:
    """Otherwise the test above would hold for any order."""
    values = np.array([2.0**60, 1.0, -(2.0**60), 1.0], np.float32)
    assert summed(values, np.ones(4, np.float32), 8) == by_definition(values, np.ones(4, np.float32)) == 0.0
    assert math.fsum(values.tolist()) == 2.0


def test_products_are_exact_and_neither_overflow_nor_vanish() -> None:
    large, small = np.full(3, 3e38, np.float32), np.full(3, 1e-45, np.float32)
    assert summed(large, large, 8) == pytest.approx(3 * 9e76, rel=1e-6)
    assert summed(small, small, 8) == 3 * 2.0**-298
