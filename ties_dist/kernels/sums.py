"""Sums that are the same to the last bit wherever, in whatever pieces and by however many threads they are taken.

A block of a parameter's elements, counted from its first, is summed whole in float64: the i-th element goes to lane
i mod 8, the lanes are combined in one fixed tree, and blocks are added in their order by who asked. Factors are
float32, so that a product of two is exact: whether a processor fuses multiplication and addition cannot be seen.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ties_dist.kernels.compiled import compiled

LANES = 8


@compiled
def add_products(left: Any, right: Any, lanes: Any) -> None:
    """Add left * right to the lanes of their elements, in place.

    left, right: (n,) float32, from a multiple of 8 of their block on. lanes: (8,) float64.
    """
    whole = left.size - left.size % 8
    s0, s1, s2, s3, s4, s5, s6, s7 = lanes
    for i in range(0, whole, 8):  # lanes in registers: an array of them is loaded and stored for every element
        s0 += np.float64(left[i]) * np.float64(right[i])
        s1 += np.float64(left[i + 1]) * np.float64(right[i + 1])
        s2 += np.float64(left[i + 2]) * np.float64(right[i + 2])
        s3 += np.float64(left[i + 3]) * np.float64(right[i + 3])
        s4 += np.float64(left[i + 4]) * np.float64(right[i + 4])
        s5 += np.float64(left[i + 5]) * np.float64(right[i + 5])
        s6 += np.float64(left[i + 6]) * np.float64(right[i + 6])
        s7 += np.float64(left[i + 7]) * np.float64(right[i + 7])
    lanes[0], lanes[1], lanes[2], lanes[3] = s0, s1, s2, s3
    lanes[4], lanes[5], lanes[6], lanes[7] = s4, s5, s6, s7
    for i in range(whole, left.size):
        lanes[i - whole] += np.float64(left[i]) * np.float64(right[i])


def combined(lanes: np.ndarray) -> float:
    """The sum of (8,) lanes: each with its neighbour, then pairs, then fours."""
    pairs = lanes[0::2] + lanes[1::2]
    fours = pairs[0::2] + pairs[1::2]
    return float(fours[0] + fours[1])
