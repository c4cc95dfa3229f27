"""Rows of counts: which number is which, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from ties_dist.thresholds import TensorCut, to_bits
from ties_dist.values.counters import Counters, Counts, added

TWO = Counters(operands=3, trimmed=2, own=("conflicts", "above[0]"))


def test_names_say_what_a_row_holds() -> None:
    assert TWO.names == (
        *("nonfinite[0]", "nonfinite[1]", "nonfinite[2]", "nonfinite_out"),
        *("above[0]", "equal[0]", "above[1]", "equal[1]"),
        *("conflicts", "above[0]"),  # a method's own may be called as it likes
        *("passed[0]", "kept[0]", "passed[1]", "kept[1]"),
    )


def test_what_a_kernel_counted_is_read_by_name() -> None:
    # The first expert keeps ties up to element 100 of the tensor; the second threshold is 0, what equals it zeros.
    counted = np.array([1, 0, 2, 9, 30, 5, 40, 60, 7, 8], dtype=np.int64)
    cuts = (TensorCut(to_bits(0.5), 100), TensorCut(0, 1000))
    row = TWO.row(counted, cuts, 50)
    assert TWO.read(row) == Counts(
        nonfinite=(1, 0, 2),
        nonfinite_out=9,
        above=(30, 40),
        equal=(5, 60),
        zero=(),
        passed=(35, 100),
        kept=(35, 40),
        own={"conflicts": 7, "above[0]": 8},
    )
    assert TWO.read(TWO.row(counted, cuts, 100)).passed == (30, 100)  # this slice begins where ties are cut


def test_zeros_are_counted_where_a_rank_follows_from_them() -> None:
    counters = Counters(operands=2, trimmed=2, zeros=True, own=("conflicts",))
    row = counters.row(np.array([0, 0, 0, 10, 1, 5, 20, 2, 6, 7]), (TensorCut(1, 100), TensorCut(1, 0)), 0)
    found = counters.read(row)
    assert (found.above, found.equal, found.zero, found.own) == ((10, 20), (1, 2), (5, 6), {"conflicts": 7})
    assert (found.passed, found.kept, found.zeros(1)) == ((11, 20), (11, 20), 6)
    assert TWO.read(TWO.row(np.zeros(10, np.int64), (), 0) + (0,) * 4).zeros(1) == 0


def test_rows_of_disjoint_elements_add_up() -> None:
    assert added([(1, 2, 3), (10, 20, 30), (100, 0, 0)]) == (111, 22, 33)


def test_a_method_without_a_trim_has_only_its_own() -> None:
    counters = Counters(operands=2, trimmed=0, own=("plain_mean",))
    assert counters.names == ("nonfinite[0]", "nonfinite[1]", "nonfinite_out", "plain_mean")
    row = counters.row(np.array([0, 1, 2, 3]), (), 0)
    assert counters.read(row) == Counts((0, 1), 2, (), (), (), (), (), {"plain_mean": 3})


def test_a_row_of_another_plan_is_never_read() -> None:
    with pytest.raises(AssertionError, match="a row of another plan"):
        TWO.read((1, 2, 3))
