"""Writes the inputs of the golden merges by integer arithmetic, and prints what the NumPy oracle makes of them.

`python -m tests.golden.make` prints golden.json's content. Nothing of the code under test is imported.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np

from tests import oracle

SHAPES = {"b.weight": (37, 11), "a.weight": (64,), "c.bias": (1,), "z": (300, 7)}


def model(which: int) -> dict[str, np.ndarray]:
    """Float32 on a grid of 1/64, so that ties and exact cancellations abound; no random generator involved."""
    tensors, position = {}, 0
    for name, shape in SHAPES.items():
        n = int(np.prod(shape))
        i = np.arange(position, position + n, dtype=np.uint64)
        base = (i * np.uint64(2654435761) >> np.uint64(7)) % np.uint64(257)
        mixed = (i * np.uint64(40503) + np.uint64(which) * np.uint64(977)) * np.uint64(2246822519)
        delta = (mixed >> np.uint64(9)) % np.uint64(33)
        values = base.astype(np.float32) - 128 + (delta.astype(np.float32) - 16 if which else 0)
        tensors[name] = (values / np.float32(64)).astype(np.float32).reshape(shape)
        position += n
    return tensors


def digest(tensors: dict[str, np.ndarray]) -> str:
    whole = hashlib.sha256()
    for name in sorted(tensors):
        whole.update(name.encode() + np.ascontiguousarray(tensors[name]).tobytes())
    return whole.hexdigest()


CASES: dict[str, dict[str, object]] = {
    "paper": {"semantics": "paper"},
    "mergekit": {"semantics": "mergekit"},
    "peft": {"semantics": "peft"},
    "exact_k": {"semantics": "paper", "tie_policy": "exact_k"},
}

T = 0.3
"""Of `slerp`, from the base to the first expert."""


def by_sums(base: oracle.Model, experts: Sequence[oracle.Model]) -> dict[str, dict[str, np.ndarray]]:
    """What methods that take sums over each tensor make of the models."""
    return {"slerp": oracle.slerp(base, experts[0], t=T), "model_stock": oracle.model_stock(base, experts)}


if __name__ == "__main__":
    base, *experts = [model(i) for i in range(4)]
    print(
        json.dumps(
            {"inputs": digest({f"{i}.{n}": t for i in range(4) for n, t in model(i).items()})}
            | {
                name: digest(oracle.ties(base, experts, density=0.3, weights=[0.5, 1.0, 0.25], **case).tensors)  # type: ignore[arg-type]
                for name, case in CASES.items()
            }
            | {name: digest(merged) for name, merged in by_sums(base, experts).items()},
            indent=2,
        )
    )
