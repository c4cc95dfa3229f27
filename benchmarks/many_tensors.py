"""What a tensor costs: `plan` and `merge` of many small tensors, per tensor.

Twenty tensors of the same shape show what a process costs anyway; that is subtracted. A quarter of the tensors shows
whether the cost per tensor grows with their number, as it does where a graph of tasks is scheduled.

    python -m benchmarks.many_tensors build/bench --count 20000
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from statistics import median

from benchmarks.checkpoints import DTYPES, Family, write_family
from benchmarks.measure import Run, bring_cache_to, mib, run, spread, table, write_report

FEW = 20
GROWTH, NOISE_SECONDS = 1.5, 0.5
"""CPU-seconds per tensor of all tensors against those of a quarter of them; more is not linear."""
COMMANDS = ("plan", "merge ties", "merge linear")
HEADER = ["", "wall s", "CPU-s", "wall us per tensor", "CPU-us per tensor", "peak RSS"]


def make(folder: Path, count: int, options: argparse.Namespace) -> Family:
    tensors = {f"layers.{i}.weight": (options.side, options.side) for i in range(count)}
    name = f"{count}-tensors-{options.side}-{options.dtype}"
    return write_family(folder / name, tensors, experts=options.experts, dtype=options.dtype, shard_bytes=500_000_000)


def measure(family: Family, command: str, work: Path, repeats: int) -> list[Run]:
    """Every run of the whole command, statistics cache empty, inputs in the page cache."""
    verb, _, method = command.partition(" ")
    recipe, out, statistics = work / "recipe.yml", work / "out", work / "statistics"
    runs = []
    for _ in range(repeats):
        shutil.rmtree(work, ignore_errors=True)
        statistics.mkdir(parents=True)
        recipe.write_text(json.dumps(family.recipe(method or "ties")))
        bring_cache_to("warm", family.files)
        runs.append(
            run(
                [sys.executable, "-m", "ties_dist", verb, recipe, out, "--json"],
                environment={"TIES_DIST_CACHE": str(statistics), "CUDA_VISIBLE_DEVICES": ""},
            )
        )
    shutil.rmtree(work)
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description="Plan and merge many small tensors.")
    parser.add_argument("folder", type=Path, nargs="?", default=Path("build/bench"))
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--side", type=int, default=32, help="of the square tensors")
    parser.add_argument("--experts", type=int, default=2)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--report", action="store_true", help="write benchmarks/results/DATE-many-tensors.md")
    options = parser.parse_args()

    families = {count: make(options.folder, count, options) for count in (FEW, options.count // 4, options.count)}
    rows, wrong = [], []
    for command in COMMANDS:
        found = {
            count: measure(family, command, (options.folder / "many-tensors").absolute(), options.repeats)
            for count, family in families.items()
        }
        wall = {count: [r.wall_seconds for r in runs] for count, runs in found.items()}
        cpu = {count: [r.cpu_seconds for r in runs] for count, runs in found.items()}
        for count, runs in found.items():
            more = count - FEW
            each = [f"{(median(t[count]) - median(t[FEW])) / more * 1e6:,.0f}" if more else "" for t in (wall, cpu)]
            peak = mib(max(r.peak_bytes for r in runs))
            rows.append((f"{command}, {count:,} tensors", spread(wall[count], 2), spread(cpu[count], 2), *each, peak))
        quarter, whole = (median(cpu[count]) - median(cpu[FEW]) for count in (options.count // 4, options.count))
        if whole > GROWTH * 4 * quarter + NOISE_SECONDS:
            wrong.append(f"- {command}: four times the tensors take {whole / quarter:.1f} times the CPU-s")
    write_report(
        "many-tensors",
        f"{options.count:,} tensors of {options.side} x {options.side}, base and {options.experts} experts",
        options.folder,
        [table(HEADER, rows), "\n".join(wrong) or f"No growth with the number beyond the noise ({NOISE_SECONDS} s)."],
        keep=options.report,
    )
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
