"""A task vector with the signs of its largest or its smallest entries turned round."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def flip_signs(
    base: Mapping[str, Tensor], expert: Mapping[str, Tensor], density: float, *, part: str
) -> dict[str, Tensor]:
    """part: 'top', the `density` largest entries over the whole model, or 'bottom', all others."""
    deltas = {n: expert[n] - base[n] for n in base if base[n].is_floating_point()}
    magnitudes = torch.cat([delta.abs().flatten() for delta in deltas.values()])
    threshold = magnitudes.kthvalue(magnitudes.numel() - int(density * magnitudes.numel())).values
    flipped = dict(expert)
    for name, delta in deltas.items():
        largest = delta.abs() > threshold
        flipped[name] = base[name] + torch.where(largest == (part == "top"), -delta, delta)
    return flipped
