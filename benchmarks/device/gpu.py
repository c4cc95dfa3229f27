"""The GPU of a process: the machine's own, or the tests' stand-in for its driver; and where the time goes there.

As a command it is `python -m` for a module whose merges go to the stand-in, or whose calls of the driver are timed:

    python -m benchmarks.device.gpu --stand-in --watch calls.json ties_dist merge recipe.yml out --device cuda
"""

from __future__ import annotations

import json
import runpy
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.device.parts import Bench, Skip
from ties_dist.compiler import cuda
from ties_dist.errors import PlanError


def ask(answer: Any) -> Any:
    """What a driver's function returns after its status."""
    status, *values = answer
    if int(status) != 0:
        raise RuntimeError(f"CUDA: {getattr(status, 'name', status)}")
    return values[0] if values else None


def stand_in() -> None:
    """Merges of this process with `device="cuda"` go to the stand-in from now on."""
    from tests.cuda_driver import Driver, install

    install(Driver(devices=1))


def open_driver(bench: Bench) -> Any:
    """The driver's functions; every merge of this process with `device="cuda"` goes to it. Raises Skip."""
    if bench.stood_in:
        stand_in()
    try:
        return cuda.load_driver()
    except PlanError as error:
        raise Skip(str(error)) from error


@contextmanager
def first_gpu(driver: Any) -> Iterator[Any]:
    """The first device, its context current on this thread and kept by this process."""
    device = ask(driver.cuDeviceGet(0))
    ask(driver.cuCtxPushCurrent(ask(driver.cuDevicePrimaryCtxRetain(device))))
    try:
        yield device
    finally:
        ask(driver.cuCtxPopCurrent())
        ask(driver.cuDevicePrimaryCtxRelease(device))


# -- where the time goes -----------------------------------------------------------------------------------------------

STREAM_OF = {"cuMemcpyHtoDAsync": 3, "cuMemcpyDtoHAsync": 3, "cuLaunchKernel": 8}
"""Calls that only begin something, and which argument is their stream."""
LEAST_SECONDS = 0.001


@dataclass
class Watched:
    """A driver whose calls are timed. What a call only begins is waited for, one at a time: its time is its own.

    Written to `path` whenever a GPU is given back, since the command may end without ceremony.
    """

    driver: Any
    path: Path
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    calls: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    copied: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    _one: threading.Lock = field(default_factory=threading.Lock)

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.driver, name)
        return self._timed(name, function) if name.startswith("cu") else function

    def _timed(self, name: str, function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            with self._one:
                began = time.perf_counter()
                answer = function(*arguments)
                if name in STREAM_OF:
                    self.driver.cuStreamSynchronize(arguments[STREAM_OF[name]])
                self.seconds[name] += time.perf_counter() - began
                self.calls[name] += 1
                if name.startswith("cuMemcpy"):
                    self.copied[name] += arguments[2]
                elif name == "cuDevicePrimaryCtxRelease":
                    self._write()
            return answer

        return call

    def _write(self) -> None:
        found = {
            name: {"seconds": self.seconds[name], "calls": self.calls[name], "bytes": self.copied.get(name, 0)}
            for name in self.seconds
        }
        self.path.write_text(json.dumps(found))


def watch(path: Path) -> None:
    """Merges of this process with `device="cuda"` are watched from now on."""
    load = cuda.load_driver
    cuda.load_driver = lambda: Watched(load(), path)


def watched_rows(path: Path) -> Iterator[dict[str, object]]:
    """Rows of a table out of what `Watched` wrote, the costliest first, and none of calls that cost next to nothing."""
    found = json.loads(path.read_text())
    for name, cost in sorted(found.items(), key=lambda item: -item[1]["seconds"]):
        if cost["seconds"] < LEAST_SECONDS:
            return
        rate = f"{cost['bytes'] / cost['seconds'] / 1e9:.1f}" if cost["bytes"] and cost["seconds"] else ""
        yield {"call": name, "calls": f"{cost['calls']:,}", "s": f"{cost['seconds']:.3f}", "GB/s": rate}


# -- as a command ------------------------------------------------------------------------------------------------------


def main() -> None:
    arguments = sys.argv[1:]
    while arguments[0].startswith("--"):
        if arguments.pop(0) == "--stand-in":
            stand_in()
        else:
            watch(Path(arguments.pop(0)))
    sys.argv = arguments
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
