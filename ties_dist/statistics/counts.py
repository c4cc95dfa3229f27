"""The store of density-free statistics: what a scan counted, kept for the next density, lambda or recipe.

One Zarr group per (base, expert, counted tensors), few large chunks: the coarse histogram, and every fine bucket ever
counted, and a digest of both, since a lost chunk reads as zeros. Keyed by input identities that cost no read of the
data, so an entry may be stale: it is checked for inner agreement here, and every merge proves the thresholds it takes
from it by counting.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ties_dist.storage.digests import digest
from ties_dist.thresholds import (
    COARSE_BUCKETS,
    FINE_BUCKETS,
    Histogram,
    Threshold,
    Window,
    coarse_bucket,
    fine_threshold,
)
from ties_dist.values.inputs import Input

logger = logging.getLogger(__name__)

VERSION = 2
"""1 had no digest."""


@dataclass
class Counted:
    """What is known of one expert. coarse: (32768,) int64. fine: bucket -> (65536,) int64."""

    coarse: np.ndarray
    fine: dict[int, np.ndarray]

    @property
    def zeros(self) -> int | None:
        """How many magnitudes are zero; None where that was not counted."""
        return int(self.fine[0][0]) if 0 in self.fine else None

    def threshold(self, rank: int) -> Threshold | None:
        bucket, higher = coarse_bucket(self.coarse, rank)
        return fine_threshold(self.fine[bucket], bucket, higher, rank) if bucket in self.fine else None

    def window(self, rank: int) -> Window:
        """The one bucket a further read has to count."""
        return Window(coarse_bucket(self.coarse, rank)[0], 1)


@dataclass
class StatisticsStore:
    folder: Path

    def key(self, base: Input, expert: Input, sizes: Mapping[str, int]) -> str:
        """Names what an expert's counts follow from. sizes: elements of each counted tensor, in canonical order."""
        return digest(repr((VERSION, base.identity, expert.identity, list(sizes.items()))).encode())

    def load(self, key: str, elements: int) -> Counted | None:
        """A whole and consistent entry, or None."""
        if not (self.folder / key).is_dir():
            return None
        import zarr  # 0.3 s: only where there is something to read

        try:
            group = zarr.open_group(self.folder / key, mode="r")
            coarse = np.asarray(group["coarse"][:])  # type: ignore[index]
            fine = np.asarray(group["fine"][:])  # type: ignore[index]
            numbers = np.asarray(group["buckets"][:])  # type: ignore[index]
            intact = group.attrs["digest"] == _content(coarse, fine, numbers)
        except Exception as error:  # whatever is wrong with a cache entry, the answer is to count again
            logger.warning("statistics cache entry %s is unreadable (%s): counting again", key, error)
            return None
        buckets = [int(b) for b in numbers]
        known = Counted(coarse, dict(zip(buckets, fine, strict=False)))
        shaped = coarse.shape == (COARSE_BUCKETS,) and fine.shape == (len(buckets), FINE_BUCKETS)
        placed = all(0 <= b < COARSE_BUCKETS for b in buckets)
        if (
            not intact
            or not shaped
            or not placed
            or coarse.sum() != elements
            or any(f.sum() != coarse[b] for b, f in known.fine.items())
        ):
            logger.warning("statistics cache entry %s does not add up: counting again", key)
            return None
        return known

    def save(self, key: str, histogram: Histogram) -> None:
        """Add a histogram's buckets to an entry. A cache that cannot be written is said, never an error."""
        import zarr

        fine = {
            histogram.window.first + i: histogram.fine[i * FINE_BUCKETS : (i + 1) * FINE_BUCKETS]
            for i in range(histogram.window.buckets)
        }
        if (known := self.load(key, histogram.total)) is not None:
            fine = {**known.fine, **fine}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            fresh = Path(tempfile.mkdtemp(prefix=".new-", dir=self.folder))
            buckets = np.array(sorted(fine), dtype=np.int64)
            rows = np.stack([fine[b] for b in sorted(fine)]) if fine else np.zeros((0, FINE_BUCKETS), np.int64)
            group = zarr.create_group(fresh, attributes={"digest": _content(histogram.coarse, rows, buckets)})
            group.create_array("coarse", data=histogram.coarse)
            group.create_array("buckets", data=buckets)
            group.create_array("fine", data=rows, chunks=(max(1, len(rows)), FINE_BUCKETS))
            old = fresh.with_name(fresh.name + ".old")
            if (self.folder / key).exists():
                os.rename(self.folder / key, old)
            os.rename(fresh, self.folder / key)
            shutil.rmtree(old, ignore_errors=True)
        except OSError as error:
            logger.warning("cannot keep statistics in %s (%s): the next merge counts again", self.folder, error)

    def discard(self, key: str) -> None:
        shutil.rmtree(self.folder / key, ignore_errors=True)


def _content(*arrays: np.ndarray) -> str:
    return digest(b"".join(np.ascontiguousarray(each).tobytes() for each in arrays))
