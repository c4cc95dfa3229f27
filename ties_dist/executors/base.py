"""The seam between what the work is and who does it.

Writes are idempotent, sums are not: a partial statistic carries the set of units it folded, and `Ledger` accepts each
unit once, drops what overlaps, and knows what is missing (design.md, "Sums must not double-count").
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from ties_dist.errors import StoppedError
from ties_dist.values.items import MergeResult, MergeTask, WorkItem
from ties_dist.worker.counting import Observation
from ties_dist.worker.merging import MergeStep
from ties_dist.worker.site import Site

Item = TypeVar("Item")
Result = TypeVar("Result")


class Stop(Protocol):
    """What `threading.Event` has of this."""

    def is_set(self) -> bool: ...


def check_stop(stop: Stop) -> None:
    """Raises StoppedError where that is set."""
    if stop.is_set():
        raise StoppedError("stopped; everything finished is kept. Run the same command again to resume.")


class Fold(Protocol):
    """Counts units into an accumulator; run in parallel, each caller with its own accumulator."""

    def __call__(self, step: MergeStep, unit: WorkItem, into: Observation, /) -> None: ...


class Call(Protocol[Item, Result]):  # type: ignore[misc]
    def __call__(self, step: MergeStep, item: Item, /) -> Result: ...


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Where to run, and what of it to take.

    address: `auto` joins a running cluster or starts one on this machine; `local` starts one; else HOST:PORT. workers:
    None for as many as fit. resources, labels: what the nodes of workers must have, as Ray spells it. start_seconds:
    how long no worker at all is waited for.
    """

    address: str = "auto"
    workers: int | None = None
    resources: Mapping[str, float] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    start_seconds: float = 300.0


@dataclass
class Usage:
    """Of the other processes that an executor runs, if it does. peak_rss_bytes: of the largest of them.

    elsewhere: whether they write, so that a write may outlive this process. unanswered: merges that were given out, by
    order; where a worker was lost with one, bytes of it may reach the disk at any time.
    """

    workers: int | None = None
    requested_bytes: int = 0
    peak_rss_bytes: int = 0
    elsewhere: bool = False
    unanswered: dict[int, tuple[MergeTask, ...]] = field(default_factory=dict)


class Executor(Protocol):
    """Who does the work. `step` does it in this process; what runs elsewhere has a step of its own (`Site.open`)."""

    name: str
    usage: Usage

    def start(self, site: Site) -> None:
        """Called once, before anything is asked for. Raises ClusterError, PlanError where the work cannot be done."""
        ...

    def map_unordered(
        self, step: MergeStep, units: Iterable[WorkItem], describe: Callable[[WorkItem], MergeTask]
    ) -> Iterator[MergeResult]:
        """Merge units with a bounded window; results in any order, each after its bytes are written.

        describe: called for a unit when its turn has come.
        """
        ...

    def reduce(self, step: MergeStep, fold: Fold, units: Sequence[WorkItem]) -> Iterator[Observation]:
        """Partials that together cover the units, a few seconds apart, in any order."""
        ...

    def call(
        self, step: MergeStep, function: Call[Item, Result], items: Sequence[Item]
    ) -> Iterator[tuple[Item, Result]]:
        """Small independent calls (per-tensor selections, tie counts), results in any order."""
        ...


class Ledger:
    """What of a reduction has been counted, each unit exactly once."""

    def __init__(self, units: Iterable[WorkItem]) -> None:
        self.missing = set(units)
        self.total = Observation()

    def accept(self, partial: Observation) -> bool:
        """Add a partial, or drop it whole where it repeats or exceeds what is asked for."""
        if not partial.units or not partial.units <= self.missing:
            return False
        self.missing -= partial.units
        self.total.add(partial)
        return True
