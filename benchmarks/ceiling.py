"""The ceiling of a merge on this machine: all inputs read and an output of the right size written, at once, by threads.

Nothing is computed beyond a sum over what was mapped, so no merge of these files can be faster. Ways of reading and of
writing are first tried alone; the two fastest of each are then run together and the best of those counts, synced.
Imports are not in it: what it is compared with is a whole command.

    python -m benchmarks.ceiling build/bench --shapes tinyllama-1.1b --experts 3
"""

from __future__ import annotations

import argparse
import itertools
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks import checkpoints
from benchmarks.measure import bring_cache_to, cached_share, spread, table, write_report

PIECE = 4 << 20
READ_PIECE = 1 << 20
"""Buffered reads go in pieces that fit the second-level cache."""
ALIGNMENT = 4096

Piece = tuple[Path, int, int]
"""(file, start, stop), bytes."""
Step = Callable[[Piece], None]


@dataclass(frozen=True, kw_only=True)
class Way:
    """read: map, pread or direct. write: buffered or direct. readers, writers: threads."""

    read: str = ""
    readers: int = 0
    write: str = ""
    writers: int = 0

    def __str__(self) -> str:
        parts = [f"{self.readers} x {self.read} in"] if self.read else []
        return " + ".join(parts + ([f"{self.writers} x {self.write} out"] if self.write else []))


@dataclass(frozen=True, kw_only=True)
class Ceiling:
    """alone: seconds of each way tried by itself, and their bytes. seconds: of the best way together, per repeat."""

    alone: dict[Way, float]
    together: dict[Way, float]
    best: Way
    seconds: list[float]
    cpu_seconds: list[float]
    input_bytes: int
    output_bytes: int

    @property
    def gigabytes_per_second(self) -> float:
        """Of input and output together."""
        return (self.input_bytes + self.output_bytes) / median(self.seconds) / 1e9

    def section(self) -> str:
        """Markdown: what was tried, and the ceiling."""
        sizes = {way: self.input_bytes if way.read else self.output_bytes for way in self.alone}
        rows = [
            (way, f"{seconds:.2f}", f"{size / seconds / 1e9:.2f}")
            for way, seconds, size in [
                *((way, seconds, sizes[way]) for way, seconds in self.alone.items()),
                *((way, seconds, self.input_bytes + self.output_bytes) for way, seconds in self.together.items()),
            ]
        ]
        return (
            f"Ceiling: {self.input_bytes / 1e9:.2f} GB in and {self.output_bytes / 1e9:.2f} GB out at once by "
            f"{self.best}, synced, in {spread(self.seconds, 2)} s at {median(self.cpu_seconds):.1f} CPU-s: "
            f"**{self.gigabytes_per_second:.2f} GB/s** in + out.\n\n" + table(["way", "s", "GB/s"], rows)
        )


def measure(files: Sequence[Path], output_bytes: int, scratch: Path, *, cache: str, repeats: int) -> Ceiling:
    """Find the fastest way to read `files` and write `output_bytes` into the file `scratch`, which is removed."""
    cores = len(os.sched_getaffinity(0))
    reads = [Way(read=kind, readers=n) for kind in ("map", "pread") for n in sorted({1, 2, cores})]
    if cache == "cold":
        reads += [Way(read="direct", readers=n) for n in (2, 4, 8)]
    writes = [Way(write=kind, writers=n) for kind in ("buffered", "direct") for n in (1, 2)]

    def timed(way: Way) -> float:
        bring_cache_to(cache, files if way.read else [])
        return run_way(way, files, output_bytes, scratch)

    alone = {way: timed(way) for way in (*reads, *writes)}
    fastest_reads, fastest_writes = sorted(reads, key=alone.__getitem__)[:2], sorted(writes, key=alone.__getitem__)[:2]
    pairs = [
        Way(read=r.read, readers=r.readers, write=w.write, writers=w.writers)
        for r, w in itertools.product(fastest_reads, fastest_writes)
    ]
    together = {way: timed(way) for way in pairs}
    best = min(pairs, key=together.__getitem__)
    seconds, cpu_seconds = [], []
    for _ in range(repeats):
        bring_cache_to(cache, files)
        before = time.process_time()
        seconds.append(run_way(best, files, output_bytes, scratch))
        cpu_seconds.append(time.process_time() - before)
    scratch.unlink(missing_ok=True)
    return Ceiling(
        alone=alone,
        together=together,
        best=best,
        seconds=seconds,
        cpu_seconds=cpu_seconds,
        input_bytes=sum(file.stat().st_size for file in files),
        output_bytes=output_bytes,
    )


