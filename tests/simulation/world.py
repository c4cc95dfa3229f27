"""Schedules of drivers, workers and power cuts, each from one seed: the real engine, fleet rules, journal, lock and
publishing, over a fake clock, a fake fleet and a disk that loses what was not synced.

What can happen: workers that die, answer twice, late or with an error, and whose writes arrive after all; a driver
whose machine loses power at any operation on the disk; one that is paused at any of them while another takes over, and
goes on later; lock files of drivers that are gone. In the end somebody finishes, and OUT is what an undisturbed merge
gives.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from tests.conftest import random_models, write_job
from tests.one_thread import OneThread
from tests.simulation.disk import Disk, PowerCut, remove
from ties_dist.engine import run as engine
from ties_dist.errors import LockedError, OutputError, UnitError
from ties_dist.executors.fleet import FleetExecutor
from ties_dist.executors.local import LocalExecutor
from ties_dist.executors.orders import Answer, Answered, Event, Joined, Lost, Order, perform
from ties_dist.inputs.opening import opener
from ties_dist.output.holder import Holder
from ties_dist.output.lock import RunLock
from ties_dist.output.report import MergeReport
from ties_dist.planning.options import RunOptions
from ties_dist.planning.prepare import Job, prepare
from ties_dist.storage.base import Writer
from ties_dist.storage.local_place import LocalPlace
from ties_dist.worker.merging import MergeStep, Worker
from ties_dist.worker.site import Site

METHODS = {"plain": "task_arithmetic", "sums": "model_stock"}
MOST_DRIVERS = 6
"""One after another, the last without faults."""


@dataclass
class Clock:
    """Time that passes only where somebody waits."""

    seconds: float = 1000.0

    def monotonic(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds


@dataclass
class Faults:
    """How likely each is per order. late: the answer comes when the worker was given up long ago."""

    die: float = 0.0
    late: float = 0.0
    twice: float = 0.0
    error: float = 0.0


@dataclass
class FakeFleet:
    """Workers that do their orders one after another, whenever the schedule says; nothing is ever parallel."""

    draw: random.Random
    clock: Clock
    faults: Faults
    workers: int
    late_writes: list[Callable[[], None]]
    """Of workers that were given up: the world lets them happen when it likes."""
    wanted: int = 0
    _site: Site | None = None
    _steps: dict[str, MergeStep] = field(default_factory=dict)
    _orders: list[tuple[str, Order]] = field(default_factory=list)
    _events: list[Event] = field(default_factory=list)
    _born: int = 0

    def open(self, site: Site) -> None:
        self._site, self.wanted = site, self.workers
        for _ in range(self.workers):
            self._start()

    def _start(self) -> None:
        assert self._site is not None
        self._born += 1
        name = f"worker-{self._born}"
        self._steps[name] = self._site.open()
        self._events.append(Joined(worker=name, node=f"node-{self._born % 3}"))

    def send(self, worker: str, order: Order) -> None:
        self._orders.append((worker, order))

    def drop(self, worker: str) -> None:
        if (step := self._steps.pop(worker, None)) is not None:
            held = [order for name, order in self._orders if name == worker]
            self._orders = [(name, order) for name, order in self._orders if name != worker]
            if held and self.draw.random() < 0.5:  # it lives, and does what it was told after all
                self.late_writes.append(partial(self._quietly, step, held))
            self._start()

    def exclude(self, node: str) -> None: ...

    def give_up(self) -> None:
        self._orders.clear()

    def wait(self, seconds: float) -> list[Event]:
        if not self._events and not self._orders:
            self.clock.sleep(seconds)
        for _ in range(self.draw.randint(1, 3)):
            if self._orders:
                self._do(*self._orders.pop(self.draw.randrange(len(self._orders))))
        events, self._events = self._events, []
        self.draw.shuffle(events)
        return events

    def _do(self, worker: str, order: Order) -> None:
        if worker not in self._steps:
            return
        chance = self.draw.random()
        if chance < self.faults.die:
            step = self._steps.pop(worker)
            if self.draw.random() < 0.5:
                self._quietly(step, [order], only=self.draw.randint(0, len(order.items)))  # some of it was written
            self._orders = [(name, each) for name, each in self._orders if name != worker]
            self._events.append(Lost(worker=worker, reason="died", blameless=self.draw.random() < 0.5))
            self._start()
            return
        chance -= self.faults.die
        if chance < self.faults.late:
            self._orders.append((worker, order))
            self.clock.sleep(2000.0)  # longer than anything is waited for
            return
        chance -= self.faults.late
        if chance < self.faults.error:
            answer = Answer(error=OSError("a hiccup"))
        else:
            answer = self._perform(order, self._steps[worker])
        self._events.append(Answered(worker=worker, number=order.number, answer=answer))
        if chance - self.faults.error < self.faults.twice:
            self._events.append(Answered(worker=worker, number=order.number, answer=answer))

    def _perform(self, order: Order, step: MergeStep) -> Answer:
        """In one thread: what happens must follow from the seed."""
        return perform(order, step, OneThread(self.draw, odd=0.0))

    def _quietly(self, step: MergeStep, orders: list[Order], only: int | None = None) -> None:
        """What a worker does that nobody hears of any more."""
        for order in orders:
            if order.work.kind == "merge":
                self._perform(replace(order, items=order.items[:only]), step)

    def now(self) -> float:
        return self.clock.monotonic()

    def measure(self, numbers: dict[str, float]) -> None: ...

    def shortage(self) -> str:
        return "nobody"

    def close(self) -> None: ...


class Quiet:
    def begin(self, phase: str, total_bytes: int) -> None: ...

    def advance(self, done_bytes: int) -> None: ...

    def end(self) -> None: ...


@dataclass
class World:
    """Jobs are prepared once; each schedule gets an OUT of its own."""

    folder: Path
    jobs: dict[str, tuple[Job, str]] = field(default_factory=dict)
    workers: dict[str, Worker] = field(default_factory=dict)
    writers: list[Writer] = field(default_factory=list)

    @classmethod
    def make(cls, folder: Path) -> World:
        world = cls(folder)
        shapes = {f"{i}.weight": (64, 64 + 16 * i) for i in range(5)} | {"5.weight": (1024, 544)}
        models = random_models(shapes, experts=2, dtype=torch.bfloat16)
        models[1]["0.weight"] = 2 * models[0]["0.weight"] - models[2]["0.weight"]  # cancels exactly
        options: dict[str, dict[str, object]] = {"whole": {}, "cut": {"tie_policy": "exact_k"}}
        options |= {"tensor": {"trim_scope": "tensor"}, "plain": {}, "sums": {}}
        for name, given in options.items():
            (folder / name).mkdir(parents=True)
            job = prepare(
                write_job(folder / name, models, shards=6, method=METHODS.get(name, "ties"), options=given),
                RunOptions(threads=1),
            )
            _ = job.sight
            report = engine.run(job, LocalPlace(world.undisturbed(name)), executor=LocalExecutor(1), progress=Quiet())
            world.jobs[name] = job, report.output_digest
            world.workers[name] = Worker(
                job.plan, opener(job.plan.models, job.resources.backend, reread_bytes=job.plan.reread_bytes)
            )
        return world

    def undisturbed(self, name: str) -> Path:
        return self.folder / f"undisturbed-{name}"

    def step(self, name: str, site: Site) -> MergeStep:
        """As `Site.open`, but inputs are opened, and the kernel compiled, once for all schedules."""
        writer = site.folder.place.writer(site.folder.parts, RunLock(site.folder.place, me=site.holder).check)
        self.writers.append(writer)
        return MergeStep(self.workers[name], writer)

    def close(self) -> None:
        """Of one schedule."""
        for writer in self.writers:
            writer.close()
        self.writers.clear()


@dataclass
class Schedule:
    """One seed. told: what happened, for whoever replays it."""

    world: World
    seed: int
    told: list[str] = field(default_factory=list)

    def run(self) -> MergeReport:
        """Raises AssertionError where OUT is not what it must be; the message has what happened."""
        draw = self.draw = random.Random(self.seed)
        name = self.name = draw.choice(["cut", "plain", "plain", "sums", "tensor", "whole"])
        job, expected = self.world.jobs[name]
        out = self.world.folder / f"out-{self.seed}"
        self.clock, self.late = Clock(), list[Callable[[], None]]()
        disk = Disk(out, draw)
        self.out, self.disk = out, disk
        thresholds = draw.choice(["auto", "speculate", "scan"])
        self.job = replace(job, options=replace(job.options, wait=True, threshold_pass=thresholds))
        _ = self.job.sight
        report: MergeReport | None = None
        try:
            with disk.hooked(), pytest.MonkeyPatch.context() as patched:
                self._patch(patched)
                for number in range(MOST_DRIVERS):
                    self.clock.sleep(draw.choice([0.0, 1000.0]))
                    last = number == MOST_DRIVERS - 1
                    report = self._driver(number, quiet=last)
                    self._let_late_writes_happen()
                    if report is not None and draw.random() < 0.7:
                        break
                assert report is not None, "the last driver, without any fault, did not finish"
                assert report.output_digest == expected, "another digest"
            for file in sorted(p.name for p in self.world.undisturbed(name).iterdir() if p.is_file()):
                same = (out / file).read_bytes() == (self.world.undisturbed(name) / file).read_bytes()
                assert same or file == "README.md", f"{file} has other bytes"
            left = sorted(p.name for p in (out / ".ties_dist").iterdir())
            assert not [n for n in left if (out / ".ties_dist" / n).is_dir()], f"left behind: {left}"
        except BaseException as error:
            raise AssertionError(
                f"seed {self.seed}: {type(error).__name__}: {error}\n" + "\n".join(self.told)
            ) from error
        finally:
            self.world.close()
            disk.forget()
            remove(out)
        return report

    def _patch(self, patched: pytest.MonkeyPatch) -> None:
        clock = SimpleNamespace(
            monotonic=self.clock.monotonic, sleep=self.clock.sleep, strftime=lambda *_: "then", gmtime=lambda: None
        )
        for module in ("output.lock", "output.holder", "storage.local_place"):
            patched.setattr(f"ties_dist.{module}.time", clock)
        patched.setattr("ties_dist.engine.passes.COMMIT_SECONDS", self.draw.choice([-1.0, 1e9]))
        patched.setattr("ties_dist.engine.passes.SIGNS_FROM", 1e9)
        patched.setattr("ties_dist.planning.sample.SAMPLE_SLICES", 8)
        patched.setattr("ties_dist.storage.snapshot.SNAPSHOT_SECONDS", self.draw.choice([-1.0, 1e9, 1e9]))
        patched.setattr("ties_dist.executors.fleet.FIRST_BYTES", self.draw.choice([0, 1 << 20]))
        patched.setattr("ties_dist.engine.passes.Passes.warm_up", lambda passes: None)
        patched.setattr(Site, "open", lambda site, gpus=None: self.world.step(self.name, site))
        patched.setattr("ties_dist.output.lock.RunLock._beat", lambda lock: None)

    def _driver(self, number: int, *, quiet: bool) -> MergeReport | None:
        """One run of the command, to whatever end."""
        draw = self.draw
        fate = "finish" if quiet else draw.choice(["finish", "power cut", "power cut", "killed", "paused"])
        scale = 0.0 if quiet else draw.choice([0.0, 0.05, 0.15])
        faults = Faults(die=scale, late=scale / 3, twice=scale, error=scale)
        at = self.disk.operations + draw.randint(1, 60)
        self.told.append(f"driver {number}: {self.name}, {fate} at operation {at}, faults {scale}")
        if fate == "paused":
            return self._paused(number, at, faults)

        def strike(operation: str) -> None:
            if fate in ("power cut", "killed") and self.disk.operations == at:
                raise PowerCut(operation)

        self.disk.strike = strike
        try:
            return self._merge(number, faults)
        except PowerCut as cut:
            self.disk.strike = lambda operation: None
            self.told.append(f"  {fate} in {cut}")
            if fate == "power cut":
                self.disk.crash()
                self.late.clear()
        finally:
            self.disk.strike = lambda operation: None
        return None

    def _paused(self, number: int, at: int, faults: Faults) -> MergeReport | None:
        """Stopped in the middle of an operation, until another driver has taken over and ended; then it goes on."""
        reached, go_on, ended = threading.Event(), threading.Event(), threading.Event()
        thread_of_first: list[int] = []
        outcome: list[MergeReport | BaseException | None] = [None]

        def strike(operation: str) -> None:
            if self.disk.operations >= at and not reached.is_set() and threading.get_ident() == thread_of_first[0]:
                self.told.append(f"  paused in {operation}")
                reached.set()
                go_on.wait()

        def first() -> None:
            thread_of_first.append(threading.get_ident())
            try:
                outcome[0] = self._merge(number, faults)
            except BaseException as error:
                outcome[0] = error
            finally:
                ended.set()
                reached.set()

        self.disk.strike = strike
        thread = threading.Thread(target=first)
        thread.start()
        reached.wait()
        report = None
        if not ended.is_set():
            self.clock.sleep(1000.0)
            self.told.append("  another takes over")
            report = self._merge(number + 100, Faults())
            go_on.set()
        thread.join()
        self.disk.strike = lambda operation: None
        found = outcome[0]
        if isinstance(found, BaseException) and not isinstance(found, (LockedError, OutputError)):
            raise found
        return report if report is not None else found if isinstance(found, MergeReport) else None

    def _merge(self, number: int, faults: Faults) -> MergeReport | None:
        fleet = FakeFleet(
            draw=self.draw,
            clock=self.clock,
            faults=faults,
            workers=self.draw.randint(1, 3),
            late_writes=self.late,
        )
        me = replace(Holder.myself(), host=f"host-{number}", boot=f"boot-{number}", token=f"{number:04}{self.seed:012}")
        executor = FleetExecutor(cast(Any, fleet), start_seconds=1e6, stuck_seconds=1500.0)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(
                Holder, "myself", classmethod(lambda cls, *, elsewhere=False: replace(me, elsewhere=elsewhere))
            )
            try:
                report = engine.run(
                    self.job,
                    LocalPlace(self.out),
                    executor=executor,
                    progress=Quiet(),
                )
            except (UnitError, OutputError) as error:  # a unit that failed again and again: the command is repeated
                if isinstance(error, LockedError):
                    raise
                self.told.append(f"  ended with {type(error).__name__}: {error}")
                return None
        self.told.append(f"  finished{' before' if report.already_done else ''}")
        return report

    def _let_late_writes_happen(self) -> None:
        for write in self.late:
            if self.draw.random() < 0.5:
                write()
        self.late.clear()
