"""Methods that take sums, by hand on a few numbers."""

from __future__ import annotations

import math

import pytest
import torch

import ties_dist
from ties_dist.methods.model_stock import ModelStock
from ties_dist.methods.slerp import Slerp

A, B = [3.0, 0.0], [0.0, 4.0]


def slerp(t: float, *models: list[float]) -> list[float]:
    base, other = ({"w": torch.tensor(model)} for model in models)
    return ties_dist.merge_state_dicts(base, [other], method="slerp", parameters={"t": t})["w"].tolist()  # type: ignore[no-any-return]


def stock(*models: list[float]) -> list[float]:
    base, *others = ({"w": torch.tensor(model)} for model in models)
    return ties_dist.merge_state_dicts(base, others, method="model_stock")["w"].tolist()  # type: ignore[no-any-return]


def test_slerp_goes_along_the_arc() -> None:
    """At a right angle: sin(60) of the base, sin(30) of the other, their lengths as they are."""
    assert slerp(1 / 3, A, B) == pytest.approx([3 * math.sqrt(3) / 2, 4 / 2])
    assert (slerp(0.0, A, B), slerp(1.0, A, B)) == (A, B)


def test_slerp_is_linear_where_the_two_point_the_same_way_or_the_opposite() -> None:
    assert slerp(0.25, [1.0, 2.0], [2.0, 4.0]) == [1.25, 2.5]
    assert slerp(0.25, [1.0, 2.0], [-1.0, -2.0]) == [0.5, 1.0]


def test_slerp_takes_a_vector_of_no_length_for_one_at_a_right_angle() -> None:
    assert slerp(0.5, [0.0, 0.0], [0.0, 4.0]) == pytest.approx([0.0, 4 / math.sqrt(2)])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_none_make_scalars_that_are_none(bad: float) -> None:
    """The merge says where they come from."""
    Slerp().scalars({"t": 0.5}, [{}], [bad, bad, 1.0])
    ModelStock().scalars({}, [{}, {}], [bad, bad, 1.0])


def test_model_stock_goes_to_the_mean_by_the_cosine() -> None:
    """Deltas (1, 0) and (1, 1): cos 45 degrees, t = 2 cos / (1 + cos)."""
    t = 2 * math.sqrt(0.5) / (1 + math.sqrt(0.5))
    assert stock([1.0, 1.0], [2.0, 1.0], [2.0, 2.0]) == pytest.approx([1 + t, 1 + t / 2])


def test_model_stock_of_deltas_at_right_angles_or_opposed_is_the_base() -> None:
    assert stock([1.0, 1.0], [2.0, 1.0], [1.0, 2.0]) == [1.0, 1.0]
    assert stock([1.0, 1.0], [2.0, 1.0], [0.0, 1.0]) == [1.0, 1.0]


def test_model_stock_of_three_takes_the_mean_cosine() -> None:
    """Of pairs (1, 0), (1, 0), (0, 1) the cosines are 1, 0, 0: t = 3 (1/3) / (1 + 2/3)."""
    assert stock([0.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]) == pytest.approx([0.6 * 2 / 3, 0.6 / 3])
