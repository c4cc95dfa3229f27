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
from typing import Any, cast

from ties_dist.errors import StoppedError, TiesDistError
from ties_dist.executors.base import Call, Executor, Fold, Item, Result, Usage
from ties_dist.values.items import MergeResult, MergeTask, WorkItem
from ties_dist.worker.counting import Observation
from ties_dist.worker.merging import Loaded, MergeStep
from ties_dist.worker.site import Site


@dataclass(eq=False)
class Request:
    """What one merge wants done. answers: its results, an error, or None at the end."""

    label: str
    step: MergeStep
    tasks: Iterator[MergeTask]
    answers: queue.SimpleQueue[MergeResult | BaseException | None] = field(default_factory=queue.SimpleQueue)
    together: list[Request] | None = None

    def draw(self) -> MergeTask | None:
        return next(self.tasks, None)


@dataclass(eq=False)
class Meeting:
    """Where merges wait for each other. running: how many have not ended."""

    running: int
    met: bool = False
    """Whether any merge has come to where the others are waited for."""
    _waiting: list[Request] = field(default_factory=list)
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def join(self, request: Request) -> list[Request]:
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

    def start(self, site: Site) -> None:
        """The inner executor works in this process."""

    def map_unordered(
        self, step: MergeStep, units: Iterable[WorkItem], describe: Callable[[WorkItem], MergeTask]
    ) -> Iterator[MergeResult]:
        own = Request(self.label, step, map(describe, units))
        together = self.meeting.join(own)
        if together[0] is own:
            yield from self._lead(own, together)
            return
        while (answer := own.answers.get()) is not None:
            if isinstance(answer, BaseException):
                raise answer
            yield answer

    def _lead(self, own: Request, together: Sequence[Request]) -> Iterator[MergeResult]:
        others = [r for r in together if r is not own]
        ending: BaseException | None = StoppedError("another merge of this sweep failed; run the same command again.")
        try:
            inner = cast(Any, self.inner)  # whose units are groups here, which nobody needs to describe
            results = inner.map_unordered(GroupStep(), _groups(together), lambda group: group)
            for group in cast("Iterator[list[tuple[Request, MergeResult]]]", results):
                for request, result in group:
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

    def reduce(self, step: MergeStep, fold: Fold, units: Sequence[WorkItem]) -> Iterator[Observation]:
        return self.inner.reduce(step, fold, units)

    def call(
        self, step: MergeStep, function: Call[Item, Result], items: Sequence[Item]
    ) -> Iterator[tuple[Item, Result]]:
        return self.inner.call(step, function, items)


Group = list[tuple[Request, MergeTask]]


def _groups(together: Sequence[Request]) -> Iterator[Group]:
    """Tasks of the same unit, of all who want it, in file order."""
    heads = {request: request.draw() for request in together}
    while wanted := [task.item for task in heads.values() if task is not None]:
        unit = min(wanted)
        group = [(r, task) for r, task in heads.items() if task is not None and task.item == unit]
        yield group
        for request, _ in group:
            heads[request] = request.draw()


class GroupStep:
    """The steps of a unit for several merges: loaded once, computed and stored for each."""

    def load(self, group: Group) -> Loaded:
        request, task = group[0]
        return request.step.load(task)

    def compute(self, group: Group, loaded: Loaded) -> list[Any]:
        computed = [request.step.merge(task, loaded) for request, task in group]
        loaded.release()
        return computed

    def store(self, group: Group, computed: Sequence[Any]) -> list[tuple[Request, MergeResult]]:
        stored = []
        for (request, task), each in zip(group, computed, strict=True):
            try:
                stored.append((request, request.step.store(task, each)))
            except TiesDistError as error:
                raise type(error)(f"{request.label}: {error}") from error
        return stored
