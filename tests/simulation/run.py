"""Many schedules, over all cores: `python -m tests.simulation.run --schedules 100000 --report`, or one, `--seed N`."""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import re
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path

from benchmarks.measure import table, write_report
from tests.simulation.world import Schedule, World

MEMORY = Path("/dev/shm")


def work(first: int, count: int, step: int, seconds: float = float("inf")) -> tuple[Counter[str], list[str]]:
    """Seeds first, first + step, ..., for so long; what happened in them, and the failures."""
    logging.disable(logging.CRITICAL)
    happened: Counter[str] = Counter()
    failures = []
    folder = Path(tempfile.mkdtemp(prefix="ties-simulation-", dir=MEMORY if MEMORY.is_dir() else None))
    try:
        world = World.make(folder)
        until = time.monotonic() + seconds
        for seed in range(first, count, step):
            if time.monotonic() > until:
                break
            schedule = Schedule(world, seed)
            try:
                schedule.run()
            except AssertionError as error:
                failures.append(str(error))
            happened["schedules"] += 1
            for line in schedule.told:
                happened[re.sub(r"driver \d+: \w+, | at operation \d+|: .*", "", line).strip()] += 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return happened, failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--schedules", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="end after so long, however many were run")
    parser.add_argument("--seed", type=int, help="replay this one alone")
    parser.add_argument("--report", action="store_true", help="write benchmarks/results/DATE-simulated-schedules.md")
    options = parser.parse_args()
    if options.seed is not None:
        happened, failures = work(options.seed, options.seed + 1, 1)
        print(*(failures or [f"seed {options.seed}: as it must be; {dict(happened)}"]), sep="\n")
        raise SystemExit(1 if failures else 0)
    began, cores = time.monotonic(), len(os.sched_getaffinity(0))
    with multiprocessing.get_context("spawn").Pool(cores) as pool:
        parts = pool.starmap(work, [(i, options.schedules, cores, options.seconds) for i in range(cores)])
    happened = sum((part for part, _ in parts), Counter[str]())
    failures = [failure for _, found in parts for failure in found]
    seconds = time.monotonic() - began
    print(*failures[:20], sep="\n\n")
    rows = [[what, f"{count:,}"] for what, count in happened.most_common()]
    verdict = f"{happened['schedules']:,} schedules in {seconds:,.0f} s, {len(failures)} failures."
    write_report(
        "simulated-schedules", "Simulated schedules of drivers, workers and power cuts", Path(),
        [f"**Simulated** (`tests/simulation/world.py` says what). {verdict}", table(["what happened", "times"], rows)],
        keep=options.report,
    )  # fmt: skip
    raise SystemExit(1 if failures else 0)


if __name__ == "__main__":
    main()
