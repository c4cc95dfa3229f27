"""The store of counts: an entry that is not what was written is counted again, whatever still adds up."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr

from ties_dist.statistics.counts import StatisticsStore
from ties_dist.thresholds import Histogram, Threshold, Window

BUCKET = 0x3F80
"""Of the magnitudes from 1 to 1.0078."""


def kept(folder: Path) -> StatisticsStore:
    """A store of one entry, "it": ten magnitudes, three of them 1.0 and two the next number."""
    histogram = Histogram(Window(BUCKET, 1))
    histogram.coarse[[0, BUCKET]] = 5, 5
    histogram.fine[:2] = 3, 2
    store = StatisticsStore(folder)
    store.save("it", histogram)
    return store


def test_what_was_counted_is_there_again(tmp_path: Path) -> None:
    found = kept(tmp_path).load("it", 10)
    assert found is not None
    assert found.threshold(2) == Threshold(bits=(BUCKET << 16) + 1, above=0, equal=2)
    assert found.threshold(3) == Threshold(bits=BUCKET << 16, above=2, equal=3)


@pytest.mark.parametrize("array", ["coarse", "fine", "buckets"])
def test_an_entry_that_lost_a_chunk_is_counted_again(array: str, tmp_path: Path) -> None:
    store = kept(tmp_path)
    shutil.rmtree(tmp_path / "it" / array / "c")
    assert store.load("it", 10) is None


def test_an_entry_whose_numbers_changed_places_is_counted_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Sums do not tell: the threshold of rank 3 would be the next number."""
    store = kept(tmp_path)
    fine = zarr.open_array(tmp_path / "it" / "fine", mode="r+")
    fine[0, :2] = np.array([2, 3])
    assert store.load("it", 10) is None
    assert "statistics cache entry it does not add up: counting again" in caplog.text
