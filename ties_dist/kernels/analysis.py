"""What an analysis counts of a block of elements: magnitudes of one expert, then signs and sums over all of them.

Counts are integers, and so is the mass: the sum of the 24-bit significands of a bucket's |delta|, which share their
exponent. Both add up in any order. Sums of products and of means are float64, in one fixed order inside a block.
The buckets are the upper 11 bits of |delta|, eight to a factor of two, cut further at each threshold T into entries
below, equal and above: a bucket's number is its upper bits plus, per threshold, one for >= T and one for > T, which
grows with |delta| as the bits do. So exact counts and masses at every threshold cost no counter of their own.

numba for the reasons of `histogram`: no compiler on the machine, and threads count in parallel. An expert of bf16
models takes 3 to 4.5 ns an element, comparing and multiplying three of them 12; plain loops took half as long again.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from ties_dist.kernels.histogram import _as_bits, _load

BUCKET_SHIFT = 20
BUCKETS = 1 << (31 - BUCKET_SHIFT)
ARMS = 3
"""Ways to take a mean: of all deltas, of those that survive, of those that survive and have the elected sign."""
TILE = 1024
"""Elements whose intermediate values stay in the first-level cache, in loops that the compiler vectorises."""
NEVER = 0xFFFFFFFF
MOST_EXPERTS = 127
"""Levels carry a sign in one byte."""


def threshold_tables(thresholds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where `measure` finds thresholds: comparing with each took half as long again.

    thresholds: (D,) uint32, ascending. Returns, by the upper 11 bits, how many thresholds have lower ones, (2048,)
    uint8, and those that have the same, (2048, most) uint32.
    """
    upper = thresholds.astype(np.int64) >> BUCKET_SHIFT
    inside = np.full((BUCKETS, max(1, int(np.bincount(upper).max()))), NEVER, np.uint32)
    for bucket in set(upper.tolist()):
        same = thresholds[upper == bucket]
        inside[bucket, : same.size] = same
    return np.searchsorted(upper, np.arange(BUCKETS)).astype(np.uint8), inside


@njit(nogil=True, cache=True)
def measure(
    base: Any, expert: Any, below: Any, inside: Any, counts: Any, significands: Any, deltas: Any, levels: Any
) -> None:  # fmt: skip
    """Count |expert - base| into buckets, in place, and leave the deltas for `compare`.

    base, expert: (n,) float32, or uint16 holding bfloat16. below, inside: of `threshold_tables`. counts, significands:
    (2048 + 2 D,) int64. deltas: (n,) float32. levels: (n,) int8, how many thresholds |delta| reaches, with its sign.
    """
    for i in range(base.size):
        delta = _load(expert, i) - _load(base, i)
        bits = _as_bits(delta) & np.uint32(0x7FFFFFFF)
        upper = bits >> np.uint32(BUCKET_SHIFT)
        level = np.int64(below[upper])
        bucket = np.int64(upper) + 2 * level
        for j in range(inside.shape[1]):
            reached = np.int64(bits >= inside[upper, j])
            level += reached
            bucket += reached + np.int64(bits > inside[upper, j])
        counts[bucket] += 1
        implicit = np.int64(bits >= np.uint32(0x800000)) << 23
        significands[bucket] += np.int64(bits & np.uint32(0x7FFFFF)) | implicit
        deltas[i] = delta
        levels[i] = np.int8(level * (np.int64(delta > 0) - np.int64(delta < 0)))


@njit(nogil=True, cache=True)
def widen(values: Any, out: Any) -> None:
    """values: (n,) as of `measure`; out: (n,) float32."""
    for i in range(values.size):
        out[i] = _load(values, i)


@njit(nogil=True, cache=True)
def multiply(rows: Any, gram: Any) -> None:
    """Add the inner products of rows to the upper triangle of `gram`, in place.

    rows: (r, n) float32. gram: (r, r) float64. Four sums by turns: one would wait for itself.
    """
    size = rows.shape[1]
    whole = size - size % 4
    for a in range(rows.shape[0]):
        for b in range(a, rows.shape[0]):
            s0 = s1 = s2 = s3 = 0.0
            for k in range(0, whole, 4):
                s0 += np.float64(rows[a, k]) * np.float64(rows[b, k])
                s1 += np.float64(rows[a, k + 1]) * np.float64(rows[b, k + 1])
                s2 += np.float64(rows[a, k + 2]) * np.float64(rows[b, k + 2])
                s3 += np.float64(rows[a, k + 3]) * np.float64(rows[b, k + 3])
            for k in range(whole, size):
                s0 += np.float64(rows[a, k]) * np.float64(rows[b, k])
            gram[a, b] += (s0 + s1) + (s2 + s3)


@njit(nogil=True, cache=True)
def compare(deltas: Any, levels: Any, chosen: Any, conflicts: Any, signs: Any, sums: Any) -> None:
    """Count sign conflicts, and sum the magnitudes of three means, in place.

    deltas: (N, n) float32, levels: (N, n) int8 of `measure`. chosen: a delta survives, in the figures, where its level
    is above this. conflicts: (N, D + 1) int64: row e, from 1 on, column c counts parameters at which both signs occur
    among the first e + 1 experts in entries of level c or higher, and c is the highest such level.
    signs: (N + 1, N + 1) int64, parameters by how many positive and how many negative deltas survive there; sums:
    (N + 1, N + 1, 3) float64, of |mean| of all deltas, of the survivors, and of the survivors that have the sign of
    their sum (the positive one where that is zero).
    """
    experts, size = levels.shape
    high, low = np.empty(TILE, np.int8), np.empty(TILE, np.int8)
    positives, negatives = np.empty(TILE, np.int16), np.empty(TILE, np.int16)
    total, positive, negative = np.empty(TILE), np.empty(TILE), np.empty(TILE)
    least = np.int8(chosen)
    for start in range(0, size, TILE):
        count = min(TILE, size - start)
        high[:], low[:], positives[:], negatives[:] = 0, 0, 0, 0
        total[:], positive[:], negative[:] = 0.0, 0.0, 0.0
        for e in range(experts):
            level, delta = levels[e, start : start + count], deltas[e, start : start + count]
            for i in range(count):
                high[i] = max(high[i], level[i])
                low[i] = min(low[i], level[i])
                positives[i] += np.int16(level[i] > least)
                negatives[i] += np.int16(level[i] < -least)
            for i in range(count):
                value = np.float64(delta[i])
                total[i] += value
                positive[i] += value if level[i] > least else 0.0
                negative[i] += value if level[i] < -least else 0.0
            if e:
                for i in range(count):
                    conflicts[e, min(np.int64(high[i]), -np.int64(low[i]))] += 1
        for i in range(count):
            p, n = np.int64(positives[i]), np.int64(negatives[i])
            remaining = positive[i] + negative[i]
            one_sign, agreeing = (positive[i], p) if remaining >= 0 else (-negative[i], n)
            signs[p, n] += 1
            sums[p, n, 0] += abs(total[i]) / experts
            sums[p, n, 1] += abs(remaining) / max(p + n, 1)
            sums[p, n, 2] += one_sign / max(agreeing, 1)
