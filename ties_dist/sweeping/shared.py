"""Several merges of the same inputs over one executor: every unit is read once and merged for each of them.

Each merge is an ordinary run of the engine on a thread of its own. They meet wherever they hand out units: when all
that are still running have, one of them leads, draws the tasks of all, and hands each its results. So a sweep has no
engine, journal or publishing of its own, and each of its outputs is what its own merge would be.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic

from ties_dist.errors import StoppedError, TiesDistError
from ties_dist.executors.base import (
    AnyStep,
    Call,
    Computed,
    Executor,
    Fold,
    Item,
    Loaded,
    Piece,
    Result,
    Step,
    Sum,
    Task,
    Usage,
    Workplace,
    alike,
)
from ties_dist.values.items import Portion, WorkItem


@dataclass(eq=False)
class Request(Generic[Piece, Task, Loaded, Computed, Result]):
    """What one merge wants done. answers: its results, an error, or None at the end."""

    label: str
    step: Step[Task, Loaded, Computed, Result]
    items: Iterator[Piece]
    describe: Callable[[Piece], Task]
    answers: queue.SimpleQueue[Result | BaseException | None] = field(default_factory=queue.SimpleQueue)
    together: Sequence[AnyRequest] | None = None

    def draw(self) -> Piece | None:
        return next(self.items, None)


AnyRequest = Request[Any, Any, Any, Any, Any]
"""Those that meet have steps of one kind: what one of them has loaded the others can compute with."""


@dataclass(eq=False)
class Meeting:
    """Where merges wait for each other. running: how many have not ended."""

    running: int
    met: bool = False
    """Whether any merge has come to where the others are waited for."""
    _waiting: list[AnyRequest] = field(default_factory=list)
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def join(self, request: AnyRequest) -> Sequence[AnyRequest]:
        """Wait until every running merge is here. Returns all requests; the first one's merge leads."""
        with self._changed:
            self._waiting.append(request)
            self.met = True
            self._gather()
            while request.together is None:
                self._changed.wait()
            return request.together

    def leave(self) -> None:
        """A merge has ended, in whatever way: nobody waits for it any more."""
        with self._changed:
            self.running -= 1
            self._gather()

    def _gather(self) -> None:
        if self._waiting and len(self._waiting) >= self.running:
            together, self._waiting = self._waiting, []
            for request in together:
                request.together = together
        self._changed.notify_all()

    def wait_for(self, running: int) -> None:
        """Until a merge has come here, or one of `running` has ended."""
        with self._changed:
            while not self.met and self.running == running:
                self._changed.wait()


@dataclass
class SharedExecutor:
    """The executor of one of several merges that meet."""

    inner: Executor
    meeting: Meeting
    label: str
    """Of this merge, in the messages of what goes wrong with it."""
    name: str = "local"
    usage: Usage = field(default_factory=Usage)

    def start(self, workplace: Workplace[object]) -> None:
        """The inner executor works in this process."""

    def map_unordered(
        self, step: Step[Task, Loaded, Computed, Result], items: Iterable[Piece], describe: Callable[[Piece], Task]
    ) -> Iterator[Result]:
        own = Request(self.label, step, iter(items), describe)
        together = self.meeting.join(own)
        if together[0] is own:
            yield from self._lead(own, together)
            return
        while (answer := own.answers.get()) is not None:
            if isinstance(answer, BaseException):
                raise answer
            yield answer

    def _lead(
        self, own: Request[Piece, Task, Loaded, Computed, Result], together: Sequence[AnyRequest]
    ) -> Iterator[Result]:
        others = [r for r in together if r is not own]
        ending: BaseException | None = StoppedError("another merge of this sweep failed; run the same command again.")
        try:
            for stored in self.inner.map_unordered(GroupStep(), groups(together), lambda group: group):
                for request, result in stored:
                    if request is own:
                        yield result
                    else:
                        request.answers.put(result)
            ending = None
        except Exception as error:
            ending = error
            raise
        finally:
            for request in others:
                request.answers.put(ending)

    def reduce(self, step: AnyStep, fold: Fold[AnyStep, Piece, Sum], items: Sequence[Piece]) -> Iterator[Sum]:
        return self.inner.reduce(step, fold, items)

    def call(
        self,
        step: AnyStep,
        function: Call[AnyStep, Item, Result],
        items: Sequence[Item],
        weigh: Callable[[Item], Portion] = alike,
    ) -> Iterator[tuple[Item, Result]]:
        return self.inner.call(step, function, items, weigh)


@dataclass(frozen=True)
class Group:
    """The tasks of one item, of all who want it."""

    item: WorkItem
    tasks: Sequence[tuple[AnyRequest, Any]]

    def __str__(self) -> str:
        return str(self.item)

    @property
    def portion(self) -> Portion:
        return self.item.portion


def groups(together: Sequence[AnyRequest]) -> Iterator[Group]:
    """In file order; tasks are described when their turn has come."""
    heads = {request: request.draw() for request in together}
    while wanted := [item for item in heads.values() if item is not None]:
        item = min(wanted)
        takers = [request for request, head in heads.items() if head == item]
        yield Group(item, [(request, request.describe(item)) for request in takers])
        for request in takers:
            heads[request] = request.draw()


class GroupStep:
    """The steps of an item for several merges: loaded once, computed and stored for each."""

    def load(self, group: Group) -> Any:
        request, task = group.tasks[0]
        loaded = request.step.load(task)
        loaded.holders = len(group.tasks)
        return loaded

    def compute(self, group: Group, loaded: Any) -> list[Any]:
        return [request.step.compute(task, loaded) for request, task in group.tasks]

    def store(self, group: Group, computed: Sequence[Any]) -> list[tuple[AnyRequest, Any]]:
        stored = []
        for (request, task), each in zip(group.tasks, computed, strict=True):
            try:
                stored.append((request, request.step.store(task, each)))
            except TiesDistError as error:
                raise type(error)(f"{request.label}: {error}") from error
        return stored
