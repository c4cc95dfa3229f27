"""The stratified sample: every tensor stands for its own size, however many or few slices it got."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ties_dist.planning.plan import MergePlan
from ties_dist.planning.sample import SAMPLE_ELEMENTS, SAMPLE_SLICES, sample_slices


def plan_of(sizes: list[int]) -> MergePlan:
    counted = [SimpleNamespace(source=f"t{i:06d}", numel=n) for i, n in enumerate(sizes)]
    return cast(MergePlan, SimpleNamespace(counted=counted, elements=sum(sizes)))


@given(st.lists(st.integers(0, 50_000_000), max_size=40))
def test_each_tensor_is_weighted_with_its_size(sizes: list[int]) -> None:
    slices, weights = sample_slices(plan_of(sizes))
    stands_for: dict[str, float] = {}
    for (name, start, stop), weight in zip(slices, weights, strict=True):
        assert 0 <= start < stop <= sizes[int(name[1:])]
        assert stop - start <= SAMPLE_ELEMENTS
        stands_for[name] = stands_for.get(name, 0.0) + (stop - start) * weight
    assert stands_for == pytest.approx({f"t{i:06d}": n for i, n in enumerate(sizes) if n})
    assert len(slices) <= SAMPLE_SLICES + len(sizes)


def test_a_few_large_tensors_among_many_small_ones_get_their_share() -> None:
    slices, _ = sample_slices(plan_of([384] * 100 + [50_000_000] * 3 + [384] * 100))
    assert len([s for s in slices if s[0] in ("t000100", "t000101", "t000102")]) > SAMPLE_SLICES / 2


def test_a_hundred_thousand_tensors_do_not_make_a_hundred_thousand_slices() -> None:
    assert len(sample_slices(plan_of([4096] * 100_000))[0]) <= 2 * SAMPLE_SLICES
