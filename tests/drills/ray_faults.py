"""Workers that fail and messages that go astray, for `ray_drill`: installed in a driver's process, not in the product.

Which order or answer is hit is said beforehand, by its number over all workers and drivers of a run; who takes a number
creates a file of that name, so that a fault hits once, whoever dies on the way.
"""

from __future__ import annotations

import errno
import faulthandler
import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from ties_dist.executors import ray as ray_executor
from ties_dist.executors.orders import Answer, Answered, Ask, Event, Order
from ties_dist.storage.local import write_durably

WORKER_FAULTS = (
    "worker raises",
    "unit raises",
    "error cannot travel",
    "worker hangs",
    "write hangs",
    "disk full once",
    "disk full",
)
ON_ITS_WAY = "write on its way"
"""Not drawn: a test has the moments that it needs."""
MESSAGE_FAULTS = ("reply twice", "reply late")
HANGS_SECONDS = 3600.0
AGAIN_SECONDS = 0.5
"""After which a repeated answer comes once more."""


class Homesick(Exception):
    """Can be pickled, but not be made again from what was."""

    def __init__(self, one: str, other: str) -> None:
        super().__init__(f"{one} {other}")


class Drilled(ray_executor.Worker):
    """Takes its time over every order, so that there is a moment to strike, and fails where it was told to."""

    folder = ""
    seconds = 0.0
    at: Mapping[str, str] = {}
    """Fault by number of the order, as JSON has it."""
    next: str | None = None
    """What the next unit that is read or written is to meet."""

    def ready(self) -> Any:
        answer = super().ready()
        if not answer[1].problems:
            self._segments, self.step.worker.segments = self.step.worker.segments, self.read  # type: ignore[method-assign]
            self._opened, self.step.writer._open = self.step.writer._open, self.opened  # type: ignore[attr-defined]
            self._written, self.step.writer._write_direct = self.step.writer._write_direct, self.written  # type: ignore[attr-defined]
        return answer

    def perform(self, order: Order) -> Answer:
        fault = self.at.get(str(_take_number(Path(self.folder) / "orders")))
        time.sleep(self.seconds)
        if fault in ("worker raises", "worker hangs"):
            _hit(self.folder, fault)
            self.fail(fault)
        self.next = fault or self.next
        if fault in ("unit raises", "error cannot travel") and order.work.kind == "call":
            order = replace(order, work=Ask(lambda step, item: self._meet()))
        return super().perform(order)

    def fail(self, fault: str) -> None:
        if "hangs" in fault:
            time.sleep(HANGS_SECONDS)
        if fault == "error cannot travel":
            raise Homesick("no", "way")
        if "disk full" in fault:
            if fault == "disk full":
                (Path(self.folder) / "full").touch()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise RuntimeError("the drill has raised this")

    def read(self, unit: Any) -> Any:
        if self.next in ("unit raises", "error cannot travel"):
            self._meet()
        return self._segments(unit)

    def opened(self, name: str) -> int:
        if (Path(self.folder) / "full").exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self.next in ("write hangs", "disk full once", "disk full"):
            self._meet()
        return int(self._opened(name))

    def written(self, direct: int | None, name: str, start: int, block: memoryview) -> int:
        """Past the fence. A write that is on its way outlives its process where the file system is across a network."""
        if self.next == ON_ITS_WAY:
            self.next, file = None, self._opened(name)
            me = os.getpid()
            if os.fork() == 0:
                os.setsid()
                if os.fork() == 0:
                    write_durably(Path(self.folder) / "on-its-way", str(me))
                    while not (Path(self.folder) / "arrive").exists():
                        time.sleep(0.01)
                    os.pwrite(file, block, start)
                    (Path(self.folder) / "arrived").touch()
                os._exit(0)
            time.sleep(HANGS_SECONDS)
        return int(self._written(direct, name, start, block))

    def _meet(self) -> None:
        assert self.next is not None
        fault, self.next = self.next, None
        _hit(self.folder, fault)
        self.fail(fault)


class AstrayFleet(ray_executor.RayFleet):
    """Tells of some answers twice, and of others only once their worker was given up."""

    folder = ""
    at: Mapping[str, str] = {}
    """Fault by number of the answer."""

    def wait(self, seconds: float) -> list[Event]:
        if not hasattr(self, "_later"):
            self._later: list[tuple[float, Event]] = []
            self._held: list[Answered] = []
        told: list[Event] = []
        for event in super().wait(seconds):
            told.append(event)
            if not isinstance(event, Answered):
                continue
            fault = self.at.get(str(_take_number(Path(self.folder) / "answers")))
            if fault == "reply twice":
                _hit(self.folder, fault)
                told.append(event)
                self._later.append((self.now() + AGAIN_SECONDS, event))
            elif fault == "reply late":
                _hit(self.folder, fault)
                self._held.append(told.pop())  # type: ignore[arg-type]
        given_up = [event for event in self._held if event.worker not in self._actors]
        self._held = [event for event in self._held if event.worker in self._actors]
        self._later += [(self.now() + AGAIN_SECONDS, event) for event in given_up]
        told += [event for at, event in self._later if at <= self.now()]
        self._later = [(at, event) for at, event in self._later if at > self.now()]
        return told


def install(folder: str, seconds: float, orders: Mapping[str, str], answers: Mapping[str, str]) -> None:
    """Make this process a driver with such workers. seconds: that each order takes more; the rest: fault by number."""
    faulthandler.register(signal.SIGUSR1)  # where does it hang?
    for name in ("orders", "answers", "hits"):
        (Path(folder) / name).mkdir(parents=True, exist_ok=True)
    Drilled.folder, Drilled.seconds, Drilled.at = folder, seconds, orders
    AstrayFleet.folder, AstrayFleet.at = folder, answers
    ray_executor.Worker = Drilled  # type: ignore[misc]
    ray_executor.RayFleet = AstrayFleet  # type: ignore[misc]
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


def hits(folder: Path) -> set[str]:
    """Faults of workers and messages that have struck."""
    return {path.name.replace("-", " ") for path in (folder / "hits").glob("*")}


def _hit(folder: str, fault: str) -> None:
    (Path(folder) / "hits" / fault.replace(" ", "-")).touch()


def _take_number(folder: Path) -> int:
    """The next free number, which is this process's now."""
    number = 0
    while True:
        try:
            (folder / str(number)).touch(exist_ok=False)
            return number
        except FileExistsError:
            number += 1
