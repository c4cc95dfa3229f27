"""What was counted of |delta| in some items: integers, so that parts add up to the same thresholds in any order."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

from ties_dist.thresholds import Histogram
from ties_dist.values.items import WorkItem


@dataclass
class Observation:
    """Statistics of some items, each once. histograms: by expert; nonfinite: (expert, tensor) -> entries."""

    items: set[WorkItem] = field(default_factory=set)
    histograms: dict[int, Histogram] = field(default_factory=dict)
    nonfinite: dict[tuple[int, str], int] = field(default_factory=dict)

    def add(self, other: Observation) -> None:
        """Fold in a partial that shares no item with this one."""
        assert not self.items & other.items
        self.items |= other.items
        for expert, histogram in other.histograms.items():
            if expert in self.histograms:
                self.histograms[expert].add(histogram)
            else:
                self.histograms[expert] = copy.deepcopy(histogram)  # may be a read-only view of a message
        for key, count in other.nonfinite.items():
            self.nonfinite[key] = self.nonfinite.get(key, 0) + count
