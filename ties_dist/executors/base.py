"""The seam between what the work is and who does it: an executor knows a step and items, and nothing of merging.

Items are small values that travel. What may wait for a disk (load, store) is apart from what computes, so that an
executor can read ahead and write behind. Writes are idempotent, sums are not: what is folded says of which items it is
(`ledger`), and may then be lost, late or repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar

from ties_dist.errors import StoppedError
from ties_dist.values.items import MergeTask, Portion, Seat
from ties_dist.values.machine import Machine

if TYPE_CHECKING:
    from ties_dist.compiler.cuda import Gpus

Item = TypeVar("Item")
Task = TypeVar("Task")
Loaded = TypeVar("Loaded")
Computed = TypeVar("Computed")
Result = TypeVar("Result")
AnyStep = TypeVar("AnyStep")
Piece = TypeVar("Piece", bound="Weighed")
Sum = TypeVar("Sum", bound="Partial")

_Task = TypeVar("_Task", contravariant=True)
_Item = TypeVar("_Item", contravariant=True)
_Step = TypeVar("_Step", contravariant=True)
_Bench = TypeVar("_Bench", covariant=True)
_Result = TypeVar("_Result", covariant=True)


class Stop(Protocol):
    """What `threading.Event` has of this."""

    def is_set(self) -> bool: ...


def check_stop(stop: Stop) -> None:
    """Raises StoppedError where that is set."""
    if stop.is_set():
        raise StoppedError("stopped; everything finished is kept. Run the same command again to resume.")


class Weighed(Protocol):
    """An item that tells how much work it is. Hashable, and equal to itself after a journey."""

    @property
    def portion(self) -> Portion: ...


def alike(item: object) -> Portion:
    """Of items that are small, and as much work as each other."""
    return Portion(1)


class Step(Protocol[_Task, Loaded, Computed, _Result]):
    """What is done with each task, in three steps; from any thread."""

    def load(self, task: _Task, /) -> Loaded: ...

    def compute(self, task: _Task, loaded: Loaded, /) -> Computed: ...

    def store(self, task: _Task, computed: Computed, /) -> _Result:
        """Its bytes are written when this returns, but need not be durable."""
        ...


class Partial(Protocol):
    """A sum over some items, each once."""

    @property
    def items(self) -> Set[object]: ...

    def add(self, other: Self, /) -> None:
        """Fold in a partial that shares no item with this one."""
        ...


class Fold(Protocol[_Step, _Item, Sum]):
    """Adds items up; run in parallel, each caller with a partial of its own."""

    def empty(self) -> Sum: ...

    def __call__(self, step: _Step, item: _Item, into: Sum, /) -> None: ...


class Call(Protocol[_Step, _Item, _Result]):
    """Something small that is asked of each item."""

    def __call__(self, step: _Step, item: _Item, /) -> _Result: ...


class Bench(Step[_Task, Loaded, Computed, Result], Protocol[_Task, Loaded, Computed, Result]):
    """A step as a worker process has it."""

    @property
    def requested_bytes(self) -> int:
        """Read since it was opened."""
        ...

    def sync(self, results: Sequence[Result], /) -> None:
        """Make what was stored durable: after that the driver is told."""
        ...

    def warm_up(self) -> None:
        """Get ready, on a thread of its own, while the first orders come in."""
        ...


class Workplace(Protocol[_Bench]):
    """All that a process needs to work on one job, wherever it runs: small enough to travel, the same for everyone.

    threads, projected_bytes: of one worker process, and what memory it is projected to need.
    """

    @property
    def threads(self) -> int: ...

    @property
    def projected_bytes(self) -> int: ...

    def away(self) -> Self:
        """As it travels to other machines, with what they are to compare theirs with. Called once, by the driver."""
        ...

    def rounds(self, nodes: int) -> Sequence[Call[Any, Seat, str | None]]:
        """What so many nodes are asked together before they work, one after another: what each found wrong, or None.

        Called once, by the driver; where it is empty, nothing is proven.
        """
        ...

    def inspect(self, *, gpus: int = 0) -> Machine:
        """This machine, and all that speaks against it, before anything is opened here."""
        ...

    def open(self, gpus: Gpus | None = None) -> _Bench:
        """Raises TiesDistError, OSError where that cannot be done here."""
        ...


@dataclass
class Usage:
    """Of the other processes that an executor runs, if it does. peak_rss_bytes: of the largest of them.

    elsewhere: whether they write, so that a write may outlive this process. unanswered: merges that were given out, by
    order; where a worker was lost with one, bytes of it may reach the disk at any time. nodes: that had a worker;
    proven: that wrote into one file together, and read it right.
    """

    workers: int | None = None
    requested_bytes: int = 0
    peak_rss_bytes: int = 0
    elsewhere: bool = False
    unanswered: dict[int, tuple[MergeTask, ...]] = field(default_factory=dict)
    nodes: set[str] = field(default_factory=set)
    proven: frozenset[str] = frozenset()

    @property
    def is_proven(self) -> bool:
        """Whether all nodes that had a worker have been seen to keep each other's writes."""
        return bool(self.proven) and self.nodes <= self.proven


class Executor(Protocol):
    """Who does the work. `step` does it in this process; what runs elsewhere opens one of its own (`Workplace`)."""

    name: str
    usage: Usage

    def start(self, workplace: Workplace[object], /) -> None:
        """Called once, before anything is asked for. Raises ClusterError, PlanError where the work cannot be done."""
        ...

    def map_unordered(
        self,
        step: Step[Task, Loaded, Computed, Result],
        items: Iterable[Piece],
        describe: Callable[[Piece], Task],
        /,
    ) -> Iterator[Result]:
        """All three steps of each item, with a bounded window; results in any order, each after its bytes are written.

        describe: called for an item when its turn has come.
        """
        ...

    def reduce(self, step: AnyStep, fold: Fold[AnyStep, Piece, Sum], items: Sequence[Piece], /) -> Iterator[Sum]:
        """Partials that together cover the items, a few seconds apart, in any order.

        Some may come twice, late or never: whoever adds them up has a `Ledger`, and asks for what it misses.
        """
        ...

    def call(
        self,
        step: AnyStep,
        function: Call[AnyStep, Item, Result],
        items: Sequence[Item],
        weigh: Callable[[Item], Portion] = alike,
        /,
    ) -> Iterator[tuple[Item, Result]]:
        """Small independent calls (per-tensor selections, tie counts), results in any order."""
        ...
