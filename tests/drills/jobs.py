"""Merges worth killing: small, of many units, with ties, and with a majority sign that is guessed wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tests.conftest import write_checkpoint

GRIDS = {torch.bfloat16: (1 << 8, 40), torch.float32: (1 << 20, 1 << 15)}
"""dtype -> (values are multiples of 1/this, deltas of at most so many of them): exact, so that experts cancel.

In bfloat16 a threshold is then an atom of many entries; in float32 it is not, and its prediction is a little off.
"""


def late_majority(elements: int, *, tensors: int = 9, dtype: torch.dtype = torch.bfloat16) -> list[dict[str, Tensor]]:
    """A base and three experts of `tensors` equal tensors, `elements` in all.

    In the first two tensors of nine most signs are positive, in the others negative: the units merged first take the
    majority sign to be +1, which is wrong. A third of the elements cancels exactly, so those units have to be redone.
    """
    draw = np.random.default_rng(0)
    grid, largest = GRIDS[dtype]
    models: list[dict[str, Tensor]] = [{} for _ in range(4)]
    for i in range(tensors):
        size = elements // tensors
        base = draw.integers(grid // 4, 3 * grid // 4, size)
        sign = np.where(draw.random(size) < 0.9, 1, -1) * (1 if 9 * i < 2 * tensors else -1)
        magnitude = np.minimum(largest, draw.geometric(3.2 / largest, (3, size)))
        deltas = sign * magnitude
        cancels = draw.random(size) < 1 / 3
        deltas[1] = np.where(cancels, -deltas[0], deltas[1])
        deltas[2] = np.where(cancels, 0, deltas[2])
        for model, values in zip(models, (base, *(base + delta for delta in deltas)), strict=True):
            numbers = torch.from_numpy(values.astype(np.float32) / grid).to(dtype)
            model[f"layers.{i}.weight"] = numbers.reshape(-1, 64) if size % 64 == 0 else numbers
    return models


def write_job(
    folder: Path,
    models: list[dict[str, Tensor]],
    *,
    shards: int = 1,
    options: Mapping[str, object] | None = None,
    method: str = "ties",
    density: float = 0.42,
    weight: float | None = None,
) -> Path:
    """Checkpoints with companion files, and a recipe; returns the recipe's path."""
    names = ["base", *(f"expert-{i}" for i in range(len(models) - 1))]
    for name, model in zip(names, models, strict=True):
        if not (folder / name).exists():
            write_checkpoint(folder / name, model, shards=shards, config={"model_type": "drill"})
            (folder / name / "tokenizer.json").write_text(json.dumps({"of": name}))
    recipe = {
        "merge_method": method,
        "base_model": "base",
        "models": [{"model": name} for name in names[1:]],
        "parameters": {"density": density, **({} if weight is None else {"weight": weight})},
        "ties_dist": dict(options or {}),
    }
    path = folder / "recipe.yml"
    path.write_text(json.dumps(recipe))
    return path
