"""A thousand workers on one machine: the real hand-out and retry rules under a clock that is turned forward.

Speeds are skewed, some workers crawl, all die now and then; what an order takes is drawn, nothing is computed.
Utilisation is the share of all workers' time, dead time included, in which they did something that was needed.

    python -m benchmarks.simulate_fleet --report
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from benchmarks.measure import table, write_report
from ties_dist.executors.base import Step, Workplace
from ties_dist.executors.fleet import FleetExecutor
from ties_dist.executors.orders import Answer, Answered, Event, Joined, Lost, Order
from ties_dist.values.items import MergeResult, MergeTask, Range, WorkItem

MIB = 1 << 20
EXPLAINED = """**Simulated**, not measured: the real hand-out and retry code under a clock that is turned forward. What
an order takes is drawn: 50 MB of output per second and worker, times its log-normal speed, times 10 % noise. A
message takes the driver 1 ms; a dead worker is replaced after 20 s. Utilisation is the least of all seeds, the rest is
of seed 0."""


@dataclass
class SimulatedFleet:
    """Workers that take simulated time for their orders, one after another; everything follows from the seed.

    work_seconds: of an order by a worker. failure_rate: deaths per worker and second; restart_seconds: until another is
    there. message_seconds: the driver's time per order. clock: in seconds.
    """

    workers: int
    answer: Callable[[Order], Answer]
    work_seconds: Callable[[str, Order], float]
    failure_rate: float = 0.0
    restart_seconds: float = 10.0
    message_seconds: float = 0.0
    seed: int = 0
    clock: float = 0.0
    useful_seconds: float = 0.0
    _events: list[tuple[float, int, Event]] = field(default_factory=list)
    _order: Any = field(default_factory=itertools.count)
    _under_way: dict[str, dict[int, float]] = field(default_factory=dict)
    _free_at: dict[str, float] = field(default_factory=dict)
    _born: int = 0

    def __post_init__(self) -> None:
        self.draw = random.Random(self.seed)

    @property
    def wanted(self) -> int:
        return self.workers

    def open(self, workplace: Workplace[object]) -> None:
        for _ in range(self.workers):
            self._start(0.0)

    def _start(self, after: float) -> None:
        name, node = f"worker-{self._born}", f"node-{self._born % self.workers}"
        self._born += 1
        self._under_way[name], self._free_at[name] = {}, 0.0
        self._push(self.clock + after, Joined(worker=name, node=node))
        if self.failure_rate:
            life = self.draw.expovariate(self.failure_rate)
            self._push(self.clock + after + life, Lost(worker=name, reason="died", blameless=True))

    def _push(self, at: float, event: Event) -> None:
        heapq.heappush(self._events, (at, next(self._order), event))

    def send(self, worker: str, order: Order) -> None:
        self.clock += self.message_seconds
        took = self.work_seconds(worker, order)
        self._free_at[worker] = max(self._free_at[worker], self.clock) + took
        self._under_way[worker][order.number] = took
        answered = Answered(worker=worker, number=order.number, answer=self.answer(order))
        self._push(self._free_at[worker], answered)

    def drop(self, worker: str) -> None:
        if self._under_way.pop(worker, None) is not None:
            self._start(self.restart_seconds)

    def exclude(self, node: str) -> None: ...

    def give_up(self) -> None: ...

    def wait(self, seconds: float) -> list[Event]:
        """All that has happened by now, or the next thing if that is within so many seconds."""
        until, events = self.clock + seconds, list[Event]()
        while self._events and self._events[0][0] <= (self.clock if events else until):
            at, _, event = heapq.heappop(self._events)
            self.clock = max(self.clock, at)
            if event.worker not in self._under_way:  # it died before
                continue
            if isinstance(event, Lost):
                self.drop(event.worker)
            elif isinstance(event, Answered):
                self.useful_seconds += self._under_way[event.worker].pop(event.number)
            events.append(event)
        if not events:
            self.clock = until
        return events

    def now(self) -> float:
        return self.clock

    def measure(self, numbers: dict[str, float]) -> None: ...

    def shortage(self) -> str:
        return "simulated"

    def close(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Case:
    """gigabytes: of output, in units of 8 MiB over shards of 5 GB. rate: bytes of output per second of a usual worker.

    spread: sigma of the log-normal speeds; crawling: share of workers at a fifth of that; life_seconds: their mean.
    """

    name: str
    workers: int
    gigabytes: int
    rate: float = 50e6
    spread: float = 0.0
    crawling: float = 0.0
    life_seconds: float = float("inf")


_WORST: dict[str, Any] = {"spread": 0.4, "crawling": 0.02, "life_seconds": 1800}
CASES = (
    Case(name="equal workers", workers=1000, gigabytes=5000),
    Case(name="skewed speeds", workers=1000, gigabytes=5000, spread=0.4),
    Case(name="skewed, 2 % crawl", workers=1000, gigabytes=5000, spread=0.4, crawling=0.02),
    Case(name="skewed, crawl, die every 30 min", workers=1000, gigabytes=5000, **_WORST),
    Case(name="the same", workers=200, gigabytes=1000, **_WORST),
    Case(name="the same, 405B in 16 bits", workers=200, gigabytes=810, **_WORST),
    Case(name="the same, 405B: 16 s of work each", workers=1000, gigabytes=810, **_WORST),
)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """curve: when 0, 5, 10, ... 100 % of the units were done, in seconds."""

    seconds: float
    utilisation: float
    orders: int
    retries: int
    driver_seconds: float
    curve: tuple[float, ...]


def simulate(case: Case, seed: int = 0) -> Outcome:
    """One merge pass. Raises SystemExit where a unit is not merged exactly once."""
    draw = random.Random(seed)
    units = [
        WorkItem((Range(f"model-{shard:05}.safetensors", start * MIB, (start + 8) * MIB),))
        for shard in range(case.gigabytes // 5)
        for start in range(0, 4768, 8)
    ]
    rates: dict[str, float] = {}

    def seconds(worker: str, order: Order) -> float:
        if worker not in rates:
            rates[worker] = case.rate * draw.lognormvariate(0, case.spread)
            rates[worker] *= 0.2 if draw.random() < case.crawling else 1
        return sum(task.item.nbytes for task in order.items) / rates[worker] * draw.lognormvariate(0, 0.1)

    def answer(order: Order) -> Answer:
        nothing: dict[str, Any] = {"state_digest": "", "majority": 1, "blocks": (), "counts": {}, "dependent": 0}
        values = [MergeResult(item=task.item, **nothing) for task in order.items]
        return Answer(done=tuple(range(len(values))), values=values)

    fleet = SimulatedFleet(
        workers=case.workers,
        answer=answer,
        work_seconds=seconds,
        failure_rate=1 / case.life_seconds,
        restart_seconds=20.0,
        message_seconds=0.001,
        seed=seed,
    )
    executor = FleetExecutor(fleet)
    began = time.process_time()
    executor.start(cast(Workplace[object], None))
    first, merged, curve = fleet.clock, set[WorkItem](), [0.0]
    step = cast("Step[MergeTask, None, None, MergeResult]", None)  # nobody merges
    results = executor.map_unordered(step, units, lambda unit: MergeTask(item=unit, cuts={}, majority=1))
    for count, result in enumerate(results, 1):
        merged.add(result.item)
        curve += [fleet.clock - first] * (count * 20 // len(units) - len(curve) + 1)
    if not count == len(merged) == len(units):
        raise SystemExit("a unit was not merged exactly once")
    spent = fleet.clock - first
    return Outcome(
        seconds=spent,
        utilisation=fleet.useful_seconds / (spent * case.workers),
        orders=executor.orders,
        retries=executor.retries,
        driver_seconds=time.process_time() - began,
        curve=tuple(curve),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--report", action="store_true", help="write benchmarks/results/DATE-simulated-fleet.md")
    options = parser.parse_args()
    logging.getLogger("ties_dist").setLevel(logging.ERROR)  # a thousand deaths are a thousand lines
    rows: list[list[str]] = []
    drawn: Outcome | None = None
    for case in CASES:
        outcomes = [simulate(case, seed) for seed in range(options.seeds)]
        rows.append(
            [
                case.name,
                f"{case.workers:,}",
                f"{case.gigabytes:,} GB",
                f"{outcomes[0].seconds:,.0f} s",
                f"{min(o.utilisation for o in outcomes):.1%}",
                f"{outcomes[0].orders:,}",
                f"{outcomes[0].retries:,}",
                f"{outcomes[0].driver_seconds:.1f} s",
            ]
        )
        print(*rows[-1], sep=" | ", flush=True)
        if case.life_seconds < float("inf") and drawn is None:
            drawn = outcomes[0]
    assert drawn is not None
    header = ["case", "workers", "output", "takes", "utilisation", "orders", "sent again", "CPU of the driver's code"]
    chart = [
        "Share done over time in the first case with deaths, seed 0; full use to the end is a straight line.",
        "",
        "```mermaid",
        "xychart-beta",
        '    title "simulated: 1,000 workers, skewed, crawling, dying"',
        f'    x-axis "seconds" [{", ".join(f"{t:.0f}" for t in drawn.curve)}]',
        '    y-axis "percent of the units done" 0 --> 100',
        f"    line [{', '.join(str(5 * i) for i in range(len(drawn.curve)))}]",
        "```",
    ]
    title = "A simulated fleet of 1,000 workers"
    sections = [EXPLAINED, table(header, rows), "\n".join(chart)]
    write_report("simulated-fleet", title, Path(), sections, keep=options.report)


if __name__ == "__main__":
    main()
