"""Reused buffers: aligned, large enough, never two users' at once, and no more of them than needed."""

from __future__ import annotations

import random
from collections import deque

import numpy as np
import pytest

from ties_dist.storage.buffers import Buffers

MIB = 1 << 20


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, MIB, MIB + 1])
def test_a_buffer_is_aligned_and_holds_what_was_asked_for(size: int) -> None:
    buffer = Buffers().take(size)
    assert buffer.ctypes.data % 4096 == 0
    assert buffer.nbytes == max(1, -(-size // 4096)) * 4096


def test_a_buffer_given_back_is_used_again() -> None:
    buffers = Buffers()
    first = buffers.take(8 * MIB)
    address = first.ctypes.data
    buffers.give(first)
    assert buffers.take(7 * MIB).ctypes.data == address
    assert buffers.take(7 * MIB).ctypes.data != address


def test_small_requests_do_not_hold_large_buffers() -> None:
    buffers = Buffers()
    large = buffers.take(8 * MIB)
    buffers.give(large)
    assert buffers.take(6 * MIB).nbytes == 6 * MIB


def test_no_more_is_kept_than_was_ever_in_use_at_once() -> None:
    """Units in flight, each one large tensor or many small ones of the same bytes, of four models."""
    buffers, draw, flight, held, asked = Buffers(), random.Random(0), deque[list[np.ndarray]](), 0, 0
    for _ in range(300):
        sizes = draw.choice([[8 * MIB], [100 << 10] * 80, [MIB] * 8, [3 * MIB, 5 * MIB]])
        flight.append([buffers.take(size) for size in sizes for _ in range(4)])
        in_use = sum(b.nbytes for unit in flight for b in unit)
        asked = max(asked, in_use)
        held = max(held, in_use + sum(b.nbytes for b in buffers._free))
        if len(flight) == 5:
            for buffer in flight.popleft():
                buffers.give(buffer)
    assert asked <= held <= 1.25 * 5 * 4 * 8 * MIB
