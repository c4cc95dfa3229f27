"""How the blocks of a parameter are asked for."""

from __future__ import annotations

from ties_dist.values.stretches import BLOCK_ELEMENTS, Stretch, stretches


def test_stretches_cover_what_is_not_known() -> None:
    assert list(stretches("w", 0, ())) == []
    assert list(stretches("w", 1, ())) == [Stretch("w", 0, 1)]
    assert list(stretches("w", BLOCK_ELEMENTS, ())) == [Stretch("w", 0, 1)]
    assert list(stretches("w", BLOCK_ELEMENTS + 1, ())) == [Stretch("w", 0, 2)]
    assert list(stretches("w", 6 * BLOCK_ELEMENTS, {0, 3})) == [Stretch("w", 1, 3), Stretch("w", 4, 6)]
    assert list(stretches("w", 2 * BLOCK_ELEMENTS, {0, 1})) == []


def test_a_stretch_is_no_longer_than_a_unit() -> None:
    found = list(stretches("w", 40 * BLOCK_ELEMENTS, {20}))
    assert found == [Stretch("w", 0, 16), Stretch("w", 16, 20), Stretch("w", 21, 37), Stretch("w", 37, 40)]
