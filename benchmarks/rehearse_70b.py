"""A merge of 560 GB on any disk: base and experts in Llama-3-70B's shapes, read in full, made up as they are read.

Everything but files is the engine's own (`rehearsal`). What making the bytes up costs is measured alone and subtracted
in the open. Each model is a process of its own, so that peaks compare: at one budget they must not grow with the model.

    python -m benchmarks.rehearse_70b --shapes tinyllama-1.1b,llama-3-8b,llama-3-70b --report
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence

from benchmarks.measure import REPOSITORY, Run, mib, table, write_report
from benchmarks.rehearsal import SPECULATE, THREADS, Rehearsal, compile_kernels, in_fresh_process, shapes_list
from benchmarks.shapes import SHAPES

CHECKED_BYTES = 5_000_000_000
"""Models up to this size are merged again with units of another size: the digests must be equal."""
INDEPENDENT = 0.10
"""Peaks may differ by this share over model sizes."""

Found = Mapping[str, tuple[Rehearsal, Run]]


def memory_table(found: Found) -> str:
    rows = [
        (
            name,
            f"{r.parameters / 1e9:.2f}B in {r.tensors:,} tensors, {r.shards} shards",
            f"{r.gigabytes:,.1f} GB",
            f"{r.plan_seconds:.2f}",
            f"{r.units:,} of {mib(r.unit_bytes)}",
            mib(r.projected_bytes),
            mib(r.pool_bytes),
            mib(r.peak_bytes),
            f"{(r.peak_bytes - r.pool_bytes) / r.projected_bytes:.0%}",
        )
        for name, (r, _) in found.items()
    ]
    header = [
        "",
        "each model",
        "inputs",
        "plan s",
        "units",
        "projected",
        "pools",
        "peak RSS",
        "less pools, of projected",
    ]
    return table(header, rows)


def reads_table(found: Found) -> str:
    rows = [
        (
            name,
            f"{r.reads:.3f}",
            r.proof,
            f"{r.redone_units:,}",
            r.kernel,
            ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in r.phases.items()),
            {True: "equal", False: "DIFFERENT", None: "not checked, too large"}[r.same_digest],
        )
        for name, (r, _) in found.items()
    ]
    header = ["", "bytes read / inputs", "thresholds", "units redone", "kernel", "phases, s", "digest, other units"]
    return table(header, rows)


def speed_table(found: Found) -> str:
    rows = [
        (
            name,
            f"{r.passes_seconds:,.1f}",
            f"{r.synthesis_seconds:,.1f}",
            f"{r.net_seconds:,.1f}",
            f"{r.gigabytes / r.passes_seconds:.2f}",
            f"{r.gigabytes / r.net_seconds:.2f}",
            f"{r.passes_cpu_seconds:,.1f}",
            f"{r.synthesis_cpu_seconds:,.1f}",
            f"{r.net_cpu_seconds:,.1f}",
            f"{cost.wall_seconds:,.1f}",
        )
        for name, (r, cost) in found.items()
    ]
    header = ["", "passes, wall s", "synthesis alone", "net", "GB/s of inputs", "net GB/s"]
    return table([*header, "passes, CPU-s", "synthesis alone", "net", "whole process, wall s"], rows)


def problems(found: Found) -> list[str]:
    """Peaks above their projection or that grow with the model, and digests that depend on the cut."""
    wrong = [
        f"{name}: peak {mib(r.peak_bytes)} is above projection and pools"
        for name, (r, _) in found.items()
        if r.peak_bytes > r.projected_bytes + r.pool_bytes
    ]
    wrong += [
        f"{name}: units of another size give another digest" for name, (r, _) in found.items() if r.same_digest is False
    ]
    by_size = sorted((r for r, _ in found.values()), key=lambda r: r.parameters)
    if by_size[-1].peak_bytes > by_size[0].peak_bytes * (1 + INDEPENDENT):
        wrong.append(f"the largest model peaks at {by_size[-1].peak_bytes / by_size[0].peak_bytes:.0%} of the smallest")
    return wrong


def rehearse_all(shapes: Sequence[str], options: argparse.Namespace) -> Found:
    found = {}
    layers = ["--layers", options.layers] if options.layers else []
    common = ["--experts", options.experts, "--threads", options.threads, "--memory-budget", options.memory_budget]
    common += ["--threshold-pass", options.threshold_pass]
    compile_kernels(*common)
    for name in shapes:
        small = 2 * SHAPES[name].scaled(layers=options.layers).elements <= CHECKED_BYTES
        found[name] = in_fresh_process("--shapes", name, *layers, *common, *(["--check"] if small else []))
        print(f"{name}: {found[name][1].wall_seconds:.1f} s", file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Merge models of any size without their files.")
    parser.add_argument("--shapes", type=shapes_list, default=["llama-3-70b"], help="comma-separated")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has, each as it is")
    parser.add_argument("--experts", type=int, default=3)
    parser.add_argument("--memory-budget", default="1GiB")
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--threshold-pass", choices=sorted(SPECULATE), default="auto")
    parser.add_argument("--report", action="store_true", help="write benchmarks/results/DATE-rehearse-70b.md")
    options = parser.parse_args()

    found = rehearse_all(options.shapes, options)
    wrong = problems(found)
    layers = f" with {options.layers} layers each" if options.layers else ""
    request = (
        f"Whole-model TIES at density 0.2 of a base and {options.experts} experts{layers}, bfloat16, {options.threads} "
        f"threads, `--memory-budget {options.memory_budget}`. Weights are noise out of pools, repeated; output is "
        "hashed and discarded: no disk is in these numbers. One run each, kernels compiled before. `less pools`: the "
        "peak without the pools, which no real merge holds. `synthesis alone`: the passes' reads again without "
        "computing (a copy from a pool into a buffer; evenly spread units, scaled to the bytes read). `net`: the "
        "difference, which leaves out what reads and computation take from each other."
    )
    verdict = "\n".join(f"- {each}" for each in wrong) or (
        "Every element was counted once, the counts prove the thresholds, and no peak is above its projection."
        + (f" Peaks grow by no more than {INDEPENDENT:.0%} with the model." if len(found) > 1 else "")
    )
    sections = [request, memory_table(found), reads_table(found), speed_table(found), verdict]
    write_report("rehearse-70b", "Rehearsal of merges that fit no disk here", REPOSITORY, sections, keep=options.report)
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
