"""Pinned bytes of small merges: computed by the NumPy oracle (make.py), not by the code under test."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import ties_dist
from tests import oracle
from tests.golden.make import CASES, T, digest, model

PINNED = json.loads((Path(__file__).parent / "golden.json").read_text())


@pytest.mark.parametrize("name", CASES)
def test_the_bytes_of_a_small_merge_are_the_pinned_ones(name: str) -> None:
    base, *experts = [{n: oracle.to_torch(t) for n, t in model(i).items()} for i in range(4)]
    merged = ties_dist.merge_state_dicts(
        base,
        experts,
        parameters={"density": 0.3},
        expert_parameters=[{"weight": w} for w in (0.5, 1.0, 0.25)],
        **CASES[name],  # type: ignore[arg-type]
    )
    assert digest({n: t.numpy() for n, t in merged.items()}) == PINNED[name]


@pytest.mark.parametrize(("name", "count", "parameters"), [("slerp", 1, {"t": T}), ("model_stock", 3, {})])
def test_the_bytes_of_a_merge_that_takes_sums_are_the_pinned_ones(
    name: str, count: int, parameters: dict[str, float]
) -> None:
    base, *experts = [{n: oracle.to_torch(t) for n, t in model(i).items()} for i in range(1 + count)]
    merged = ties_dist.merge_state_dicts(base, experts, method=name, parameters=parameters)
    assert digest({n: t.numpy() for n, t in merged.items()}) == PINNED[name]


def test_the_inputs_are_the_pinned_ones() -> None:
    assert PINNED["inputs"] == digest({f"{i}.{n}": t for i in range(4) for n, t in model(i).items()})
