"""`python -m benchmarks.paper.run [--quick] [--report]`: trains, merges and evaluates, and says what held."""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import time
from datetime import date
from functools import partial
from pathlib import Path

from benchmarks.paper import ROOT
from benchmarks.paper.claims import CLAIMS, Claim
from benchmarks.paper.domain import Domain
from benchmarks.paper.lab import FULL, QUICK, Lab, Size, say
from benchmarks.paper.processes import at_once
from benchmarks.paper.report import write_report

RESULTS = ROOT / "benchmarks" / "results"
DOMAINS = {"text": "text:Text", "use-lite": "use_lite:UseLite", "vision": "vision:Vision", "clip": "clip:Clip"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed, fewer steps and draws")
    parser.add_argument(
        "--domains", nargs="+", choices=DOMAINS, help="default: all but clip, which needs the hub; of a quick run text"
    )
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "paper")
    parser.add_argument("--report", action="store_true", help="write benchmarks/results/DATE-paper-*.md")
    options = parser.parse_args()
    os.environ["TIES_DIST_CACHE"] = str(options.build / "cache")
    size, began = QUICK if options.quick else FULL, time.monotonic()
    parts: list[tuple[list[Lab], list[Claim]]] = []
    for name in options.domains or (["text"] if options.quick else _by_default()):
        labs = _labs(_domain(name), size, options.build)
        parts.append((labs, _measure(labs)))
    target = RESULTS if options.report else options.build
    label = "-".join([size.name, *(options.domains or [])])
    path = write_report(parts, target / f"{date.today()}-paper-{label}.md", time.monotonic() - began)
    say(f"report: {path}")


def _by_default() -> list[str]:
    if shutil.which("npm") is not None:
        return ["text", "use-lite", "vision"]
    say("use-lite is left out: its base model is fetched by npm, which is not installed")
    return ["text", "vision"]


def _domain(name: str) -> Domain:
    module, _, kind = DOMAINS[name].partition(":")
    made: Domain = getattr(importlib.import_module(f"benchmarks.paper.{module}"), kind)()
    return made


def _labs(domain: Domain, size: Size, build: Path) -> list[Lab]:
    """With all experts trained, or fetched."""
    began = time.monotonic()
    labs = [Lab(domain=domain, size=size, seed=seed, build=build) for seed in size.seeds]
    sets = [list(domain.merged)] if domain.trains else []
    sets += [[task] for task in (*domain.merged, *domain.held_out)]
    at_once(partial(lab.expert, tasks) for lab in labs for tasks in sets)
    say(f"{domain.name}: experts in {time.monotonic() - began:.0f} s")
    return labs


def _measure(labs: list[Lab]) -> list[Claim]:
    claims = []
    for measure in CLAIMS:
        started = time.monotonic()
        if (claim := measure(labs)) is not None:
            claims.append(claim)
            say(f"{labs[0].domain.name}: {claim.title}: {claim.verdict} ({time.monotonic() - started:.0f} s)")
        for lab in labs:
            lab.forget()
    return claims


if __name__ == "__main__":
    main()
