"""Merge on a Ray cluster while workers, nodes and drivers are killed, paused and confused: `make drill-ray`.

Long-lived clusters of several nodes on this machine, one in each lane. Every run merges into an OUT of its own, and
one to three faults strike at random moments; where a driver ends before its time, the same command is given again. In
the end the bytes must be those of the local executor, and whatever a driver said must be one clear message.

    python -m tests.drills.ray_drill --runs 200 --seed 0 --report
    python -m tests.drills.ray_drill --seed 0 --only 17

Drivers are forked (`forked`), so that a run takes seconds. A run draws from the seed and its own number alone.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import ray
from ray.cluster_utils import Cluster

from benchmarks.measure import RESULTS, machine, table
from tests.drills.forked import REPOSITORY, Forge, Forked
from tests.drills.jobs import late_majority, write_job
from tests.drills.kill_drill import PHASES, Case, Reference, phase
from tests.drills.ray_faults import MESSAGE_FAULTS, WORKER_FAULTS, hits
from tests.loading import version_of
from ties_dist.cache import KERNELS
from ties_dist.engine.verify import verify
from ties_dist.output.report import MergeReport
from ties_dist.planning.options import RunOptions
from ties_dist.progress import LogProgress
from ties_dist.storage.local_place import LocalPlace

SETTINGS = {
    "ties_dist.engine.passes:COMMIT_SECONDS": 0.1,
    "ties_dist.engine.passes:SIGNS_FROM": 1e9,  # the majority is to be guessed wrong
    "ties_dist.storage.snapshot:SNAPSHOT_SECONDS": 0.1,
    "ties_dist.planning.sample:SAMPLE_SLICES": 64,
    "ties_dist.output.lock:LEASE_SECONDS": 3.0,
    "ties_dist.output.lock:HEARTBEAT_SECONDS": 0.5,
    "ties_dist.executors.fleet:ORDER_SECONDS": {"merge": 0.0, "fold": 0.0, "call": 0.0},  # an order is one unit
    "ties_dist.executors.fleet:MESSAGE_SECONDS": 0.0,
    "ties_dist.executors.fleet:FIRST_BYTES": 0,
    "ties_dist.executors.fleet:STUCK_SECONDS": 4.0,
    "ties_dist.executors.fleet:GATHER_SECONDS": 3.0,
    "ties_dist.executors.ray:LOOK_SECONDS": 0.5,
}
STRIKES = (
    "worker killed",
    "node killed",
    "driver killed",
    "driver terminated",
    "driver paused",
    "second driver",
    "second driver waits",
)
"""What the drill does itself; the other faults are built into workers and messages."""
LAST = ("driver paused", "second driver waits")
"""After which another driver ends the run."""
FAULTS = (*STRIKES, *WORKER_FAULTS, *MESSAGE_FAULTS)
LASTS = {"start": 0.3, "scan": 2.0, "merge": 1.0, "redo": 0.5, "publish": 0.05}
"""Seconds of each phase, about; `scan` includes the start of the workers."""
CPUS = (2, 2, 1)
"""Of the nodes; the head has none."""
STORE = 80 << 20
CONFIGURATION = {
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 500,
    "health_check_failure_threshold": 3,
}
ORDER_SECONDS = 0.2
"""That every order takes more."""
NUMBERS = 24
"""Orders and answers among which those that are hit are drawn; a run has 30 to 60."""
POLL_SECONDS = 0.01
HANG_SECONDS = 120.0
STOP_SECONDS = 4.0
"""In which a driver that was told to has to end, with a second for a busy machine."""


@dataclass(kw_only=True)
class Run:
    """One merge and what befell it. struck: (fault, phase); missed: faults that found nothing to strike."""

    number: int
    job: str
    struck: list[tuple[str, str]] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    stop_seconds: list[float] = field(default_factory=list)
    resumed_units: int = 0
    units: int = 0
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        faults = [f"{fault} in {phase}" if phase else fault for fault, phase in self.struck]
        faults += [f"({fault})" for fault in self.missed]
        line = f"{self.number:4} {self.job:32} {', '.join(faults) or 'nothing':60} {self.statuses}"
        line += f" {self.seconds:.1f} s, {self.resumed_units} of {self.units} units resumed"
        return "\n     ".join([line, *self.problems])


class Nodes:
    """The cluster: nodes that are killed like machines, everything at once and without a word."""

    def __init__(self) -> None:
        self.path = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), *filter(None, [self.path])])  # of the workers
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 0,
                "object_store_memory": STORE,
                "include_dashboard": False,
                "_system_config": CONFIGURATION,
            },
        )
        self.there: list[tuple[int, Any]] = []
        self.mend()

    def mend(self) -> None:
        """Replace what was killed."""
        for cpus in (Counter(CPUS) - Counter(cpus for cpus, _ in self.there)).elements():
            self.there.append((cpus, self.cluster.add_node(num_cpus=cpus, object_store_memory=STORE)))

    def kill(self, draw: random.Random) -> None:
        _, node = self.there.pop(draw.randrange(len(self.there)))
        raylet = node.all_processes["raylet"][0].process
        process = psutil.Process(raylet.pid)
        for each in (process, *process.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                each.kill()
        raylet.wait()
        self.cluster.remove_node(node, allow_graceful=False)  # what else it has

    def workers(self) -> list[int]:
        """Processes of workers: Ray names them after the actors they run."""
        found = []
        for _, node in self.there:
            raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
            for process in raylet.children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    if "".join(process.cmdline()[:1]).startswith("ray::Drilled"):
                        found.append(process.pid)
        return found

    def close(self) -> None:
        self.cluster.shutdown()
        del os.environ["PYTHONPATH"]
        if self.path is not None:
            os.environ["PYTHONPATH"] = self.path


@dataclass
class Drill:
    forge: Forge
    nodes: Nodes
    folder: Path
    seed: int
    elements: int
    references: dict[tuple[int, str], Reference] = field(default_factory=dict)

    def reference(self, experts: int, semantics: str) -> Reference:
        """A job, and what the local executor makes of it."""
        if (known := self.references.get((experts, semantics))) is not None:
            return known
        models = late_majority(self.elements // 576 * 576)[: 1 + experts]
        job = self.folder / f"{semantics.replace(' ', '-')}-{experts}"
        recipe = write_job(job, models, shards=3, options=SEMANTICS[semantics], weight=1.0)
        began = time.monotonic()
        log, out = self.folder / "local.log", job / "out"
        cache = ("--cache-dir", self.folder / "cache")
        local = self.forge.start("merge", recipe, out, "--unit-size", "1MiB", *cache, log=log)
        if (status := local.wait()) != 0:
            raise SystemExit(f"a merge ended with {status}:\n{log.read_text()}")
        self.references[experts, semantics] = reference = Reference(
            case=Case(name=f"{semantics}, {experts} experts", shards=3),
            recipe=recipe,
            report=vars(report_of(out)),
            manifest={},
            versions={"new": version_of(out)},
            older=None,
            seconds=time.monotonic() - began,
        )
        return reference

    def run(self, number: int) -> Run:
        draw = random.Random(f"{self.seed}-{number}")
        reference = self.reference(*draw.choice(JOBS))
        began = time.monotonic()
        self.nodes.mend()
        each = OneRun(self, reference, number, draw)
        try:
            each.go()
        except Hung as hung:
            each.run.problems.append(str(hung))
            for driver in each.drivers:
                if driver.running():
                    driver.kill()
                    driver.wait()
        each.run.seconds = time.monotonic() - began
        if not each.run.problems:
            shutil.rmtree(each.folder)
            shutil.rmtree(each.out)
        return each.run


SEMANTICS: Mapping[str, Mapping[str, object]] = {
    "paper": {},
    "paper exact_k": {"tie_policy": "exact_k"},
    "mergekit": {"semantics": "mergekit"},
    "peft": {"semantics": "peft"},
}
JOBS = [(experts, semantics) for experts in (2, 3) for semantics in SEMANTICS]


class Hung(Exception):
    """A driver did not end; the message says what it was doing."""


class OneRun:
    """A run's drivers, and what is done to them."""

    def __init__(self, drill: Drill, reference: Reference, number: int, draw: random.Random) -> None:
        self.drill, self.reference, self.draw = drill, reference, draw
        self.run = Run(number=number, job=reference.case.name)
        self.folder = drill.folder / f"run-{number}"
        self.out = reference.recipe.parent / f"out-{number}"
        for path in (self.folder, self.out):
            shutil.rmtree(path, ignore_errors=True)
        self.folder.mkdir()
        # Compiled loops are there, statistics are not.
        shutil.copytree(drill.folder / "cache" / KERNELS, self.folder / "cache" / KERNELS)
        self.faults = draw.sample(FAULTS, draw.randint(1, 3))
        while len(set(self.faults) & set(LAST)) > 1:
            self.faults.remove(draw.choice(LAST))
        self.logs = 0
        self.drivers: list[Forked] = []
        self.explained: dict[int, str] = {}
        """Exit statuses that what was done accounts for, and what the message has to say."""
        numbers = draw.sample(range(NUMBERS), len(self.faults))
        self.orders = {str(n): f for n, f in zip(numbers, self.faults, strict=True) if f in WORKER_FAULTS}
        self.answers = {str(n): f for n, f in zip(numbers, self.faults, strict=True) if f in MESSAGE_FAULTS}
        most = 2 if "driver paused" in self.faults else 4  # a paused driver keeps its workers
        self.arguments = (
            *("--threshold-pass", draw.choice(("auto", "scan", "speculate"))),
            *("--workers", str(draw.randint(1, most))),
        )
        self.run.job += f", {self.arguments[1]}, {self.arguments[3]}"

    # Drivers

    def start(self, *more: str) -> Forked:
        self.logs += 1
        options = (
            *("--executor", "ray", "--address", self.drill.nodes.cluster.address, "--threads", "1"),
            *("--unit-size", "1MiB", "--worker-timeout", "30", "--cache-dir", self.folder / "cache"),
        )
        faults = {
            "folder": str(self.folder),
            "seconds": ORDER_SECONDS,
            "orders": self.orders,
            "answers": self.answers,
        }
        driver = self.drill.forge.start(
            *("merge", self.reference.recipe, self.out, *options, *self.arguments, *more),
            log=self.folder / f"{self.logs}.log",
            settings=SETTINGS,
            first=("tests.drills.ray_faults:install", faults),
        )
        self.drivers.append(driver)
        return driver

    def wait(self, process: Forked, seconds: float = HANG_SECONDS) -> int:
        """Its exit status. Raises Hung."""
        deadline = time.monotonic() + seconds
        while process.running():
            if time.monotonic() > deadline:
                process.kill(signal.SIGUSR1)
                time.sleep(1)
                process.kill(signal.SIGKILL)
                process.wait()
                raise Hung(f"no end within {seconds:.0f} s, see {process.log}: {process.log.read_text()[-3000:]}")
            time.sleep(POLL_SECONDS)
        status = process.wait()
        self.run.statuses.append(status)
        return status

    def check(self, process: Forked, status: int, allowed: Mapping[int, str]) -> None:
        """Whether a driver's end was to be expected, and what it said is clear."""
        said = process.log.read_text() if process.log.exists() else ""
        if status not in allowed or not re.search(allowed[status], said):
            self.run.problems.append(f"{process.log} ended with {status}: {said[-3000:]}")
        messages = re.findall(r"^\w*Error: .*|^Interrupted: .*", said, re.MULTILINE)
        if "Traceback" in said or (status in (2, 75) and len(messages) != 1):
            self.run.problems.append(f"{process.log} is not one clear message: {said[-3000:]}")

    # A run

    def go(self) -> None:
        current = self.start()
        strikes = sorted((f for f in self.faults if f in STRIKES), key=lambda f: f in LAST)
        beside: Forked | None = None
        for fault in strikes:
            if current.running() and (struck := self.await_moment(current, fault)) is not None:
                strike: Callable[[Forked], Forked | None] = getattr(self, fault.replace(" ", "_"))
                if (then := strike(current)) is not None:
                    self.run.struck.append((fault, struck))
                    current, beside = (current, then) if fault == "second driver waits" else (then, None)
                    continue
            self.run.missed.append(fault)
        self.finish(current)
        if beside is not None:
            status = self.wait(beside)
            self.check(beside, status, {0: "", **self.explained})
            if status:  # it took over, and met with a fault
                self.finish(self.start())
        self.look()

    def finish(self, current: Forked) -> None:
        """Wait for its end, and give the same command again where that was not the one that was wanted."""
        for _ in range(6):
            status = self.wait(current)
            allowed = {0: "", **self.explained}
            if "disk full" in hits(self.folder):
                allowed[2] = "the disk is full"
            self.check(current, status, allowed)
            (self.folder / "full").unlink(missing_ok=True)
            if status == 0:
                return
            current = self.start(*(("--wait",) if "second driver waits" in self.faults else ()))
        self.run.problems.append("the same command did not end well six times")
        self.wait(current)

    def look(self) -> None:
        """At what stands in OUT in the end."""
        run, reference = self.run, self.reference
        for fault in (*WORKER_FAULTS, *MESSAGE_FAULTS):
            if fault in self.faults:
                if fault in hits(self.folder):
                    run.struck.append((fault, ""))
                else:
                    run.missed.append(fault)
        try:
            report = report_of(self.out)
            verify(LocalPlace(self.out), RunOptions(), sample=0, progress=Quiet())
        except Exception as error:
            run.problems.append(f"{type(error).__name__}: {error}")
            return
        run.resumed_units, run.units = report.resumed_units, report.units
        if report.output_digest != reference.report["output_digest"]:
            run.problems.append(f"digest {report.output_digest}, expected {reference.report['output_digest']}")
        found, wanted = version_of(self.out), reference.versions["new"]
        if wrong := sorted(n for n in found.keys() | wanted.keys() if found.get(n) != wanted.get(n)):
            run.problems.append(f"files that differ: {wrong}")
        if left := [p.name for p in (self.out / ".ties_dist").iterdir() if p.is_dir()]:
            run.problems.append(f"left behind: {left}")
        deadline = time.monotonic() + 20
        while (left_workers := self.drill.nodes.workers()) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        if left_workers:
            run.problems.append(f"workers that did not end with their drivers: {left_workers}")

    def await_moment(self, current: Forked, fault: str) -> str | None:
        """Any moment at all, or one soon after a phase has begun. Returns the phase; None where the driver ended."""
        wanted = self.draw.choice((None, "start", "scan", "merge", "merge", "redo", "publish"))
        if fault in ("worker killed", "node killed") and wanted in (None, "start"):
            wanted = "scan"
        pause = self.draw.uniform(0, LASTS.get(wanted or "", 4.0))
        while current.running() and PHASES.index(self.phase()) < PHASES.index(wanted or "start"):
            time.sleep(POLL_SECONDS)
        if "second" in fault:  # else it might be the first
            while current.running() and not self.is_held_by(current):
                time.sleep(POLL_SECONDS)
        deadline = time.monotonic() + pause
        while current.running() and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        while fault == "worker killed" and current.running() and not self.drill.nodes.workers():
            time.sleep(POLL_SECONDS)
        return self.phase() if current.running() else None

    def is_held_by(self, process: Forked) -> bool:
        with suppress(OSError):
            return f'"pid": {process.pid},' in (self.out / ".ties_dist" / "lock").read_text()
        return False

    def phase(self) -> str:
        return phase(self.out, self.reference)

    # Strikes. Each returns the driver that goes on (or that waits, beside it); None where there was nothing to strike.

    def worker_killed(self, current: Forked) -> Forked | None:
        if not (there := self.drill.nodes.workers()):
            return None
        try:
            os.kill(self.draw.choice(there), signal.SIGKILL)
        except ProcessLookupError:
            return None
        return current

    def node_killed(self, current: Forked) -> Forked:
        self.drill.nodes.kill(self.draw)
        return current

    def driver_killed(self, current: Forked) -> Forked | None:
        current.kill(signal.SIGKILL)
        status = self.wait(current)
        self.check(current, status, {0: "", -signal.SIGKILL: "", **self.explained})
        return self.start()

    def driver_terminated(self, current: Forked) -> Forked | None:
        while current.running() and not current.log.exists():  # it does not listen yet
            time.sleep(POLL_SECONDS)
        time.sleep(0.1)
        began = time.monotonic()
        current.kill(signal.SIGTERM)
        status = self.wait(current)
        self.run.stop_seconds.append(time.monotonic() - began)
        self.check(current, status, {0: "", 75: "stopped", **self.explained})
        if self.run.stop_seconds[-1] > STOP_SECONDS:
            self.run.problems.append(f"{current.log}: told to stop, it ended after {self.run.stop_seconds[-1]:.1f} s")
        return self.start()

    def driver_paused(self, current: Forked) -> Forked:
        """Another takes over; when the first goes on, it must do no harm."""
        current.kill(signal.SIGSTOP)
        other = self.start("--wait")
        try:
            self.finish(other)
            before = {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in self.out.iterdir() if p.is_file()}
        finally:
            current.kill(signal.SIGCONT)
        lost = {2: "this run lost|another run is merging"}
        status = self.wait(current)
        self.check(current, status, {0: "", **self.explained, **lost})
        after = {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in self.out.iterdir() if p.is_file()}
        if before != after:
            self.run.problems.append("a driver that had been replaced wrote into OUT")
        return self.start()  # which finds it done

    def second_driver(self, current: Forked) -> Forked:
        other = self.start()
        held = f"another run is merging into {re.escape(str(self.out))}: process {current.pid} on "
        status = self.wait(other)
        ended = {} if current.running() else {0: "", **self.explained}
        self.check(other, status, {2: held, **ended})
        return current

    def second_driver_waits(self, current: Forked) -> Forked:
        self.explained[2] = "this run lost"  # where this machine is too busy for its lease
        return self.start("--wait")