def run_way(way: Way, files: Sequence[Path], output_bytes: int, scratch: Path) -> float:
    """Seconds from the first byte to the last one synced."""
    scratch.unlink(missing_ok=True)
    began = time.monotonic()
    threads: list[threading.Thread] = []
    failures: list[BaseException] = []
    if way.read:
        threads += _threads(pieces(files), READ[way.read], way.readers, failures)
    if way.write:
        scratch.touch()
        os.truncate(scratch, output_bytes)
        spans = ((scratch, start, min(start + PIECE, output_bytes)) for start in range(0, output_bytes, PIECE))
        threads += _threads(spans, WRITE[way.write], way.writers, failures)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    if way.write:
        # Direct writes go past the end by up to one block, which this cuts off.
        os.truncate(scratch, output_bytes)
        descriptor = os.open(scratch, os.O_RDWR)
        os.fsync(descriptor)
        os.close(descriptor)
    return time.monotonic() - began


def pieces(files: Sequence[Path]) -> Iterator[Piece]:
    """All bytes of all files: the first pieces of each, then the second, as a merge reads them."""
    sizes = {file: file.stat().st_size for file in files}
    for start in range(0, max(sizes.values()), PIECE):
        for file, size in sizes.items():
            if start < size:
                yield file, start, min(start + PIECE, size)


def _threads(
    work: Iterator[Piece], make: Callable[[], Step], count: int, failures: list[BaseException]
) -> list[threading.Thread]:
    """Threads that take pieces from one queue; each makes its own step, with its own buffers and descriptors."""
    taking = threading.Lock()

    def loop() -> None:
        try:
            step = make()
            while True:
                with taking:
                    piece = next(work, None)
                if piece is None:
                    return
                step(piece)
        except BaseException as error:
            failures.append(error)

    return [threading.Thread(target=loop) for _ in range(count)]


class _Descriptors(dict[Path, int]):
    def __init__(self, flags: int) -> None:
        self.flags = flags

    def __missing__(self, file: Path) -> int:
        self[file] = os.open(file, self.flags)
        return self[file]

    def __del__(self) -> None:
        for descriptor in self.values():
            os.close(descriptor)


def read_by_map() -> Step:
    maps: dict[Path, mmap.mmap] = {}

    def step(piece: Piece) -> None:
        file, start, stop = piece
        if file not in maps:
            with open(file, "rb") as stream:
                maps[file] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        np.add.reduce(np.frombuffer(maps[file], dtype=np.uint64, count=(stop - start) // 8, offset=start))

    return step


def read_by_pread() -> Step:
    descriptors, buffer = _Descriptors(os.O_RDONLY), memoryview(bytearray(READ_PIECE))

    def step(piece: Piece) -> None:
        file, start, stop = piece
        while start < stop:
            start += os.preadv(descriptors[file], [buffer[: stop - start]], start)

    return step


def read_directly() -> Step:
    descriptors, buffer = _Descriptors(os.O_RDONLY | os.O_DIRECT), mmap.mmap(-1, PIECE)

    def step(piece: Piece) -> None:
        file, start, _ = piece
        os.preadv(descriptors[file], [buffer], start)

    return step


def write_by_cache() -> Step:
    descriptors, buffer = (
        _Descriptors(os.O_WRONLY),
        memoryview(bytearray(os.urandom(READ_PIECE) * (PIECE // READ_PIECE))),
    )

    def step(piece: Piece) -> None:
        file, start, stop = piece
        while start < stop:
            start += os.pwrite(descriptors[file], buffer[: stop - start], start)

    return step


def write_directly() -> Step:
    descriptors, buffer = _Descriptors(os.O_WRONLY | os.O_DIRECT), mmap.mmap(-1, PIECE)
    buffer.write(os.urandom(READ_PIECE) * (PIECE // READ_PIECE))

    def step(piece: Piece) -> None:
        file, start, stop = piece
        size = -(-(stop - start) // ALIGNMENT) * ALIGNMENT
        written = os.pwrite(descriptors[file], memoryview(buffer)[:size], start)
        assert written == size

    return step


READ = {"map": read_by_map, "pread": read_by_pread, "direct": read_directly}
WRITE = {"buffered": write_by_cache, "direct": write_directly}


def main() -> None:
    parser = argparse.ArgumentParser(description="Read the inputs and write the output of a merge, nothing else.")
    parser.add_argument("folder", type=Path, nargs="?", default=Path("build/bench"))
    checkpoints.add_arguments(parser)
    parser.add_argument("--cache", choices=["warm", "cold"], default="warm")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--report", action="store_true", help="write benchmarks/results/DATE-ceiling.md")
    arguments = parser.parse_args()
    family = checkpoints.family_from(arguments, arguments.folder / checkpoints.family_name(arguments))
    bring_cache_to(arguments.cache, family.files)
    share = cached_share(family.files)
    found = measure(
        family.files,
        family.output_bytes,
        arguments.folder / "ceiling.bin",
        cache=arguments.cache,
        repeats=arguments.repeats,
    )
    state = f"Page cache {arguments.cache} before every run: {share:.0%} of the input bytes in it before the first."
    write_report(
        "ceiling", "Raw reading and writing", arguments.folder, [state, found.section()], keep=arguments.report
    )


if __name__ == "__main__":
    main()
