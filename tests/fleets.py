"""A fleet without a cluster: its workers are threads of this process."""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from ties_dist.executors.base import Workplace
from ties_dist.executors.fleet import ORDERS_AT_ONCE
from ties_dist.executors.local import LocalExecutor
from ties_dist.executors.orders import Answered, AnyBench, Event, Joined, Lost, Order, perform


@dataclass(frozen=True)
class GivenUp:
    fleet: ThreadFleet
    number: int

    def is_set(self) -> bool:
        return self.number <= self.fleet.given_up


class ThreadFleet:
    """Workers that are threads here. nodes: of the workers, in turn. step: what they all work with."""

    step: AnyBench

    def __init__(self, *, workers: int = 2, threads: int = 1, nodes: tuple[str, ...] = ("a", "b")) -> None:
        self.wanted = workers
        self.threads, self.nodes = threads, nodes
        self.excluded: set[str] = set()
        self.events: queue.Queue[Event] = queue.Queue()
        self.given_up = self.last = 0
        self.alive: dict[str, queue.Queue[Order | None]] = {}
        self.node_of: dict[str, str] = {}
        self.measured: dict[str, float] = {}
        self.names = (f"worker-{i}" for i in itertools.count())
        self.before: Callable[[str, Order], None] = lambda worker, order: None
        """Called in a worker before it begins an order: may raise, hang, or lose the worker."""

    def open(self, workplace: Workplace[object]) -> None:
        self._fill()

    def _fill(self) -> None:
        nodes = [n for n in self.nodes if n not in self.excluded]
        while nodes and len(self.alive) < self.wanted:
            name = next(self.names)
            node = min(nodes, key=lambda n: sum(self.node_of[w] == n for w in self.alive))
            orders: queue.Queue[Order | None] = queue.Queue()
            self.alive[name], self.node_of[name] = orders, node
            local = LocalExecutor(self.threads)
            for _ in range(ORDERS_AT_ONCE):
                threading.Thread(target=self._work, args=(name, orders, local), daemon=True).start()
            self.events.put(Joined(worker=name, node=node))

    def _work(self, name: str, orders: queue.Queue[Order | None], local: LocalExecutor) -> None:
        while (order := orders.get()) is not None:
            number = order.number
            self.before(name, order)
            answer = perform(order, self.step, local.beside(GivenUp(self, number)))
            if name in self.alive:
                self.events.put(Answered(worker=name, number=number, answer=answer))

    def send(self, worker: str, order: Order) -> None:
        self.last = order.number
        if worker in self.alive:
            self.alive[worker].put(order)

    def lose(self, worker: str, *, blameless: bool = False) -> None:
        """A worker dies by itself."""
        if worker in self.alive:
            self._end(worker)
            self.events.put(Lost(worker=worker, reason="killed", blameless=blameless))

    def drop(self, worker: str) -> None:
        self._end(worker)

    def _end(self, worker: str) -> None:
        if (orders := self.alive.pop(worker, None)) is not None:
            for _ in range(ORDERS_AT_ONCE):
                orders.put(None)

    def exclude(self, node: str) -> None:
        self.excluded.add(node)

    def give_up(self) -> None:
        self.given_up = self.last

    def wait(self, seconds: float) -> list[Event]:
        self._fill()
        events = []
        try:
            events.append(self.events.get(timeout=seconds))
            while True:
                events.append(self.events.get_nowait())
        except queue.Empty:
            return events

    def now(self) -> float:
        return time.monotonic()

    def measure(self, numbers: dict[str, float]) -> None:
        self.measured = numbers

    def shortage(self) -> str:
        return "nobody is here"

    def close(self) -> None:
        for worker in list(self.alive):
            self._end(worker)
        self.wanted = 0
