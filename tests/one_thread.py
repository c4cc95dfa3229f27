"""A whole executor, to show what one is: one thread, items in any order, sums that come twice or late."""

from __future__ import annotations

import copy
import random
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from ties_dist.executors.base import Item, Stop, Usage, Workplace, check_stop
from ties_dist.executors.faults import working_on


@dataclass
class OneThread:
    """odd: how likely a sum comes late, half of them twice."""

    draw: random.Random = field(default_factory=lambda: random.Random(0))
    stop: Stop = field(default_factory=threading.Event)
    odd: float = 0.2
    name: str = "one thread"
    usage: Usage = field(default_factory=Usage)

    def start(self, workplace: Workplace[object]) -> None: ...

    def map_unordered(self, step: Any, items: Any, describe: Any) -> Iterator[Any]:
        for item in self._shuffled(items):
            task = describe(item)
            with working_on(item):
                result = step.store(task, step.compute(task, step.load(task)))
            yield result
        check_stop(self.stop)

    def reduce(self, step: Any, fold: Any, items: Any) -> Iterator[Any]:
        late = []
        for item in self._shuffled(items):
            with working_on(item):
                fold(step, item, partial := fold.empty())
            if (odd := self.draw.random()) < self.odd:
                late.append(copy.deepcopy(partial))
            if odd > self.odd / 2:
                yield partial
        yield from late
        check_stop(self.stop)

    def call(self, step: Any, function: Any, items: Any, weigh: Any = None) -> Iterator[Any]:
        for item in self._shuffled(items):
            with working_on(item):
                answer = function(step, item)
            yield item, answer
        check_stop(self.stop)

    def _shuffled(self, items: Iterable[Item]) -> Iterator[Item]:
        source, waiting = iter(items), list[Item]()
        while (waiting := waiting + list(islice(source, 5 - len(waiting)))) and not self.stop.is_set():
            yield waiting.pop(self.draw.randrange(len(waiting)))
