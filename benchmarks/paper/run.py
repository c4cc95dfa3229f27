"""`python -m benchmarks.paper.run [--quick] [--report]`: trains, merges and evaluates, and says what held."""

from __future__ import annotations

import argparse
import os
import time
from datetime import date
from pathlib import Path

from benchmarks.paper import ROOT
from benchmarks.paper.claims import CLAIMS, Claim
from benchmarks.paper.lab import FULL, QUICK, Lab, say
from benchmarks.paper.report import write_report

RESULTS = ROOT / "benchmarks" / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed and fewer steps; some 15 minutes on two cores")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "paper")
    parser.add_argument("--report", action="store_true", help="write benchmarks/results/DATE-paper-*.md")
    options = parser.parse_args()
    os.environ["TIES_DIST_CACHE"] = str(options.build / "cache")
    size, began = QUICK if options.quick else FULL, time.monotonic()
    labs = [Lab(size=size, seed=seed, build=options.build) for seed in size.seeds]
    for lab in labs:
        for task in (*size.merged, *size.held_out):
            lab.expert([task])
        lab.expert(list(size.merged))
    trained = time.monotonic() - began
    say(f"experts: {trained:.0f} s")
    claims: list[Claim] = []
    for measure in CLAIMS:
        started = time.monotonic()
        claims.append(measure(labs))
        say(f"{claims[-1].title}: {claims[-1].verdict} ({time.monotonic() - started:.0f} s)")
    target = RESULTS if options.report else options.build
    path = write_report(claims, labs, target / f"{date.today()}-paper-{size.name}.md", time.monotonic() - began)
    say(f"report: {path}")


if __name__ == "__main__":
    main()
