"""Kill merges at random until nobody believes that they can be hurt: `make drill`.

Every run merges into an OUT of its own and is killed two to four times, with SIGKILL, at random moments that are spread
over all phases; each time with other unit sizes, threads and readers. After every kill OUT must hold no model, the
older one that is being replaced, or the new one, whole; in the end digest and bytes are those of an undisturbed merge.

    python -m tests.drills.kill_drill --runs 100 --seed 1 --report

Constants that only decide how often work is made durable are lowered, so that a merge of seconds has many such moments.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import RESULTS, machine, table
from tests.drills.forked import Forge
from tests.drills.jobs import late_majority, write_job
from tests.loading import Version, journals_of, standing, version_of

PHASES = ("start", "scan", "merge", "redo", "publish", "done")
"""Where a kill can hit: before there is anything in OUT; before the first journalled unit; before every byte is
journalled; before publishing; before the commit point; after it."""
SETTINGS = {
    "ties_dist.engine.passes:COMMIT_SECONDS": 0.1,
    "ties_dist.engine.passes:SIGNS_FROM": 1e9,  # the majority is to be guessed wrong
    "ties_dist.storage.snapshot:SNAPSHOT_SECONDS": 0.02,
    "ties_dist.planning.sample:SAMPLE_SLICES": 64,
    "ties_dist.executors.local:PARTIAL_SECONDS": 0.01,
}
POLL_SECONDS = 0.002
PUBLISH_SECONDS = 0.05
"""Publishing takes about that long: a dozen small files and renames, each synced."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One kind of merge. older_shards: of the finished model that it replaces; 0 for an empty OUT."""

    name: str
    shards: int = 1
    dtype: torch.dtype = torch.bfloat16
    options: Mapping[str, object] = field(default_factory=dict)
    arguments: Sequence[str] = ()
    older_shards: int = 0
    method: str = "ties"


CASES = (
    Case(name="whole model, 3 shards", shards=3, arguments=("--threshold-pass", "scan")),
    Case(name="per tensor, exact_k", options={"trim_scope": "tensor", "tie_policy": "exact_k"}),
    Case(
        name="exact_k, 3 shards over 3 older",
        shards=3,
        options={"tie_policy": "exact_k"},
        arguments=("--overwrite",),
        older_shards=3,
    ),
    Case(name="wrong prediction, float32", dtype=torch.float32, arguments=("--threshold-pass", "speculate")),
    Case(name="speculated, 1 shard over 3 older", arguments=("--overwrite",), older_shards=3),
    Case(name="sums, 3 shards", shards=3, method="model_stock"),
    Case(
        name="3 shards over 1 older",
        shards=3,
        arguments=("--overwrite", "--threshold-pass", "scan"),
        older_shards=1,
    ),
)


@dataclass(frozen=True, kw_only=True)
class Reference:
    """An undisturbed merge of a case. older: OUT of the model that is replaced, ready to be copied."""

    case: Case
    recipe: Path
    report: Mapping[str, Any]
    manifest: Mapping[str, Any]
    versions: Mapping[str, Version]
    older: Path | None
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Run:
    """One merge that was killed and finished. kills: phases that were hit."""

    case: str
    kills: tuple[str, ...]
    resumed_units: int
    units: int
    problems: tuple[str, ...]


