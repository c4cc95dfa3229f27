"""One process on one machine: a first-class peer of the cluster executor, without its start-up.

Threads that each call a compiled CPU kernel do not overlap, since its wrapper keeps the GIL (facts.md): one caller
computes, with OpenMP inside the kernel, and I/O threads read ahead and write behind it. Counting is numba without the
GIL, so there threads do scale.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

from ties_dist.errors import StoppedError
from ties_dist.executors.base import Call, Fold, Item, Result
from ties_dist.planning import Unit
from ties_dist.work import Loaded, MergeResult, MergeStep, MergeTask, Observation

READ_AHEAD = 2
WRITE_BEHIND = 2
PARTIAL_SECONDS = 5.0
"""How long a counting thread keeps its counts to itself."""


@dataclass
class LocalExecutor:
    """threads: of compute and counting. stop: set by a signal; the current unit ends, then StoppedError is raised."""

    threads: int
    stop: threading.Event = field(default_factory=threading.Event)
    partial_seconds: float = field(default_factory=lambda: PARTIAL_SECONDS)
    name: str = "local"

    def map_unordered(self, step: MergeStep, tasks: Iterable[MergeTask]) -> Iterator[MergeResult]:
        loads: deque[tuple[MergeTask, Future[Loaded]]] = deque()
        stores: set[Future[MergeResult]] = set()
        source = iter(tasks)
        with (
            ThreadPoolExecutor(READ_AHEAD, "read") as readers,
            ThreadPoolExecutor(WRITE_BEHIND, "write") as writers,
        ):
            try:
                while not self.stop.is_set():
                    while len(loads) < READ_AHEAD and (task := next(source, None)) is not None:
                        loads.append((task, readers.submit(step.load, task)))
                    if not loads:
                        break
                    task, load = loads.popleft()
                    computed = step.compute(task, load.result())
                    stores.add(writers.submit(step.store, task, computed))
                    if len(stores) >= WRITE_BEHIND:
                        wait(stores, return_when=FIRST_COMPLETED)
                    for done in [s for s in stores if s.done()]:
                        stores.remove(done)
                        yield done.result()
                for future in stores:
                    yield future.result()
            finally:
                for _, load in loads:
                    load.cancel()
        self._check_stop()

    def reduce(self, fold: Fold, units: Sequence[Unit]) -> Iterator[Observation]:
        waiting = iter(units)
        taking = threading.Lock()
        partials: queue.Queue[Observation | BaseException | None] = queue.Queue()

        def work() -> None:
            try:
                partial, began = Observation(), time.monotonic()
                while not self.stop.is_set():
                    with taking:
                        unit = next(waiting, None)
                    if unit is None:
                        break
                    fold(unit, partial)
                    if time.monotonic() - began > self.partial_seconds:
                        partials.put(partial)
                        partial, began = Observation(), time.monotonic()
                if partial.units:
                    partials.put(partial)
                partials.put(None)
            except BaseException as error:
                partials.put(error)

        workers = [threading.Thread(target=work, name=f"count-{i}", daemon=True) for i in range(self.threads)]
        for worker in workers:
            worker.start()
        running = len(workers)
        failure: BaseException | None = None
        try:
            while running:
                partial = partials.get()
                if isinstance(partial, Observation):
                    yield partial
                    continue
                running -= 1
                if partial is not None:
                    failure = failure or partial
                    with taking:
                        waiting = iter(())
        finally:
            with taking:
                waiting = iter(())  # where the caller gave up, the threads do too
        if failure is not None:
            raise failure
        self._check_stop()

    def call(self, function: Call[Item, Result], items: Sequence[Item]) -> Iterator[tuple[Item, Result]]:
        with ThreadPoolExecutor(self.threads, "call") as pool:
            window: deque[tuple[Item, Future[Result]]] = deque()
            try:
                for item in items:
                    window.append((item, pool.submit(function, item)))
                    if len(window) > 2 * self.threads:
                        self._check_stop()
                        first, future = window.popleft()
                        yield first, future.result()
                for first, future in window:
                    yield first, future.result()
            finally:
                for _, future in window:
                    future.cancel()

    def _check_stop(self) -> None:
        if self.stop.is_set():
            raise StoppedError("stopped; everything finished is kept. Run the same command again to resume.")
