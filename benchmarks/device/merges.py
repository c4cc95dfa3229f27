"""Whole merges of files in the page cache: on the GPU, and on growing numbers of threads, against a raw copy.

The ceiling reads the same inputs and writes an output of the same size with nothing computed, by the fastest of a few
ways. What a GPU merge reaches is also told as a share of the rate over its bus, which `copies` has measured.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from statistics import median

from benchmarks.ceiling import Way, run_way
from benchmarks.checkpoints import Family
from benchmarks.device import files
from benchmarks.device.commands import Merged, forget_statistics, merge, one_digest
from benchmarks.device.gpu import watched_rows
from benchmarks.device.parts import Bench, Teller, say
from benchmarks.measure import cached_share, mib, spread, warm

METHODS = ("ties", "linear", "task_arithmetic")
GOAL = 0.7
"""Of the rate to the GPU, to be reached by the input bytes of a merge."""
WRITERS = 2
GOAL_TABLE = "Input bytes of a merge a second, as a share of the measured rate of pinned memory to the GPU"
CEILING = "A raw copy: all inputs read, as many bytes written as an output has, synced"


@dataclass(frozen=True, kw_only=True)
class Where:
    """threads: 0 is the command's own choice."""

    device: str
    threads: int = 0

    def __str__(self) -> str:
        return f"{self.device}, {self.threads} threads" if self.threads else self.device


def run(bench: Bench, tell: Teller) -> None:
    merges = Merges(bench, tell, files.family(bench.scratch))
    if not bench.has_gpu:
        tell.skipped("merges by CUDA", "no GPU")
    merges.measure_ceiling()
    merges.compile()
    for repeat in range(bench.scale.repeats):
        for method in METHODS:
            for where in merges.places:
                if bench.seconds_left < 1.5 * merges.longest:
                    tell.skipped(f"repeat {repeat + 1} from `{method}` by {where} on", "no time was left for it")
                    return
                merges.measure(method, where)
    if bench.has_gpu:
        merges.watch("ties")


@dataclass
class Merges:
    """runs: by method and place. ceiling: GB/s of input and output together. longest: seconds of one merge so far."""

    bench: Bench
    tell: Teller
    family: Family
    runs: dict[tuple[str, Where], list[Merged]] = field(default_factory=lambda: defaultdict(list))
    ceiling: float = 0.0
    longest: float = 0.0

    @property
    def places(self) -> list[Where]:
        of_cpu = [Where(device="cpu", threads=threads) for threads in self.bench.threads]
        return [Where(device="cuda"), *of_cpu] if self.bench.has_gpu else of_cpu

    def measure_ceiling(self) -> None:
        self._warm()
        self.tell.note(f"{cached_share(self.family.files):.0%} of the input bytes are in the page cache to begin with")
        scratch, size = self.bench.scratch / "ceiling.bin", self.family.output_bytes
        for readers, kind in product(sorted({4, self.bench.cores}), ("map", "pread")):
            way = Way(read=kind, readers=readers, write="buffered", writers=WRITERS)
            self._warm()
            seconds = run_way(way, self.family.files, size, scratch)
            rate = (self.family.input_bytes + size) / seconds / 1e9
            self.ceiling = max(self.ceiling, rate)
            self.tell.row(CEILING, **{"way": way, "s": f"{seconds:.2f}", "GB/s": f"{rate:.2f}"})
        scratch.unlink()

    def compile(self) -> None:
        """Every kernel once, on little models, all at a time: what compiling takes is told by the part `start`."""
        little = files.write(self.bench.scratch / "little", layers=1, divide=8)
        wanted = [(method, device) for method in METHODS for device in dict.fromkeys(w.device for w in self.places)]

        def once(method: str, device: str) -> None:
            self._merge(little, method, Where(device=device), f"compiled-{method}-{device}")

        with ThreadPoolExecutor(self.bench.cores) as pool:
            list(pool.map(once, *zip(*wanted, strict=True)))

    def measure(self, method: str, where: Where) -> None:
        """One merge; then the method's table and check as they are with it."""
        self._warm()
        forget_statistics(self.bench.scratch / "caches")
        merged = self._merge(self.family, method, where, "merged")
        say(f"{method}, {where}: {merged.cost.wall_seconds:.1f} s")
        self.longest = max(self.longest, merged.cost.wall_seconds)
        self.runs[method, where].append(merged)
        self._show(method, where)
        holds, said = one_digest(m for (of, _), runs in self.runs.items() if of == method for m in runs)
        self.tell.check(f"`{method}`: one digest over devices, threads and repeats", holds=holds, said=said)

    def watch(self, method: str) -> None:
        """Where the time of a merge on the GPU goes, by one whose every copy and kernel is waited for."""
        self._warm()
        calls = self.bench.scratch / "calls.json"
        self._merge(self.family, method, Where(device="cuda"), "merged", calls)
        for row in watched_rows(calls):
            self.tell.row(f"Calls of the driver in `{method}` by cuda, each waited for by itself", **row)

    def _merge(self, family: Family, method: str, where: Where, out: str, watch: Path | None = None) -> Merged:
        recipe = self.bench.scratch / f"{out}.yml"
        recipe.write_text(json.dumps(family.recipe(method)))  # JSON is YAML
        return merge(
            self.bench,
            recipe,
            self.bench.scratch / out,
            device=where.device,
            threads=where.threads,
            cache=self.bench.scratch / "caches",
            watch=watch,
        )

    def _warm(self) -> None:
        """Nothing of earlier merges is still being written, and the inputs are in memory."""
        os.sync()
        if cached_share(self.family.files) < 1:
            warm(self.family.files)

    def _show(self, method: str, where: Where) -> None:
        runs = self.runs[method, where]
        unread = self.family.base if method == "linear" else None  # it has no base
        inputs = sum(file.stat().st_size for file in self.family.files if file.parent != unread)
        seconds = median(each.merging for each in runs)
        whole = median(each.report["elapsed_seconds"] for each in runs)  # synced, as the ceiling's output is
        both = (inputs + self.family.output_bytes) / whole / 1e9
        cells = {
            "": str(where),
            "runs": len(runs),
            "wall s": spread([each.cost.wall_seconds for each in runs], 2),
            "CPU-s": spread([each.cost.cpu_seconds for each in runs]),
            "peak RSS": mib(median(each.cost.peak_bytes for each in runs)),
            "inside s": spread([each.report["elapsed_seconds"] for each in runs], 2),
            "merging s": spread([each.merging for each in runs], 2),
            "inputs, GB/s": f"{inputs / seconds / 1e9:.2f}",
            "of the ceiling": f"{both / self.ceiling:.0%}",
        }
        if where.device == "cuda" and "to_gpu" in self.bench.figures:
            share = inputs / seconds / 1e9 / self.bench.figures["to_gpu"]
            cells["of the rate to the GPU"] = f"{share:.0%}"
            verdict = "reached" if share >= GOAL else "not reached"
            self.tell.row(GOAL_TABLE, method=method, share=f"{share:.0%}", **{f"{GOAL:.0%}": verdict})
        self.tell.row(f"`{method}`", **cells)
