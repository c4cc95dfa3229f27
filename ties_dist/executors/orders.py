"""What travels between a driver and its workers, and what a worker does with it.

Only descriptions of items go out, and only small statistics come back; both are plain values that any transport can
carry, of types that only the pass knows that asked. Each worker has an executor of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

from ties_dist.errors import StoppedError
from ties_dist.executors.base import Bench, Call, Executor, Fold, alike
from ties_dist.executors.faults import as_told
from ties_dist.values.items import Portion
from ties_dist.values.machine import peak_rss_bytes

Kind = Literal["merge", "fold", "call"]
AnyBench = Bench[Any, Any, Any, Any]
Done = tuple[Sequence[int], Any]
"""Places of items in their order, and what came of them."""


class Work(Protocol):
    """What an order asks for."""

    kind: ClassVar[Kind]

    def do(self, bench: AnyBench, local: Executor, items: Sequence[Any]) -> Iterator[Done]: ...

    def answer(self, bench: AnyBench, values: Sequence[Any]) -> Sequence[Any]:
        """The values that `do` gave, as the driver is to have them; nothing of them can be lost any more."""
        ...


@dataclass(frozen=True)
class Merge:
    """The three steps of each task."""

    kind: ClassVar[Kind] = "merge"

    def do(self, bench: AnyBench, local: Executor, items: Sequence[Any]) -> Iterator[Done]:
        placed = [Placed(place, task) for place, task in enumerate(items)]
        for place, result in local.map_unordered(PlacedStep(bench), placed, lambda each: each):
            yield (place,), result

    def answer(self, bench: AnyBench, values: Sequence[Any]) -> Sequence[Any]:
        bench.sync(values)
        return values


@dataclass(frozen=True)
class Placed:
    """A task that tells its place in the order, and so which one a result is of."""

    place: int
    task: Any

    @property
    def portion(self) -> Portion:
        return alike(self)


@dataclass(frozen=True)
class PlacedStep:
    """The same step for such tasks."""

    step: AnyBench

    def load(self, placed: Placed) -> Any:
        return self.step.load(placed.task)

    def compute(self, placed: Placed, loaded: Any) -> Any:
        return self.step.compute(placed.task, loaded)

    def store(self, placed: Placed, computed: Any) -> tuple[int, Any]:
        return placed.place, self.step.store(placed.task, computed)


@dataclass(frozen=True)
class Add:
    """Items folded into one partial: a message an order, whatever the worker's threads."""

    fold: Fold[Any, Any, Any]
    kind: ClassVar[Kind] = "fold"

    def do(self, bench: AnyBench, local: Executor, items: Sequence[Any]) -> Iterator[Done]:
        places = {item: place for place, item in enumerate(items)}
        for partial in local.reduce(bench, self.fold, items):
            yield [places[item] for item in partial.items], partial

    def answer(self, bench: AnyBench, values: Sequence[Any]) -> Sequence[Any]:
        total = self.fold.empty()
        for partial in values:
            total.add(partial)
        return [total]


@dataclass(frozen=True)
class Ask:
    """A call of each item."""

    function: Call[Any, Any, Any]
    kind: ClassVar[Kind] = "call"

    def do(self, bench: AnyBench, local: Executor, items: Sequence[Any]) -> Iterator[Done]:
        def ask(bench: AnyBench, place: int) -> Any:
            return self.function(bench, items[place])

        for place, value in local.call(bench, ask, range(len(items))):
            yield (place,), value

    def answer(self, bench: AnyBench, values: Sequence[Any]) -> Sequence[Any]:
        return values


@dataclass(frozen=True, kw_only=True)
class Order:
    """Items for one worker, and what it is to do with them."""

    number: int
    work: Work
    items: Sequence[Any]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What became of an order. done: places of its items that are done. values: of each of them, or a fold's partial.

    error: of one of the others; without one they were not begun. requested_bytes, peak_rss_bytes: of the worker since
    its start.
    """

    done: Sequence[int] = ()
    values: Sequence[Any] = ()
    error: Exception | None = None
    requested_bytes: int = 0
    peak_rss_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Joined:
    """A worker is ready, or would be if there were no problems with its machine."""

    worker: str
    node: str
    problems: tuple[str, ...] = ()
    facts: str = ""


@dataclass(frozen=True, kw_only=True)
class Answered:
    worker: str
    number: int
    answer: Answer


@dataclass(frozen=True, kw_only=True)
class Lost:
    """A worker is gone. blameless: with its whole node, or taken away: not for what it was doing."""

    worker: str
    reason: str
    blameless: bool = False


Event = Joined | Answered | Lost


def perform(order: Order, bench: AnyBench, local: Executor) -> Answer:
    """What a worker does with an order; bytes of merged items are durable when it answers.

    Where `local` is stopped, what is done by then is answered.
    """
    done, values = list[int](), list[Any]()
    error: Exception | None = None
    try:
        for places, value in order.work.do(bench, local, order.items):
            done += places
            values.append(value)
    except StoppedError:
        pass
    except Exception as raised:
        error = as_told(raised)
    answered: Sequence[Any] = ()
    if done:
        try:
            answered = order.work.answer(bench, values)
        except Exception as raised:
            done, error = [], as_told(raised)
    return Answer(
        done=done,
        values=answered,
        error=error,
        requested_bytes=bench.requested_bytes,
        peak_rss_bytes=peak_rss_bytes(),
    )
