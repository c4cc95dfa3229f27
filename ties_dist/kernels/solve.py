"""RegMean's linear algebra in float64, every sum in one fixed order: the same bits on any machine and thread count.

BLAS is five times as fast, but sums in an order that follows from its build, the processor and the number of threads;
that order would be in the output. Here an element's sum runs over k = 0, 1, 2, ... whatever the blocks, no operation is
contracted, and threads take whole matrices (the GIL is released).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ties_dist.kernels.compiled import compiled

PANEL = 48
"""Columns of the factor that are made together; the trailing part is then read once for all of them."""
COLUMNS = 512
"""Of the right-hand side at a time: four rows of them stay in the first-level cache."""


@compiled
def add_gram(total: Any, gram: Any, weight: Any, alpha: Any) -> None:
    """total += weight * gram with off-diagonals scaled by alpha. total: (n, n) float64; gram: (n, n) float32."""
    n = total.shape[0]
    for i in range(n):
        for j in range(n):
            scale = weight if i == j else weight * alpha
            total[i, j] += scale * np.float64(gram[i, j])


@compiled
def add_product(total: Any, gram: Any, columns: Any, weight: Any, alpha: Any) -> None:
    """total += scaled gram @ columns. total: (n, m) float64; gram: (n, n) float32; columns: (n, m) float32."""
    n, m = total.shape
    for low in range(0, m, COLUMNS):
        high = min(m, low + COLUMNS)
        for i in range(0, n - n % 4, 4):
            for k in range(n):
                s0 = np.float64(gram[i, k]) * (weight if i == k else weight * alpha)
                s1 = np.float64(gram[i + 1, k]) * (weight if i + 1 == k else weight * alpha)
                s2 = np.float64(gram[i + 2, k]) * (weight if i + 2 == k else weight * alpha)
                s3 = np.float64(gram[i + 3, k]) * (weight if i + 3 == k else weight * alpha)
                for j in range(low, high):
                    value = np.float64(columns[k, j])
                    total[i, j] += s0 * value
                    total[i + 1, j] += s1 * value
                    total[i + 2, j] += s2 * value
                    total[i + 3, j] += s3 * value
        for i in range(n - n % 4, n):
            for k in range(n):
                s0 = np.float64(gram[i, k]) * (weight if i == k else weight * alpha)
                for j in range(low, high):
                    total[i, j] += s0 * np.float64(columns[k, j])


@compiled
def factorise(matrix: Any, smallest: Any) -> Any:
    """Cholesky's lower factor in place, (n, n) float64. Returns False at a pivot that is not above `smallest`."""
    n = matrix.shape[0]
    column = np.empty(n)
    for low in range(0, n, PANEL):
        high = min(n, low + PANEL)
        for k in range(low, high):
            pivot = matrix[k, k]
            if not pivot > smallest:
                return False
            root = np.sqrt(pivot)
            matrix[k, k] = root
            for i in range(k + 1, n):
                matrix[i, k] /= root
                column[i] = matrix[i, k]
            for i in range(k + 1, n):  # the rest of the panel
                factor = column[i]
                for j in range(k + 1, min(high, i + 1)):
                    matrix[i, j] -= factor * column[j]
        panel = np.ascontiguousarray(matrix[high:, low:high].T)
        for i in range(high, n):  # what is behind the panel, in the order of its columns
            k = 0
            while k + 4 <= high - low:  # four at a time: an element is loaded and stored once for all
                f0, f1, f2, f3 = (
                    panel[k, i - high],
                    panel[k + 1, i - high],
                    panel[k + 2, i - high],
                    panel[k + 3, i - high],
                )
                for j in range(i + 1 - high):
                    value = matrix[i, high + j] - f0 * panel[k, j]
                    value = value - f1 * panel[k + 1, j]
                    value = value - f2 * panel[k + 2, j]
                    matrix[i, high + j] = value - f3 * panel[k + 3, j]
                k += 4
            for last in range(k, high - low):
                f0 = panel[last, i - high]
                for j in range(i + 1 - high):
                    matrix[i, high + j] -= f0 * panel[last, j]
    return True


@compiled
def substitute(factor: Any, right: Any) -> None:
    """Solve (factor @ factor.T) x = right in place. factor: (n, n) float64, its lower part; right: (n, m) float64."""
    n, m = right.shape
    for low in range(0, m, COLUMNS):
        high = min(m, low + COLUMNS)
        for i in range(n):
            k = 0
            while k + 4 <= i:
                f0, f1, f2, f3 = factor[i, k], factor[i, k + 1], factor[i, k + 2], factor[i, k + 3]
                for j in range(low, high):
                    value = right[i, j] - f0 * right[k, j]
                    value = value - f1 * right[k + 1, j]
                    value = value - f2 * right[k + 2, j]
                    right[i, j] = value - f3 * right[k + 3, j]
                k += 4
            for last in range(k, i):
                f0 = factor[i, last]
                for j in range(low, high):
                    right[i, j] -= f0 * right[last, j]
            pivot = factor[i, i]
            for j in range(low, high):
                right[i, j] /= pivot
        for i in range(n - 1, -1, -1):
            k = n - 1
            while k - 4 >= i:
                f0, f1, f2, f3 = factor[k, i], factor[k - 1, i], factor[k - 2, i], factor[k - 3, i]
                for j in range(low, high):
                    value = right[i, j] - f0 * right[k, j]
                    value = value - f1 * right[k - 1, j]
                    value = value - f2 * right[k - 2, j]
                    right[i, j] = value - f3 * right[k - 3, j]
                k -= 4
            for last in range(k, i, -1):
                f0 = factor[last, i]
                for j in range(low, high):
                    right[i, j] -= f0 * right[last, j]
            pivot = factor[i, i]
            for j in range(low, high):
                right[i, j] /= pivot
