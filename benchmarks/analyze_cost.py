"""What `analyze` costs beside one read of the inputs and beside a merge of them, alternating.

python -m benchmarks.analyze_cost build/bench --layers 4 --cache cold --report
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks import checkpoints
from benchmarks.checkpoints import Family
from benchmarks.measure import Run, bring_cache_to, mib, run, spread, table, warm, write_report
from ties_dist.cache import KERNELS

MOST_READS = 1.5


def command(name: str, family: Family, work: Path, cache: str) -> tuple[Run, dict[str, Any]]:
    """One whole command, with nothing of an earlier one kept but compiled kernels."""
    recipe, out, kept = work / "ties.yml", work / name, work / "cache"
    recipe.write_text(json.dumps(family.recipe("ties"), indent=2))
    shutil.rmtree(out, ignore_errors=True)
    for each in kept.iterdir() if kept.is_dir() else ():
        if each.name != KERNELS:
            shutil.rmtree(each)
    bring_cache_to(cache, family.files)
    arguments = {"merge": ["merge", recipe, out], "analyze": ["analyze", recipe, "--out", out]}[name]
    measured = run(
        [sys.executable, "-m", "ties_dist", *arguments, "--json"], environment={"TIES_DIST_CACHE": str(kept)}
    )
    report = json.loads(measured.stdout)
    return measured, report.get("run", report)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("build/bench"))
    checkpoints.add_arguments(parser)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cache", choices=["warm", "cold"], default="warm")
    parser.add_argument("--report", action="store_true", help="write benchmarks/results/DATE-analyze-CACHE.md")
    options = parser.parse_args()
    name = checkpoints.family_name(options)
    family = checkpoints.family_from(options, options.folder / name)
    work = options.folder.absolute() / "analyze-cost"
    work.mkdir(parents=True, exist_ok=True)
    reads: list[float] = []
    runs: dict[str, list[tuple[Run, dict[str, Any]]]] = defaultdict(list)
    for repeat in range(options.repeats + 1):
        bring_cache_to(options.cache, family.files)
        began = time.monotonic()
        warm(family.files)
        read = time.monotonic() - began
        for way in ("merge", "analyze"):
            done = command(way, family, work, options.cache)
            if repeat:  # the first compiles
                runs[way].append(done)
        if repeat:
            reads.append(read)
    for measured, report in runs["analyze"]:
        if report["bytes_read"] > MOST_READS * family.input_bytes:
            raise SystemExit(f"analyze read {report['bytes_read']:,} bytes of {family.input_bytes:,}")
        if measured.anonymous_bytes > report["projected_bytes"]:
            raise SystemExit(
                f"analyze took {measured.anonymous_bytes:,} of {report['projected_bytes']:,} bytes projected"
            )
    rows = [["one thread reads all", spread(reads), "", "1.00", f"{family.input_bytes / 1e9:.2f}", "", ""]]
    for way, found in runs.items():
        rows.append(
            [
                f"ties-dist {way}",
                spread([m.wall_seconds for m, _ in found]),
                spread([m.cpu_seconds for m, _ in found]),
                f"{max(r['bytes_read'] for _, r in found) / family.input_bytes:.3f}",
                f"{max(m.device_read_bytes for m, _ in found) / 1e9:.2f}",
                mib(max(m.anonymous_bytes for m, _ in found)),
                mib(found[0][1]["projected_bytes"]),
            ]
        )
    header = ["", "s", "CPU-s", "reads of the inputs", "GB from the device", "peak memory", "projected"]
    told = (
        f"{name}: {family.parameters:,} parameters, {options.experts} experts, {family.input_bytes / 1e9:.2f} GB of "
        f"inputs, page cache {options.cache}, {options.repeats} runs of each, alternating; medians, in brackets "
        "least-greatest, elsewhere the worst. Whole commands: the interpreter's start, and for `analyze` the page, "
        "are in "
        "it. Peak memory without pages of mapped files."
    )
    sections = [told, table(header, rows)]
    write_report(f"analyze-{options.cache}", "What `analyze` costs", options.folder, sections, keep=options.report)
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
