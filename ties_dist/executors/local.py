"""One process on one machine: a first-class peer of the cluster executor, without its start-up.

A thread takes a unit through all its steps: it reads, waits for its turn to compute, computes, and writes. As many
compute at once as there are cores (kernels and counting run without the GIL); a few more threads keep the disks busy
meanwhile, and their number bounds the buffers.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace

from ties_dist.executors.base import (
    AnyStep,
    Call,
    Computed,
    Fold,
    Item,
    Loaded,
    Piece,
    Result,
    Step,
    Stop,
    Sum,
    Task,
    Usage,
    Workplace,
    alike,
    check_stop,
)
from ties_dist.executors.faults import working_on
from ties_dist.values.items import UNITS_AROUND, Portion

PARTIAL_SECONDS = 5.0
"""How long a counting thread keeps its counts to itself."""


@dataclass
class LocalExecutor:
    """threads: of compute and counting. stop: set by a signal; units being computed end, then StoppedError is raised.

    computing: units computed at once, where not one per thread: the slots of the GPUs.
    """

    threads: int
    stop: Stop = field(default_factory=threading.Event)
    partial_seconds: float = field(default_factory=lambda: PARTIAL_SECONDS)
    computing: int | None = None
    name: str = "local"
    usage: Usage = field(default_factory=Usage)
    _turns: threading.Semaphore = field(init=False)
    """Whose turn it is to compute."""
    _room: threading.Semaphore = field(init=False)
    """For units in memory."""

    def __post_init__(self) -> None:
        self._turns, self._room = threading.Semaphore(self.at_once), threading.Semaphore(self.window)

    @property
    def at_once(self) -> int:
        return self.computing or self.threads

    @property
    def window(self) -> int:
        return self.at_once + UNITS_AROUND

    def beside(self, stop: Stop) -> LocalExecutor:
        """Another that is stopped by itself, and shares cores and memory with this one."""
        other = replace(self, stop=stop)
        other._turns, other._room = self._turns, self._room
        return other

    def start(self, workplace: Workplace[object]) -> None:
        """Nothing to do: this process is what there is."""

    def map_unordered(
        self, step: Step[Task, Loaded, Computed, Result], items: Iterable[Piece], describe: Callable[[Piece], Task]
    ) -> Iterator[Result]:
        source = ((item, describe(item)) for item in items)
        given_up = threading.Event()
        running: set[Future[Result | None]] = set()

        def work(item: Piece, task: Task) -> Result | None:
            with self._room, working_on(item):
                loaded = step.load(task)
                with self._turns:
                    if self.stop.is_set() or given_up.is_set():
                        return None
                    computed = step.compute(task, loaded)
                return step.store(task, computed)

        failure: BaseException | None = None
        with ThreadPoolExecutor(self.window, "merge") as pool:
            try:
                while True:
                    ending = failure is not None or self.stop.is_set()
                    while not ending and len(running) < self.window and (following := next(source, None)) is not None:
                        running.add(pool.submit(work, *following))
                    if not running:
                        break
                    ended, running = wait(running, return_when=FIRST_COMPLETED)
                    for future in ended:
                        if (error := future.exception()) is not None:
                            failure = failure or error
                            given_up.set()
                        elif (result := future.result()) is not None:
                            yield result  # also beside a failure: what is written need not be done again
            finally:
                given_up.set()
                for future in running:
                    future.cancel()
        if failure is not None:
            raise failure
        check_stop(self.stop)

    def reduce(self, step: AnyStep, fold: Fold[AnyStep, Piece, Sum], items: Sequence[Piece]) -> Iterator[Sum]:
        waiting = iter(items)
        taking = threading.Lock()
        partials: queue.Queue[Sum | BaseException | None] = queue.Queue()

        def work() -> None:
            try:
                partial, began = fold.empty(), time.monotonic()
                while not self.stop.is_set():
                    with taking:
                        item = next(waiting, None)
                    if item is None:
                        break
                    with self._turns, working_on(item):
                        fold(step, item, partial)
                    if time.monotonic() - began > self.partial_seconds:
                        partials.put(partial)
                        partial, began = fold.empty(), time.monotonic()
                if partial.items:
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
                if partial is not None and not isinstance(partial, BaseException):
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
        check_stop(self.stop)

    def call(
        self,
        step: AnyStep,
        function: Call[AnyStep, Item, Result],
        items: Sequence[Item],
        weigh: Callable[[Item], Portion] = alike,
    ) -> Iterator[tuple[Item, Result]]:
        def ask(item: Item) -> Result:
            with working_on(item):
                return function(step, item)

        with ThreadPoolExecutor(self.threads, "call") as pool:
            window: deque[tuple[Item, Future[Result]]] = deque()
            try:
                for item in items:
                    window.append((item, pool.submit(ask, item)))
                    if len(window) > 2 * self.threads:
                        check_stop(self.stop)
                        first, future = window.popleft()
                        yield first, future.result()
                for first, future in window:
                    yield first, future.result()
            finally:
                for _, future in window:
                    future.cancel()
