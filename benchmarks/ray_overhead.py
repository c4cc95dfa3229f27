"""What Ray costs: the same merge by this process and by workers of a cluster on this machine, alternating.

Compared are the passes (thresholds, merge, redo), so that starting Ray and its workers is left out; the whole command
is told beside it. With `--unit-size 1MiB` the driver has many small units to hand out: its peak memory is told, too.

    python -m benchmarks.ray_overhead build/bench --repeats 5 --report
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import checkpoints
from benchmarks.checkpoints import Family
from benchmarks.measure import Run, bring_cache_to, mib, run, spread, table, write_report
from ties_dist.cache import KERNELS

WAYS = {
    "local, 2 threads": ["--executor", "local", "--threads", "2"],
    "Ray, 1 worker of 2 threads": ["--executor", "ray", "--address", "local", "--workers", "1", "--threads", "2"],
    "Ray, 2 workers of 1 thread": ["--executor", "ray", "--address", "local", "--workers", "2", "--threads", "1"],
}


def merge(family: Family, work: Path, way: list[str], options: argparse.Namespace) -> tuple[Run, dict[str, Any]]:
    """One whole command into a fresh folder, with kernels compiled before and nothing else kept."""
    recipe, out, cache = work / "ties.yml", work / "out", work / "cache"
    recipe.write_text(json.dumps(family.recipe("ties"), indent=2))
    shutil.rmtree(out, ignore_errors=True)
    for kept in cache.iterdir() if cache.is_dir() else ():
        if kept.name != KERNELS:
            shutil.rmtree(kept)
    bring_cache_to("warm", family.files)
    given = ["--memory-budget", options.memory_budget, "--threshold-pass", options.threshold_pass, "--json"]
    given += ["--unit-size", options.unit_size] if options.unit_size else []
    measured = run(
        [sys.executable, "-m", "ties_dist", "merge", recipe, out, *given, *way],
        environment={"TIES_DIST_CACHE": str(cache), "RAY_USAGE_STATS_ENABLED": "0"},
    )
    return measured, json.loads(measured.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("build/bench"))
    checkpoints.add_arguments(parser)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory-budget", default="1GiB")
    parser.add_argument("--unit-size")
    parser.add_argument("--threshold-pass", default="scan", help="scan: every way does the same work")
    parser.add_argument("--report", action="store_true", help="write benchmarks/results/DATE-ray-overhead.md")
    options = parser.parse_args()
    name = checkpoints.family_name(options)
    family = checkpoints.family_from(options, options.folder / name)
    work = options.folder.absolute() / "ray-overhead"
    work.mkdir(parents=True, exist_ok=True)
    runs: dict[str, list[tuple[Run, dict[str, Any]]]] = defaultdict(list)
    for repeat in range(options.repeats + 1):
        for label, way in WAYS.items():
            done = merge(family, work, way, options)
            if repeat:  # the first compiles
                runs[label].append(done)
                print(f"{label}, repeat {repeat}: {done[0].wall_seconds:.1f} s, {done[1]['phases']}", flush=True)
    digests = {report["output_digest"] for found in runs.values() for _, report in found}
    if len(digests) != 1:
        raise SystemExit(f"digests differ: {digests}")
    passes = {label: [sum(r["phases"].values()) for _, r in found] for label, found in runs.items()}
    local = median(next(iter(passes.values())))
    rows = [
        [
            label,
            spread(passes[label], 2),
            f"{median(passes[label]) / local - 1:+.0%}",
            f"{median([r['bytes_read'] for _, r in found]) / 1e9:.2f}",
            f"{median([r['redone_units'] for _, r in found]):.0f}",
            spread([m.wall_seconds for m, _ in found], 1),
            f"{found[0][1]['units']:,}",
            mib(max(m.peak_bytes for m, _ in found)),
        ]
        for label, found in runs.items()
    ]
    header = [
        "",
        "passes s",
        "against local",
        "GB read",
        "redone units",
        "whole command s",
        "units",
        "peak RSS of the largest process",
    ]
    told = (
        f"{name}: whole-model TIES at density 0.2, `--threshold-pass {options.threshold_pass}`, page cache warm, "
        f"{options.repeats} runs of each, alternating; medians, in brackets least-greatest. Digest `{digests.pop()}` "
        "in all."
    )
    topic = "ray-overhead" + (f"-{options.unit_size}" if options.unit_size else "")
    write_report(topic, "What Ray costs", options.folder, [told, table(header, rows)], keep=options.report)
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
