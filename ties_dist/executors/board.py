"""What of one pass is still to be handed out, and to whom: pure bookkeeping, without a clock, workers or messages.

Items of one group (a shard) go to one worker while there are groups enough, in file order: its reads and writes stay
sequential, and two machines rarely meet in one file. A worker without a group takes the heaviest. What failed goes out
alone and to another node; what failed twice, to a worker that does nothing else meanwhile: if that dies, too, it is
the item's fault and not a neighbour's.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Sequence
from typing import Generic

from ties_dist.executors.base import Item
from ties_dist.executors.orders import Work
from ties_dist.values.items import Portion

SUSPICIOUS = 2
"""Failures after which an item gets a worker for itself."""


class Board:
    """Items by index. weights: bytes of each; groups: what it belongs to, in the order in which it is read."""

    def __init__(self, weights: Sequence[int], groups: Sequence[str]) -> None:
        self.weights = weights
        self.groups = groups
        self.unfinished = set(range(len(weights)))
        self.attempts: Counter[int] = Counter()
        self.waiting_bytes = sum(weights)
        self._waiting: dict[str, deque[int]] = {}
        self._left: Counter[str] = Counter()
        for i, group in enumerate(groups):
            self._waiting.setdefault(group, deque()).append(i)
            self._left[group] += weights[i]
        self._failed: list[int] = []
        self._avoid: defaultdict[int, set[str]] = defaultdict(set)
        self._group_of: dict[str, str] = {}
        self._crowd: Counter[str] = Counter()
        self._reserved: str | None = None

    def take(
        self, worker: str, node: str, *, idle: bool, want_bytes: float, nodes: Collection[str] = ()
    ) -> tuple[int, ...]:
        """Items for one order: at least one where there is work for this worker, and about `want_bytes` of them.

        idle: whether the worker does nothing else. nodes: all that have workers.
        """
        for index in self._failed:
            avoid = self._avoid[index]
            if node in avoid and not avoid.issuperset(nodes):
                continue
            if self.attempts[index] >= SUSPICIOUS:
                if self._reserved not in (None, worker):
                    continue
                if not idle:
                    self._reserved = worker
                    return ()
                self._reserved = None
            self._failed.remove(index)
            return (index,)
        if self._reserved == worker:  # what it was kept for is done elsewhere
            self._reserved = None
        group = self._group_for(worker)
        if group is None:
            return ()
        taken: list[int] = []
        queue, size = self._waiting[group], 0
        while queue and (not taken or size + self.weights[queue[0]] <= want_bytes):
            taken.append(queue.popleft())
            size += self.weights[taken[-1]]
        if not queue:
            del self._waiting[group]
        self._left[group] -= size
        self.waiting_bytes -= size
        return tuple(taken)

    def _group_for(self, worker: str) -> str | None:
        own = self._group_of.get(worker)
        if own in self._waiting:
            return own
        self.leave(worker)
        if not self._waiting:
            return None
        chosen = max(self._waiting, key=lambda g: self._left[g] / (1 + self._crowd[g]))
        self._group_of[worker] = chosen
        self._crowd[chosen] += 1
        return chosen

    def leave(self, worker: str) -> None:
        """A worker is gone, or has finished its group."""
        if self._reserved == worker:
            self._reserved = None
        if (group := self._group_of.pop(worker, None)) is not None:
            self._crowd[group] -= 1

    def finish(self, indices: Sequence[int]) -> None:
        self.unfinished.difference_update(indices)

    def put_back(self, indices: Sequence[int]) -> None:
        """Not done, through no fault of theirs: next in their group."""
        for i in sorted(indices, reverse=True):
            if i in self.unfinished:
                self._waiting.setdefault(self.groups[i], deque()).appendleft(i)
                self._left[self.groups[i]] += self.weights[i]
                self.waiting_bytes += self.weights[i]

    def fail(self, index: int, node: str) -> int:
        """An item failed, or was with a worker that died. Returns how often by now."""
        if index in self.unfinished:
            self.attempts[index] += 1
            self._avoid[index].add(node)
            self._failed.append(index)
        return self.attempts[index]


class Pass(Generic[Item]):
    """One pass over some items: what is done with each, and who has what."""

    def __init__(
        self,
        work: Work,
        items: Sequence[Item],
        weigh: Callable[[Item], Portion],
        describe: Callable[[Item], object] = lambda item: item,
    ) -> None:
        self.work = work
        self.items = items
        self._describe = describe
        self.losses: Counter[int] = Counter()
        portions = [weigh(item) for item in items]
        self.board = Board([p.weight for p in portions], [p.group for p in portions])

    def describe(self, indices: Sequence[int]) -> list[object]:
        """What travels of these items: asked for when their turn has come."""
        return [self._describe(self.items[i]) for i in indices]