@dataclass
class Drill:
    forge: Forge
    folder: Path
    draw: random.Random
    logs: int = 0

    def merge(self, recipe: Path, out: Path, *arguments: object) -> Any:
        self.logs += 1
        log = self.folder / f"{self.logs}.log"
        given = ("merge", recipe, out, "--kernel", "eager", "--json", "-q", *arguments)
        return self.forge.start(*given, log=log, settings=SETTINGS)

    def finish(self, recipe: Path, out: Path, *arguments: object) -> dict[str, Any]:
        ended = self.merge(recipe, out, *arguments)
        if (status := ended.wait()) != 0:
            raise SystemExit(f"a merge ended with {status}:\n{ended.log.read_text()}")
        text = ended.log.read_text()
        report: dict[str, Any] = json.loads(text[text.index("{\n") :])  # after warnings, if any
        ended.log.unlink()
        return report

    def reference(self, case: Case, elements: int) -> Reference:
        folder = self.folder / case.name.replace(" ", "-").replace(",", "")
        count = elements if case.dtype == torch.bfloat16 else elements // 2
        models = late_majority(count // 576 * 576, dtype=case.dtype)
        recipe = write_job(folder / "new", models, shards=case.shards, options=case.options, method=case.method)
        versions, older = {}, None
        if case.older_shards:
            source = write_job(folder / "old", models, shards=case.older_shards, density=0.9)
            older = folder / "old" / "out"
            self.finish(source, older)
            versions["old"] = version_of(older)
        out = folder / "new" / "out"
        began = time.monotonic()
        chosen = ("--cache-dir", folder / "cache", "--unit-size", "1MiB", *case.arguments)
        report = self.finish(recipe, out, *chosen)
        seconds = time.monotonic() - began
        versions["new"] = version_of(out)
        return Reference(
            case=case,
            recipe=recipe,
            report=report,
            manifest=manifest(out),
            versions=versions,
            older=older,
            seconds=seconds,
        )

    def run(self, reference: Reference, number: int) -> Run | None:
        """Merge, kill, go on; None where the merge was faster than two kills."""
        case, draw = reference.case, self.draw
        folder = self.folder / f"run-{number}"
        # As deep as the reference's OUT, for the manifest names its inputs relative to OUT.
        out = reference.recipe.parent / f"out-{number}"
        shutil.rmtree(out, ignore_errors=True)
        folder.mkdir(exist_ok=True)
        if reference.older is not None:
            shutil.copytree(reference.older, out)
        kills: list[str] = []
        problems: list[str] = []
        asked = draw.randint(2, 4)
        while len(kills) < asked and kills[-1:] != ["done"]:
            process = self.merge(reference.recipe, out, *self.resources(folder), *case.arguments)
            self.wait_for_a_moment(process, out, reference)
            process.kill(signal.SIGKILL)
            status = process.wait()
            if status != -signal.SIGKILL:
                if status != 0:
                    problems.append(f"ended with {status} by itself: {process.log.read_text()[-2000:]}")
                break
            kills.append(phase(out, reference))
            problems += self.look(out, reference, kills[-1])
            process.log.unlink()
        report = self.finish(reference.recipe, out, *self.resources(folder), *case.arguments)
        problems += self.compare(out, reference, report)
        shutil.rmtree(folder)
        if not problems:
            shutil.rmtree(out)
        if len(kills) < 2 and not problems:
            return None
        return Run(
            case=case.name,
            kills=tuple(kills),
            resumed_units=report["resumed_units"],
            units=report["units"],
            problems=tuple(problems),
        )

    def resources(self, folder: Path) -> tuple[object, ...]:
        draw = self.draw
        return (
            *("--unit-size", draw.choice(("1MiB", "1MiB", "2MiB", "3MiB"))),
            *("--threads", draw.choice((1, 2))),
            *("--read-backend", draw.choice(("mmap", "pread", "direct"))),
            *("--cache-dir", folder / "cache"),
        )

    def wait_for_a_moment(self, process: Any, out: Path, reference: Reference) -> None:
        """Any moment at all, or one soon after a phase has begun: publishing would hardly ever be hit otherwise."""
        wanted = self.draw.choice((None, "start", "scan", "merge", "redo", "publish", "publish"))
        if wanted is None:
            time.sleep(self.draw.uniform(0, 1.1 * reference.seconds))
            return
        while process.running() and PHASES.index(phase(out, reference)) < PHASES.index(wanted):
            time.sleep(POLL_SECONDS)
        phases = reference.report["phases"]
        lasts = {"start": 0.1, "publish": PUBLISH_SECONDS}.get(wanted, phases.get(wanted, 0.3))
        time.sleep(self.draw.uniform(0, lasts))

    def look(self, out: Path, reference: Reference, phase: str) -> list[str]:
        """What is wrong with OUT after a kill."""
        try:
            shown = standing(out, reference.versions)
        except AssertionError as error:
            return [f"after a kill in {phase}: {error}"]
        older = "old" if reference.older is not None else None
        allowed = {"publish": {older, None}, "done": {"new"}}.get(phase, {older})
        return [] if shown in allowed else [f"after a kill in {phase} OUT shows {shown}, not one of {allowed}"]

    def compare(self, out: Path, reference: Reference, report: Mapping[str, Any]) -> list[str]:
        """What differs from an undisturbed merge."""
        problems = []
        if report["output_digest"] != reference.report["output_digest"]:
            problems.append(f"digest {report['output_digest']}, expected {reference.report['output_digest']}")
        found = version_of(out)
        if found != reference.versions["new"]:
            names = found.keys() | reference.versions["new"].keys()
            wrong = sorted(n for n in names if found.get(n) != reference.versions["new"].get(n))
            problems.append(f"files that differ: {wrong}")
        if manifest(out) != reference.manifest:
            problems.append("the manifest differs")
        if left := [p.name for p in (out / ".ties_dist").iterdir() if p.is_dir()]:
            problems.append(f"left behind: {left}")
        for name in ("majority_sign", "conflict_fraction", "elements", "tensors"):
            if report[name] != reference.report[name]:
                problems.append(f"{name} differs: {report[name]}, expected {reference.report[name]}")
        return problems


def manifest(out: Path) -> Mapping[str, Any]:
    """Without what differs between runs: the counts beside predicted thresholds, and what a secret chose."""
    found: dict[str, Any] = json.loads((out / ".ties_dist" / "manifest.json").read_text())
    found["origin"]["thresholds"] = [[t[0][0], *t[1:]] for t in found["origin"]["thresholds"]]
    del found["origin"]["sight"]
    return found


def phase(out: Path, reference: Reference) -> str:
    """Where a merge is, or was when it was killed, by what is in OUT."""
    # The manifest is written after the old model has gone, so that what then has the last name is the new one.
    last = "model.safetensors.index.json" if reference.case.shards > 1 else "model.safetensors"
    new = out / ".ties_dist" / "manifest.json"
    if (out / last).exists() and new.exists() and reference.report["fingerprint"] in new.read_text():
        return "done"
    run = out / ".ties_dist" / reference.report["fingerprint"]
    try:
        record = journals_of(run)
    except FileNotFoundError:  # removed while it was read
        record = journals_of(out / "nothing")
    if not record.publishing and run.is_dir():
        if not record.merged:
            return "scan"
        covered = sum(result.item.nbytes for result in record.covering(record.merged))
        return "redo" if covered == reference.report["bytes_written"] else "merge"
    return "publish" if record.publishing else "start"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=20261122)
    parser.add_argument("--elements", type=int, default=12_000_000, help="of the model, in bfloat16")
    parser.add_argument("--folder", type=Path, default=Path("build/kill-drill"))
    parser.add_argument("--report", action="store_true", help="write benchmarks/results/DATE-kill-drill.md")
    chosen = parser.parse_args()
    folder = chosen.folder.absolute()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    began = time.monotonic()
    runs: list[Run] = []
    too_fast = 0
    with Forge() as forge:
        drill = Drill(forge=forge, folder=folder, draw=random.Random(chosen.seed))
        references = [drill.reference(case, chosen.elements) for case in CASES]
        while len(runs) < chosen.runs:
            done = drill.run(references[len(runs) % len(references)], len(runs))
            if done is None:
                too_fast += 1
                continue
            runs.append(done)
            outcome = "; ".join(done.problems) or "the same bytes"
            print(f"{len(runs):4} {done.case:34} killed in {', '.join(done.kills):36} {outcome}", flush=True)
    text = describe(runs, references, too_fast, time.monotonic() - began, chosen)
    print(f"\n{text}")
    if chosen.report:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{time.strftime('%Y-%m-%d')}-kill-drill.md").write_text(text)
    if any(run.problems for run in runs):
        raise SystemExit(1)
    shutil.rmtree(folder)


