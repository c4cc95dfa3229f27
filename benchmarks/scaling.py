"""What an input byte costs as merges grow: in size, experts, threads and number of tensors.

Merges are rehearsed (`rehearsal`), each in a process of its own, so no disk is in the numbers and none limits the size;
costs are net of making the bytes up. A linear engine has one cost per byte. Where a sample's thresholds are too close
to call, the engine reads twice: costs are therefore also given per byte that was read.

    python -m benchmarks.scaling --report
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import cache
from statistics import median

from benchmarks.measure import REPOSITORY, mib, spread, table, write_report
from benchmarks.rehearsal import SPECULATE, THREADS, Rehearsal, compile_kernels, in_fresh_process, shapes_list

PLAN_LIMIT_SECONDS = 20.0
"""For the most tensors asked for: headers of base and three experts."""
HEADER = ["", "inputs", "reads", "thresholds", "wall s / GB", "CPU-s / GB", "net wall s / GB", "net CPU-s / GB"]
PER_READ = ["net CPU-s / GB read", "peak RSS less pools"]


@cache
def rehearsals(
    shapes: str, layers: int | None, experts: int, threads: int, threshold_pass: str, repeats: int
) -> tuple[Rehearsal, ...]:
    """Repeats of one merge; asked for twice, it is run once."""
    few = ["--layers", layers] if layers else []
    common = ["--experts", experts, "--threads", threads, "--threshold-pass", threshold_pass]
    compile_kernels(*common)
    found = []
    for _ in range(repeats):
        rehearsal, cost = in_fresh_process("--shapes", shapes, *few, *common)
        print(f"{shapes}, {experts} experts, {threads} threads: {cost.wall_seconds:.1f} s", file=sys.stderr, flush=True)
        found.append(rehearsal)
    return tuple(found)


def cells(name: str, found: Sequence[Rehearsal]) -> tuple[object, ...]:
    first = found[0]
    return (
        name,
        f"{first.gigabytes:,.1f} GB",
        spread([r.reads for r in found], 2),
        first.proof,
        spread([r.passes_seconds / r.gigabytes for r in found], 3),
        spread([r.passes_cpu_seconds / r.gigabytes for r in found], 3),
        spread([r.net_seconds / r.gigabytes for r in found], 3),
        spread([r.net_cpu_seconds / r.gigabytes for r in found], 3),
        spread([r.net_cpu_seconds / r.gigabytes / r.reads for r in found], 3),
        mib(median(r.peak_bytes - r.pool_bytes for r in found)),
    )


def planning_table(counts: Sequence[int], repeats: int) -> tuple[str, float]:
    """Catalogue and plan of base and three experts, headers made up beforehand; and the seconds of the most tensors."""
    rows, seconds = [], 0.0
    for count in counts:
        found = [in_fresh_process("--tensors", count, "--plan-only")[0] for _ in range(repeats)]
        seconds = median(r.plan_seconds for r in found)
        plans, peak = spread([r.plan_seconds for r in found], 2), median(r.peak_bytes - r.pool_bytes for r in found)
        rows.append((f"{count:,}", found[0].shards, plans, f"{seconds / count * 1e6:,.0f}", mib(peak)))
    return table(["tensors x (base + 3)", "shards", "plan s", "us per tensor", "peak RSS less pools"], rows), seconds


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",") if word]


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost per input byte against size, experts, threads and tensors.")
    parser.add_argument("--shapes", type=shapes_list, default=["tinyllama-1.1b", "llama-3-8b", "llama-3-70b"])
    parser.add_argument("--small", choices=["tinyllama-1.1b", "llama-3-8b"], default="tinyllama-1.1b", help="all else")
    parser.add_argument("--layers", type=int, help="fewer layers than the models have, each as it is")
    parser.add_argument("--experts", type=numbers, default=[2, 3, 4, 8])
    parser.add_argument("--threads", type=numbers, default=[1, 2])
    parser.add_argument("--tensors", type=numbers, default=[1_000, 10_000, 100_000], help="rising")
    parser.add_argument("--threshold-pass", choices=sorted(SPECULATE), default="auto")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--report", action="store_true", help="write benchmarks/results/DATE-scaling.md")
    options = parser.parse_args()

    def run(shapes: str, *, experts: int = 3, threads: int = THREADS) -> tuple[Rehearsal, ...]:
        return rehearsals(shapes, options.layers, experts, threads, options.threshold_pass, options.repeats)

    layers = f" ({options.layers} layers each)" if options.layers else ""
    sizes = [cells(name, run(name)) for name in options.shapes]
    experts = [cells(f"{count} experts", run(options.small, experts=count)) for count in options.experts]
    threads = [cells(f"{count} threads", run(options.small, threads=count)) for count in options.threads]
    plans, seconds = planning_table(options.tensors, options.repeats)
    slow = seconds > PLAN_LIMIT_SECONDS
    verdict = (
        f"{options.tensors[-1]:,} tensors of four models plan in {seconds:.1f} s; "
        f"{'MORE than' if slow else 'allowed are'} {PLAN_LIMIT_SECONDS:.0f} s."
    )
    sections = [
        f"Whole-model TIES at density 0.2, bfloat16, {THREADS} threads where nothing else is said; medians of "
        f"{options.repeats}, in brackets least-greatest. GB of inputs, each byte once; `reads`: how often it was read. "
        "`net`: without making the bytes up, measured alone. Kernels compiled before; writes hashed and discarded.",
        f"Size{layers}, 3 experts:\n\n{table([*HEADER, *PER_READ], sizes)}",
        f"Experts, {options.small}{layers}:\n\n{table([*HEADER, *PER_READ], experts)}",
        f"Threads, {options.small}{layers}, 3 experts:\n\n{table([*HEADER, *PER_READ], threads)}",
        f"Planning, tensors of 64 x 64:\n\n{plans}\n\n{verdict}",
    ]
    write_report("scaling", "Cost per input byte as merges grow", REPOSITORY, sections, keep=options.report)
    if slow:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