class Quiet(LogProgress):
    def begin(self, phase: str, total_bytes: int) -> None: ...

    def advance(self, done_bytes: int) -> None: ...

    def end(self) -> None: ...


def report_of(out: Path) -> MergeReport:
    return MergeReport.from_json((out / ".ties_dist" / "report.json").read_text())


@contextmanager
def drilling(folder: Path, seed: int, elements: int) -> Iterator[Drill]:
    """A drill with its cluster, as a context; nothing of it is left after."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with Forge(imports=("ray", "ties_dist.executors.ray", "tests.drills.ray_faults")) as forge:
        nodes = Nodes()
        try:
            yield Drill(forge, nodes, folder, seed, elements)
        finally:
            nodes.close()


def drive(folder: Path, seed: int, elements: int, numbers: Sequence[int]) -> list[Run]:
    """Runs on one cluster, in a process of its own."""
    runs = []
    with drilling(folder, seed, elements) as drill:
        for number in numbers:
            runs.append(drill.run(number))
            print(runs[-1], flush=True)
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="*", help="the numbers of runs to do again")
    parser.add_argument("--lanes", type=int, default=2, help="clusters at once: a run mostly waits")
    parser.add_argument("--elements", type=int, default=8_000_000, help="of the model, in bfloat16")
    parser.add_argument("--folder", type=Path, default=Path("build/ray-drill"))
    parser.add_argument("--report", action="store_true", help="write benchmarks/results/DATE-ray-drill.md")
    chosen = parser.parse_args()
    began = time.monotonic()
    numbers = chosen.only or range(chosen.runs)
    with ProcessPoolExecutor(chosen.lanes, mp_context=get_context("spawn")) as pool:
        lanes = [
            pool.submit(drive, chosen.folder.absolute() / f"lane-{i}", chosen.seed, chosen.elements, own)
            for i in range(chosen.lanes)
            if (own := numbers[i :: chosen.lanes])
        ]
        runs = sorted((run for lane in lanes for run in lane.result()), key=lambda run: run.number)
    text = describe(runs, time.monotonic() - began, chosen)
    print(f"\n{text}")
    if chosen.report:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{time.strftime('%Y-%m-%d')}-ray-drill.md").write_text(text)
    if any(run.problems for run in runs):
        raise SystemExit(1)


def describe(runs: Sequence[Run], seconds: float, chosen: argparse.Namespace) -> str:
    """The report, in Markdown."""
    rows = []
    for fault in FAULTS:
        met = [(struck, run) for run in runs for struck in run.struck if struck[0] == fault]
        missed = sum(run.missed.count(fault) for run in runs)
        phases = Counter(phase for (_, phase), _ in met)
        places = [phases[phase] if fault in STRIKES else "" for phase in PHASES[:-1]]
        good = sum(not run.problems for _, run in met)
        rows.append((fault, len(met) + missed, len(met), *places, f"{good} of {len(met)}"))
    struck = sum(len(run.struck) for run in runs)
    totals = [sum(int(row[i] or 0) for row in rows) for i in range(1, 3 + len(PHASES) - 1)]
    good = sum(not run.problems for run in runs)
    rows.append(("all", *totals, ""))
    header = ["fault", "drawn", "struck", *(f"in {phase}" for phase in PHASES[:-1]), "runs that ended right"]
    statuses = Counter(status for run in runs for status in run.statuses)
    ends = [(STATUSES.get(s, s), n) for s, n in sorted(statuses.items(), reverse=True)]
    stops = [s for run in runs for s in run.stop_seconds] or [0.0]
    resumed = [run for run in runs if run.resumed_units]
    each = [run.seconds for run in runs]
    command = f"--runs {len(runs)} --seed {chosen.seed} --elements {chosen.elements}"
    described = machine(chosen.folder) | {"ray": ray.__version__}
    problems = [f"- run {run.number}, {run.job}: {p}" for run in runs for p in run.problems]
    faultless = sum(not run.struck for run in runs)
    sections = [
        f"# Ray drill: {len(runs)} merges, {struck} faults, {good} with the bytes of the local executor",
        f"`python -m tests.drills.ray_drill {command}`, {time.strftime('%Y-%m-%d')}, {seconds / 60:.1f} minutes",
        "\n".join(f"- {name}: {value}" for name, value in described.items()),
        METHOD.format(
            lanes=chosen.lanes, nodes=len(CPUS), cpus=", ".join(map(str, CPUS)), size=2 * chosen.elements / 2**20
        ),
        table(header, rows),
        FAULTS_EXPLAINED.format(faultless=faultless),
        table(["end of a driver", "how many"], ends),
        f"A driver told to stop had ended after {median(stops):.1f} s (median of {len(stops)}), {max(stops):.1f} s at "
        f"most. {len(resumed)} runs took units over from an earlier driver: {sum(r.resumed_units for r in resumed):,} "
        f"of their {sum(r.units for r in resumed):,}. A run took {median(each):.1f} s (median), {max(each):.1f} s at "
        "most.",
        "\n".join(["Problems:", *problems]) if problems else "No problem was found.",
    ]
    return "\n\n".join(sections) + "\n"


STATUSES = {
    0: "0: done, or done already",
    2: "2: one clear message: another driver holds OUT or took it over, or the disk is full",
    75: "75: stopped, can be resumed",
    -signal.SIGTERM: "SIGTERM, before it listened",
    -signal.SIGKILL: "SIGKILL, by the drill",
}
METHOD = """\
{lanes} Ray clusters side by side, each for its share of the runs: a head without CPUs and {nodes} nodes ({cpus} CPUs)
on this machine; a killed node is replaced before the next run. Base and two or three experts in bfloat16, three shards,
{size:.0f} MiB of output in units of 1 MiB, one unit an order, each order made 0.2 s longer so that there is a moment to
strike. Drawn for every run: semantics, number of experts, `--threshold-pass`, 1 to 4 workers of one thread, one to
three different faults, and their moments. Lowered so that a run of seconds shows them: lease (3 s), time after which an
order counts as stuck (4 s), time between commits (0.1 s), and health checks of Ray (1.5 s). The majority sign is
guessed wrong at first, so there are units to redo."""
FAULTS_EXPLAINED = """\
Phases, by what is in OUT when a fault strikes: *start*, nothing; *scan*, no unit journalled (workers start in it);
*merge*, not every byte journalled; *redo*, until publishing; *publish*, until the commit point; others struck after
it. What is built into workers and messages strikes at an order or answer drawn by number; what was drawn and did not
strike found the merge done before its moment ({faultless} runs had no other). `disk full` fails all writes until the
driver has ended; `driver paused` has another driver take over and end the merge before the first goes on. Checked in
the end: digest and every file against the local executor's, `verify`, no run left in OUT, no worker left in the
cluster; on the way: every exit status, one message without a traceback, and that a driver that was replaced changed
no file."""


if __name__ == "__main__":
    main()
