"""Random numbers that follow from (seed, expert, tensor, element): the same on every machine, in any order of work.

A counter-based generator (Salmon et al., SC 2011, in spirit): each number is a hash of its place, in integer operations
that every kernel has. Products stay below 2^63, so that no integer overflows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import xxhash

if TYPE_CHECKING:
    from torch import Tensor

BITS = 24
"""Of each number: what a float32 holds exactly."""
_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0x7FEB352D, 0x2C1B3C6D, 0x297A2D39)


def keys(seed: int, tensor: int, experts: int) -> dict[str, np.ndarray]:
    """For a method's state: a key of 32 bits per expert, as two float32 of 16 bits, (experts,) each."""
    found = [xxhash.xxh32_intdigest(f"{seed}/{expert}/{tensor}".encode()) for expert in range(experts)]
    return {
        "key_high": np.array([key >> 16 for key in found], np.float32),
        "key_low": np.array([key & 0xFFFF for key in found], np.float32),
    }


def uniform(like: Tensor, position: Tensor, key_high: Tensor, key_low: Tensor) -> Tensor:
    """(n,) float32 whole numbers in [0, 2^24), one per element. position: flat index of the first; keys: 0-d."""
    import torch

    index = torch.ones_like(like, dtype=torch.int64).cumsum(0) + (position - 1)
    key = key_high.to(torch.int64) * 65536 + key_low.to(torch.int64)
    word = _mixed((index & _WORD) ^ key)
    return (_mixed(word ^ ((index >> 32) + key)) >> (32 - BITS)).to(torch.float32)


def _mixed(word: Tensor) -> Tensor:
    """A bijection of 32-bit words in which every bit of the result depends on every bit given."""
    for multiplier, shift in zip(_MULTIPLIERS, (16, 15, 14), strict=True):
        word = ((word ^ (word >> shift)) * multiplier) & _WORD
    return word ^ (word >> 16)


def limits(densities: Sequence[float]) -> np.ndarray:
    """Below which of `uniform`'s numbers an element is kept, so that a share of `density` is, (n,) float32."""
    return np.array([np.ceil(density * (1 << BITS)) for density in densities], np.float32)
