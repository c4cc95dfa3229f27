"""What an analysis counts of a block of elements: magnitudes of one expert, then signs and sums over all of them.

Counts are integers, and so is the mass: the sum of the 24-bit significands of a bucket's |delta|, which share their
exponent. Both add up in any order. Sums of products and of means are float64, in one fixed order inside a block.
The buckets are the upper 11 bits of |delta|, eight to a factor of two, cut further at each threshold T into entries
below, equal and above: a bucket's number is its upper bits plus, per threshold, one for >= T and one for > T, which
grows with |delta| as the bits do. So exact counts and masses at every threshold cost no counter of their own.

numba for the reasons of `histogram`: no compiler on the machine, and threads count in parallel. Loops that compute are
functions of arrays, apart from those that count, so that LLVM vectorises them: an expert of bf16 models takes 2.3 ns an
element, three of them are compared in 7.7 and multiplied in 1.7; as one loop each it was 4.5, 11 and 4.1.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ties_dist.kernels.compiled import compiled
from ties_dist.kernels.histogram import _as_bits, _load

BUCKET_SHIFT = 20
BUCKETS = 1 << (31 - BUCKET_SHIFT)
ARMS = 3
"""Ways to take a mean: of all deltas, of those that survive, of those that survive and have the elected sign."""
TILE = 1024
"""Elements whose intermediate values stay in the first-level cache, in loops that the compiler vectorises."""
LANES = 256
MOST_EXPERTS = 127
"""Levels carry a sign in one byte."""


@compiled
def measure(
    base: Any, expert: Any, thresholds: Any, counts: Any, significands: Any, deltas: Any, levels: Any
) -> None:  # fmt: skip
    """Count |expert - base| into buckets, in place, and leave the deltas for `compare`.

    base, expert: (n,) float32, or uint16 holding bfloat16. thresholds: (D,) int32 patterns, ascending. counts,
    significands: (2048 + 2 D,) int64. deltas: (n,) float32. levels: (n,) int8, how many thresholds |delta| reaches,
    with its sign.
    """
    bits, buckets, reached = np.empty(TILE, np.int32), np.empty(TILE, np.int32), np.empty(TILE, np.int32)
    for start in range(0, base.size, TILE):
        stop = min(start + TILE, base.size)
        size = stop - start
        _subtract(base[start:stop], expert[start:stop], deltas[start:stop], bits[:size])
        _place(bits[:size], thresholds, buckets[:size], reached[:size])
        _sign(deltas[start:stop], reached[:size], levels[start:stop])
        _count(bits[:size], buckets[:size], counts, significands)


@compiled
def _subtract(base: Any, expert: Any, deltas: Any, bits: Any) -> None:
    for i in range(base.size):
        delta = _load(expert, i) - _load(base, i)
        deltas[i] = delta
        bits[i] = np.int32(_as_bits(delta) & np.uint32(0x7FFFFFFF))


@compiled
def _place(bits: Any, thresholds: Any, buckets: Any, reached: Any) -> None:
    for i in range(bits.size):
        buckets[i] = bits[i] >> np.int32(BUCKET_SHIFT)
        reached[i] = 0
    for threshold in thresholds:
        for i in range(bits.size):
            at_least = np.int32(bits[i] >= threshold)
            reached[i] = reached[i] + at_least
            buckets[i] = buckets[i] + at_least + np.int32(bits[i] > threshold)


@compiled
def _sign(deltas: Any, reached: Any, levels: Any) -> None:
    for i in range(deltas.size):
        levels[i] = np.int8(reached[i] if deltas[i] > 0 else (-reached[i] if deltas[i] < 0 else 0))


@compiled
def _count(bits: Any, buckets: Any, counts: Any, significands: Any) -> None:
    for i in range(bits.size):
        counts[buckets[i]] += 1
        implicit = np.int64(bits[i] >= np.int32(0x800000)) << 23
        significands[buckets[i]] += np.int64(bits[i] & np.int32(0x7FFFFF)) | implicit


@compiled
def widen(values: Any, out: Any) -> None:
    """values: (n,) as of `measure`; out: (n,) float32."""
    for i in range(values.size):
        out[i] = _load(values, i)


@compiled
def multiply(rows: Any, gram: Any) -> None:
    """Add the inner products of rows to the upper triangle of `gram`, in place.

    rows: (r, n) float32. gram: (r, r) float64. Sums take turns, so many that the compiler can vectorise without
    leave to reorder: with four it took more than twice as long.
    """
    sums = np.empty(LANES)
    for a in range(rows.shape[0]):
        for b in range(a, rows.shape[0]):
            sums[:] = 0.0
            for start in range(0, rows.shape[1], LANES):
                _add_products(rows[a, start : start + LANES], rows[b, start : start + LANES], sums)
            total = 0.0
            for value in sums:
                total += value
            gram[a, b] += total


@compiled
def _add_products(left: Any, right: Any, sums: Any) -> None:
    for i in range(left.size):
        sums[i] += np.float64(left[i]) * np.float64(right[i])


@compiled
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
