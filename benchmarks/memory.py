"""Peak memory of a merge against its projection and the budget, for models many times larger than the budget.

Each merge is a process of its own. The same model with fewer layers is measured beside it: at one budget the peak must
not depend on the size. The budget bounds buffers; Python, torch and the compiler come on top, in the projection.

    python -m benchmarks.memory build/bench --dtype float32 --experts 2 --budgets 256MiB,1GiB
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import checkpoints
from benchmarks.checkpoints import Family
from benchmarks.measure import Run, bring_cache_to, mib, run, table, write_report

SEMANTICS = {"ties paper": "paper", "ties mergekit": "mergekit", "linear": None}
INDEPENDENT = 0.10
"""Peaks of one request may differ by this share over model sizes."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One merge. method: a key of SEMANTICS."""

    family: Family
    method: str
    budget: str
    backend: str
    measured: Run

    @property
    def report(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.measured.stdout)
        return found

    @property
    def over_projection(self) -> bool:
        return self.measured.peak_bytes > int(self.report["projected_bytes"])

    def cells(self) -> tuple[object, ...]:
        projected, peak = self.report["projected_bytes"], self.measured.peak_bytes
        return (
            f"{self.method}, {self.family.parameters / 1e9:.2f}B {self.family.dtype}, {self.backend}",
            f"{self.family.input_bytes / 1e9:.2f} GB",
            self.budget,
            mib(self.report["unit_bytes"]),
            mib(projected),
            mib(peak),
            f"{peak / projected:.0%}",
            mib(self.measured.anonymous_bytes),
            self.report["kernel"],
            f"{self.measured.wall_seconds:.1f}",
        )


HEADER = [
    *(
        "",
        "inputs",
        "budget",
        "unit",
        "projected",
        "peak RSS",
        "of projected",
        "of it not file pages",
        "kernel",
        "wall s",
    ),
]


def measure(family: Family, method: str, budget: str, backend: str, work: Path) -> Case:
    name, _, semantics = method.partition(" ")
    recipe, out, statistics = work / "recipe.yml", work / "out", work / "statistics"
    shutil.rmtree(work, ignore_errors=True)
    statistics.mkdir(parents=True)
    recipe.write_text(json.dumps(family.recipe(name)))
    bring_cache_to("warm", family.files)
    measured = run(
        [
            *(sys.executable, "-m", "ties_dist", "merge", recipe, out, "--json", "--read-backend", backend),
            *("--memory-budget", budget, *(["--semantics", semantics] if semantics else [])),
        ],
        environment={"TIES_DIST_CACHE": str(statistics), "CUDA_VISIBLE_DEVICES": ""},
    )
    shutil.rmtree(work)
    case = Case(family=family, method=method, budget=budget, backend=backend, measured=measured)
    print(f"{case.cells()[0]}, {budget}: {mib(measured.peak_bytes)}", file=sys.stderr, flush=True)
    return case


def problems(cases: Sequence[Case]) -> list[str]:
    """Peaks above their projection, and requests whose peak grows with the model."""
    found = [
        f"{case.cells()[0]} at {case.budget}: peak {mib(case.measured.peak_bytes)} is above the projection"
        for case in cases
        if case.over_projection
    ]
    by_request: dict[tuple[str, str, str], list[Case]] = {}
    for case in cases:
        if case.report["kernel"] == "compiled":  # an eager run lacks the compiler's memory: another kind of process
            by_request.setdefault((case.method, case.budget, case.backend), []).append(case)
    for request, alike in by_request.items():
        peaks = [case.measured.peak_bytes for case in sorted(alike, key=lambda case: case.family.parameters)]
        if peaks[-1] > peaks[0] * (1 + INDEPENDENT):
            found.append(f"{', '.join(request)}: the largest model peaks at {peaks[-1] / peaks[0]:.0%} of the smallest")
    return found


def words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory of merges against projection and budget.")
    parser.add_argument("folder", type=Path, nargs="?", default=Path("build/bench"))
    checkpoints.add_arguments(parser, dtype="float32", experts=2)
    parser.add_argument("--smaller-layers", type=int, default=4, help="of the smaller model measured beside it")
    parser.add_argument("--budgets", type=words, default=["256MiB", "512MiB", "1GiB"])
    parser.add_argument("--methods", type=words, default=list(SEMANTICS))
    parser.add_argument("--backends", type=words, default=["mmap", "pread"])
    parser.add_argument("--report", action="store_true", help="write benchmarks/results/DATE-memory.md")
    options = parser.parse_args()

    cases = []
    for layers in (options.smaller_layers, options.layers):
        chosen = argparse.Namespace(**{**vars(options), "layers": layers})
        family = checkpoints.family_from(chosen, options.folder / checkpoints.family_name(chosen))
        for method in options.methods:
            for budget in options.budgets:
                for backend in options.backends:
                    cases.append(measure(family, method, budget, backend, (options.folder / "memory").absolute()))
    wrong = problems(cases)
    verdict = "\n".join(f"- {each}" for each in wrong) or (
        f"No peak is above its projection; among the {sum(case.report['kernel'] == 'compiled' for case in cases)} runs "
        f"with compiled kernels none grows by more than {INDEPENDENT:.0%} with the model."
    )
    write_report(
        "memory",
        "Peak memory against projection and budget",
        options.folder,
        ["RSS counts pages of mapped files.", table(HEADER, [case.cells() for case in cases]), verdict],
        keep=options.report,
    )
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
