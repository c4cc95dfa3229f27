"""The rates that bound a merge on a GPU: over the bus in both directions, and by threads into pinned memory.

Every input byte is copied twice, by a thread into pinned memory and by the GPU from there: the slower of the two is
what a merge can reach.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from benchmarks.device.gpu import ask, first_gpu, open_driver
from benchmarks.device.parts import Bench, Teller
from benchmarks.measure import mib, spread

SMALL_BYTES = 8 << 20
"""What a small unit copies at once."""
LEAST_SECONDS = 0.1
"""So long copies follow each other before they are waited for."""
MOST_COPIES = 4096
REPEATS = 5
PIECE = 1 << 20
SOURCES = 4
"""Threads read from so many times what they fill: more than caches hold."""
TABLE = f"Pinned memory and the GPU, GB/s; medians of {REPEATS}, in brackets least-greatest"
FILLING = f"Threads that fill pinned memory from ordinary memory, GB/s; medians of {REPEATS}"


def run(bench: Bench, tell: Teller) -> None:
    driver, size = open_driver(bench), bench.scale.copy_bytes
    with first_gpu(driver), ExitStack() as stack:
        lanes = [stack.enter_context(open_lane(driver, size)) for _ in range(2)]
        tell.check("what comes back is what went over", holds=returns(lanes[0]), said=mib(size))
        for each in sorted({min(SMALL_BYTES, size), size}):
            rates = measure(*lanes, each)
            cells = {f"{way.replace('_', ' ')}": spread(found) for way, found in rates.items()}
            tell.row(TABLE, **{"": f"copies of {mib(each)}"}, **cells)
        for way, found in rates.items():
            tell.figure(way, median(found))
        for threads in sorted(bench.threads):
            found = fill(lanes[0].host, threads)
            tell.row(FILLING, threads=threads, **{"into pinned memory": spread(found)})


@dataclass(frozen=True, kw_only=True)
class Lane:
    """A stream, a pinned buffer (n,) uint8, and as much of the GPU's memory."""

    driver: Any
    stream: Any
    host: np.ndarray
    memory: int

    def send(self, size: int) -> None:
        ask(self.driver.cuMemcpyHtoDAsync(self.memory, self.host.ctypes.data, size, self.stream))

    def fetch(self, size: int) -> None:
        ask(self.driver.cuMemcpyDtoHAsync(self.host.ctypes.data, self.memory, size, self.stream))

    def wait(self) -> None:
        ask(self.driver.cuStreamSynchronize(self.stream))


@contextmanager
def open_lane(driver: Any, size: int) -> Iterator[Lane]:
    non_blocking = 1
    stream = ask(driver.cuStreamCreate(non_blocking))
    address, memory = int(ask(driver.cuMemHostAlloc(size, 0))), int(ask(driver.cuMemAlloc(size)))
    host = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
    try:
        yield Lane(driver=driver, stream=stream, host=host, memory=memory)
    finally:
        ask(driver.cuMemFree(memory))
        ask(driver.cuMemFreeHost(address))
        ask(driver.cuStreamDestroy(stream))


def returns(lane: Lane) -> bool:
    """Whether bytes come back as they went over, the buffer having been cleared in between."""
    sent = np.random.default_rng(0).integers(0, 256, lane.host.size, dtype=np.uint8)
    lane.host[:] = sent
    lane.send(sent.size)
    lane.wait()
    lane.host[:] = 0
    lane.fetch(sent.size)
    lane.wait()
    return np.array_equal(lane.host, sent)


def measure(there: Lane, back: Lane, size: int) -> dict[str, list[float]]:
    """GB/s of each repeat: to the GPU, from it, and of each way while both are busy."""

    def both(size: int) -> None:
        there.send(size)
        back.fetch(size)

    ways = {"to_gpu": there.send, "from_gpu": back.fetch, "each_of_both": both}
    return {way: list(_rates(begin, (there, back), size)) for way, begin in ways.items()}


def _rates(begin: Callable[[int], None], lanes: tuple[Lane, Lane], size: int) -> Iterator[float]:
    def timed(count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            begin(size)
        for lane in lanes:
            lane.wait()
        return time.perf_counter() - began

    count = 1
    while timed(count) < LEAST_SECONDS and count < MOST_COPIES:
        count *= 2
    for _ in range(REPEATS):
        yield count * size / timed(count) / 1e9


def fill(pinned: np.ndarray, threads: int) -> list[float]:
    """GB/s of each repeat: every thread fills its part of a pinned buffer (n,) uint8 again and again, in pieces."""
    part = pinned.size // threads
    piece = min(PIECE, part)
    source = np.ones(SOURCES * part * threads, dtype=np.uint8)

    def copy(number: int) -> None:
        given, own = source[number * SOURCES * part :], pinned[number * part :]
        for start in range(0, SOURCES * part - piece + 1, piece):
            at = start % (part - piece + 1)
            own[at : at + piece] = given[start : start + piece]

    copied = SOURCES * part // piece * piece * threads
    with ThreadPoolExecutor(threads) as pool:
        rates = []
        for _ in range(REPEATS):
            began = time.perf_counter()
            list(pool.map(copy, range(threads)))
            rates.append(copied / (time.perf_counter() - began) / 1e9)
    return rates