def describe(
    runs: Sequence[Run], references: Sequence[Reference], too_fast: int, seconds: float, chosen: argparse.Namespace
) -> str:
    """The report, in Markdown."""
    kills = Counter((run.case, phase) for run in runs for phase in run.kills)
    rows = []
    for reference in references:
        mine = [run for run in runs if run.case == reference.case.name]
        resumed, units = sum(run.resumed_units for run in mine), sum(run.units for run in mine)
        rows.append(
            (
                reference.case.name,
                len(mine),
                sum(len(run.kills) for run in mine),
                *(kills[reference.case.name, phase] for phase in PHASES),
                f"{resumed:,} of {units:,}",
                sum(not run.problems for run in mine),
            )
        )
    total = [sum(row[i] for row in rows) for i in range(1, 3 + len(PHASES))]
    resumed, units = sum(run.resumed_units for run in runs), sum(run.units for run in runs)
    good = sum(not run.problems for run in runs)
    rows.append(("all", *total, f"{resumed:,} of {units:,}", good))
    header = ["merge", "runs", "kills", *(f"in {phase}" for phase in PHASES), "units taken over", "same bytes"]
    written = sorted({reference.report["bytes_written"] for reference in references})
    described = "\n".join(f"- {name}: {value}" for name, value in machine(chosen.folder).items())
    problems = [f"- run {i}, {run.case}: {p}" for i, run in enumerate(runs) for p in run.problems]
    command = f"--runs {chosen.runs} --seed {chosen.seed} --elements {chosen.elements}"
    sizes = " or ".join(dict.fromkeys(f"{size / 2**20:.0f} MiB" for size in written))
    sections = [
        f"# Kill drill: {len(runs)} merges, {total[1]} kills, {good} with the bytes of an undisturbed merge",
        f"`python -m tests.drills.kill_drill {command}`, {time.strftime('%Y-%m-%d')}, {seconds / 60:.1f} minutes",
        described,
        METHOD.format(sizes=sizes, too_fast=too_fast),
        table(header, rows),
        PHASES_EXPLAINED,
        "\n".join(["Problems:", *problems]) if problems else "No problem was found.",
    ]
    return "\n\n".join(sections) + "\n"


METHOD = """\
Base and three experts, outputs of {sizes}, units of 1 to 3 MiB, 1 or 2 threads, any way of reading: drawn anew for
every start. Each merge is a process of its own, killed with SIGKILL two to four times at random moments: anywhere in
the time that an undisturbed merge takes, or soon after a phase has begun. The majority sign is guessed wrong at first,
so there are always units to redo. Page cache warm, eager kernel. Work is made durable every 0.1 s instead of 2 s
(counts of a scan: 0.02 s instead of 20 s), so that a merge of seconds has many such moments. {too_fast} more merges
ended before their second kill and are not counted."""
PHASES_EXPLAINED = """\
Phases, by what a kill left in OUT: *start*, nothing of this merge; *scan*, no unit journalled; *merge*, not every byte
journalled; *redo*, until publishing; *publish*, until the commit point; *done*, after it. After every kill OUT was
asked what a loader would find: no model, the older one whole (until publishing began), or the new one whole. Compared
in the end: digest, every file's bytes, manifest, counts per tensor."""


if __name__ == "__main__":
    main()
