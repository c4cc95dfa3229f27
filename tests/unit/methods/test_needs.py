"""What a method says in short, as stages; and stages that are none."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ties_dist.methods.dare import DareLinear
from ties_dist.methods.fisher import Fisher
from ties_dist.methods.linear import Linear
from ties_dist.methods.model_stock import ModelStock
from ties_dist.methods.needs import Ask, DataStatistics, MajoritySign, Needs, Stage, Sums, TrimRule, gram
from ties_dist.methods.regmean import RegMean
from ties_dist.methods.slerp import Slerp
from ties_dist.methods.ties import Ties

RULE = TrimRule(scope="model", tie_policy="keep_all")
RANKS = Stage(of="magnitudes", asks=(RULE,))


@pytest.mark.parametrize("method", [Linear(), DareLinear()], ids=lambda m: m.name)
def test_a_method_that_asks_for_nothing_is_one_function(method: Linear) -> None:
    assert method.needs == Needs() == Needs((Stage(of="merge"),))
    assert (method.needs.trim, method.needs.majority, method.needs.statistics) == (None, None, None)


def test_ties_ranks_magnitudes_and_elects_while_it_merges() -> None:
    assert Ties().needs.stages == (
        Stage(of="magnitudes", asks=(RULE,)),
        Stage(of="merge", asks=(MajoritySign(signs="sign_sum", dependent="cancellations"),)),
    )
    assert Ties(zero_sign="drop").needs == Needs((Stage(of="magnitudes", asks=(RULE,)), Stage(of="merge")))


def test_statistics_of_data_are_asked_for_by_the_merge() -> None:
    assert Fisher().needs == Needs((Stage(of="merge", asks=(DataStatistics(kind="fisher"),)),))
    assert (Fisher().needs.statistics, RegMean().needs.statistics) == ("fisher", "gram")


def test_sums_are_asked_of_factors() -> None:
    assert Slerp().needs.stages == (Stage(of="factors", asks=(Sums(),)), Stage(of="merge"))
    assert (Slerp().products(1), ModelStock().products(2)) == (((0, 0), (0, 1), (1, 1)),) * 2
    assert DareLinear().needs.sums is None and DareLinear(rescale=False, rescale_by="l1").needs.sums is None
    assert DareLinear(rescale_by="l1").needs.sums == Sums()
    assert gram(3) == ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2))


def merges(*asks: Ask) -> Stage:
    return Stage(of="merge", asks=asks)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Needs(()), "the last stage of a method merges, and no other"),
        (lambda: Needs((merges(), merges())), "the last stage of a method merges, and no other"),
        (lambda: Needs((merges(), Stage(of="magnitudes"))), "the last stage of a method merges, and no other"),
        (lambda: Needs((merges(RULE),)), "a TrimRule is asked of `magnitudes`"),
        (lambda: Needs((Stage(of="magnitudes", asks=(MajoritySign(),)), merges())), "everything else of `merge`"),
        (lambda: Needs((merges(Sums()),)), "Sums of `factors`"),
        (lambda: Needs((RANKS, Stage(of="factors", asks=(Sums(),)), merges())), "sums of what a trim keeps"),
    ],
)
def test_what_no_engine_could_do_is_no_need(make: Callable[[], Needs], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()
