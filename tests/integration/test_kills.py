"""Real processes, really killed: in scan, merge, redo and publish, resumed by the same command to the same bytes.

A process kills itself at a named call, so that each phase is hit without luck; `tests/drills/kill_drill.py` kills from
outside, at random.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.drills.forked import Forge, Forked
from tests.drills.jobs import late_majority, write_job
from tests.integration.command import finish, start
from tests.loading import Version, journals_of, standing, version_of

ELEMENTS = 9 * 64 * 4608
"""Of bfloat16: 5.1 MiB in three shards, 6 units of 1 MiB."""
UNITS = 6
SMALL_STEPS = {
    "ties_dist.engine.passes:COMMIT_SECONDS": -1.0,
    "ties_dist.engine.passes:SIGNS_FROM": 1e9,  # the majority is to be guessed wrong
    "ties_dist.storage.snapshot:SNAPSHOT_SECONDS": -1.0,
    "ties_dist.planning.sample:SAMPLE_SLICES": 32,
    "ties_dist.output.lock:LEASE_SECONDS": 1.0,
}
"""Whatever is done is journalled at once, and a lease counts as standing still after a second."""
pytestmark = pytest.mark.slow
WRITE = "ties_dist.storage.local:LocalWriter.write"


@dataclass(frozen=True, kw_only=True)
class Job:
    """A recipe, what its merge must give, and an older model to be replaced."""

    recipe: Path
    digest: str
    older: Path
    versions: Mapping[str, Version]


@dataclass(frozen=True, kw_only=True)
class Merges:
    """Starts merges of one recipe into one OUT."""

    forge: Forge
    job: Job
    folder: Path
    counter: list[int] = field(default_factory=lambda: [0])

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def start(self, *options: object, **bend: Any) -> Forked:
        self.counter[0] += 1
        log = self.folder / f"{self.counter[0]}.log"
        cache = self.folder / f"cache-{self.counter[0]}"  # a scan that was cut short leaves its counts in OUT alone
        chosen = ("--unit-size", "1MiB", "--threads", "2", "--threshold-pass", "scan", "--cache-dir", cache, *options)
        given = ("merge", self.job.recipe, self.out, "--kernel", "eager", "--json", *chosen)
        return self.forge.start(*given, log=log, settings=SMALL_STEPS, **bend)

    def killed(self, call: str, number: int, *options: object) -> None:
        ended = self.start(*options, die=(call, number))
        assert ended.wait() == -signal.SIGKILL, ended.log.read_text()

    def finished(self, *options: object) -> dict[str, Any]:
        """The report of a merge that goes through, checked."""
        ended = self.start(*options)
        status = ended.wait()
        text = ended.log.read_text()
        assert status == 0, text
        report: dict[str, Any] = json.loads(text[text.index("{") :])
        assert report["output_digest"] == self.job.digest
        assert standing(self.out, self.job.versions) == "new"
        assert version_of(self.out) == self.job.versions["new"]
        assert [p.name for p in (self.out / ".ties_dist").iterdir() if p.is_dir()] == []
        return report

    @property
    def run(self) -> Path:
        """Where the unfinished merge is."""
        return next(p for p in (self.out / ".ties_dist").iterdir() if p.is_dir())


@pytest.fixture(scope="module")
def forge() -> Iterator[Forge]:
    with Forge() as opened:
        yield opened


def made(forge: Forge, folder: Path, **options: Any) -> Job:
    """Merge an older and the new recipe undisturbed, and look at what they give."""
    models = late_majority(ELEMENTS)
    older = write_job(folder / "older", models, shards=3, density=0.9)
    recipe = write_job(folder / "new", models, shards=3, **options)
    versions, digests = {}, {}
    for name, source in (("old", older), ("new", recipe)):
        ended = forge.start("merge", source, source.parent / "out", "--json", log=folder / f"{name}.log")
        assert ended.wait() == 0, ended.log.read_text()
        versions[name] = version_of(source.parent / "out")
        report = json.loads((source.parent / "out" / ".ties_dist" / "report.json").read_text())
        assert report["majority_sign"] == -1  # guessed wrong at first: there is something to redo
        digests[name] = report["output_digest"]
    return Job(recipe=recipe, digest=digests["new"], older=older, versions=versions)


@pytest.fixture(scope="module")
def whole_model(forge: Forge, tmp_path_factory: pytest.TempPathFactory) -> Job:
    return made(forge, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def per_tensor(forge: Forge, tmp_path_factory: pytest.TempPathFactory) -> Job:
    options = {"trim_scope": "tensor", "tie_policy": "exact_k"}
    return made(forge, tmp_path_factory.mktemp("tensor"), options=options)


@pytest.fixture
def merges(forge: Forge, whole_model: Job, tmp_path: Path) -> Merges:
    return Merges(forge=forge, job=whole_model, folder=tmp_path)


# -- killed ------------------------------------------------------------------------------------------------------------

SCAN = [
    ("ties_dist.worker.merging:Worker.observe", 1),
    ("ties_dist.worker.merging:Worker.observe", 5),
    ("ties_dist.output.journal:Journal.commit", 1),
]
MERGE = [(WRITE, 2), (WRITE, 5), ("os:fdatasync", 3), ("ties_dist.output.journal:Journal.commit", 4)]
REDO = [(WRITE, UNITS + 3), ("os:fdatasync", UNITS + 2), ("ties_dist.engine.passes:Passes.prove", 1)]
NAMES = "ties_dist.engine.run:give_names"
PLACE = "ties_dist.storage.local_place"
PUBLISH = [
    (NAMES, 1),
    (f"{PLACE}:LocalPlace.retire", 1),
    (f"{NAMES} > {PLACE}:write_durably", 1),  # companions, not under their names yet
    (f"{NAMES} > {PLACE}:write_durably", 3),
    (f"{NAMES} > pathlib:Path.replace", 1),
    (f"{NAMES} > pathlib:Path.replace", 3),
    (f"{NAMES} > {PLACE}:sync_folder", 2),  # the manifest has its name
    (f"{NAMES} > {PLACE}:sync_folder", 4),  # the shards have their names, the index is missing
]


@pytest.mark.parametrize(
    ("call", "number"), [("ties_dist.output.lock:RunLock.acquire", 1), ("ties_dist.engine.run:claim", 1), *SCAN]
)
def test_killed_before_anything_was_merged(call: str, number: int, merges: Merges) -> None:
    merges.killed(call, number)
    assert standing(merges.out, merges.job.versions) is None
    report = merges.finished()
    assert report["resumed_units"] == 0
    assert report["thresholds_from"] == "scan"


@pytest.mark.parametrize(("call", "number"), MERGE + REDO)
def test_killed_while_merging_or_redoing(call: str, number: int, merges: Merges) -> None:
    merges.killed(call, number)
    assert standing(merges.out, merges.job.versions) is None
    journalled = {result.item for result in journals_of(merges.run).merged}
    report = merges.finished()
    # A unit that was being redone has other bytes than its line says: it is the only kind that is not taken over.
    assert len(journalled) - 2 <= report["resumed_units"] <= len(journalled)
    assert report["thresholds_from"] == "journal"


@pytest.mark.parametrize(("call", "number"), PUBLISH)
@pytest.mark.parametrize("over", ["nothing", "an_older_model"])
def test_killed_while_publishing(over: str, call: str, number: int, merges: Merges) -> None:
    options = []
    if over == "an_older_model":
        options = ["--overwrite"]
        older = merges.forge.start("merge", merges.job.older, merges.out, "--json", log=merges.folder / "older.log")
        assert older.wait() == 0
    merges.killed(call, number, *options)
    # Over an older model the first move is that of its index, out of the way.
    first_move = call.endswith("Path.replace") and number == 1
    before = (NAMES, f"{PLACE}:LocalPlace.retire", f"{NAMES} > {PLACE}:write_durably")
    began = call not in before and not first_move
    assert standing(merges.out, merges.job.versions) == (None if began or not options else "old")
    assert journals_of(merges.run).publishing
    report = merges.finished(*options)
    assert report["resumed_units"] == report["units"]


def test_killed_after_the_commit_point_is_done(merges: Merges) -> None:
    merges.killed(f"{NAMES} > shutil:rmtree", 1)
    assert standing(merges.out, merges.job.versions) == "new"
    assert merges.finished()["already_done"]


@pytest.mark.parametrize(
    "call", ["ties_dist.worker.merging:Worker.select", WRITE, "os:fdatasync", "ties_dist.output.journal:Journal.commit"]
)
def test_killed_while_tensors_are_selected_and_merged_one_group_after_another(
    call: str, forge: Forge, per_tensor: Job, tmp_path: Path
) -> None:
    merges = Merges(forge=forge, job=per_tensor, folder=tmp_path)
    merges.killed(call, 4)
    record = journals_of(merges.run)
    report = merges.finished()
    assert report["resumed_units"] == len(record.merged)
    assert (len(record.cuts) > 0) == (call != "ties_dist.worker.merging:Worker.select")


def test_killed_again_and_again_with_other_resources_each_time(merges: Merges) -> None:
    small = ("--unit-size", "1MiB", "--threads", "1")
    merges.killed("ties_dist.worker.merging:Worker.observe", 3, "--unit-size", "2MiB")
    merges.killed("ties_dist.worker.merging:Worker.observe", 2, *small)
    merges.killed(WRITE, 3, "--unit-size", "3MiB", "--memory-budget", "300MiB")
    merges.killed(WRITE, 2, *small, "--read-backend", "pread")
    merges.killed("ties_dist.engine.passes:Passes.settle_majority", 1, "--unit-size", "2MiB")
    merges.killed(WRITE, 2, "--unit-size", "4MiB", "--trust-journal")
    merges.killed(f"{NAMES} > pathlib:Path.replace", 2, *small)
    report = merges.finished("--unit-size", "5MiB")
    assert report["resumed_units"] == report["units"]


def test_what_a_kill_left_is_read_again_and_not_believed(merges: Merges) -> None:
    merges.killed(WRITE, 5)
    journal = next(merges.run.glob("journal-*.jsonl"))
    lines = journal.read_bytes().splitlines(keepends=True)
    merged = [result.item for result in journals_of(merges.run).merged]
    journal.write_bytes(b"".join(lines) + lines[-1][: len(lines[-1]) // 2])  # the tail of a line that was being written
    damaged = merged[1].ranges[0]
    with open(merges.run / "parts" / f"{damaged.file}.partial", "r+b") as part:
        part.seek((damaged.start + damaged.stop) // 2)
        part.write(b"not what was merged")
    assert merges.finished()["resumed_units"] == len(merged) - 1


# -- told to stop ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "number"),
    [("ties_dist.worker.merging:Worker.observe", 3), (WRITE, 3), (WRITE, UNITS + 2)],
    ids=["scan", "merge", "redo"],
)
@pytest.mark.parametrize(("by", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGINT"])
def test_a_signal_ends_a_merge_that_can_be_resumed(
    by: signal.Signals, status: int, call: str, number: int, merges: Merges
) -> None:
    ended = merges.start(die=(call, number), by=by)
    assert ended.wait() == status
    said = ended.log.read_text()
    assert "stopped; everything finished is kept. Run the same command again to resume." in said
    assert "Traceback" not in said and "{" not in said  # nothing on standard output
    assert standing(merges.out, merges.job.versions) is None
    assert list(merges.out.glob(".ties_dist/l*k")) == []  # the lock is released
    journalled = {result.item for result in journals_of(merges.run).merged}
    assert merges.finished()["resumed_units"] == len(journalled)


BENT = """
import os, signal, sys, time
from ties_dist.engine import passes
from ties_dist.storage.local import LocalWriter
passes.COMMIT_SECONDS, passes.SIGNS_FROM, number = -1.0, 1e9, int(sys.argv.pop(1))
write, calls = LocalWriter.write, []
def signalled(self, *arguments):
    calls.append(1)
    if len(calls) == 3:
        time.sleep(0.5)  # until the ones before are journalled
        os.kill(os.getpid(), number)
    write(self, *arguments)
LocalWriter.write = signalled
"""


@pytest.mark.parametrize(("by", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_fresh_process_ends_and_resumes_like_a_forked_one(by: signal.Signals, status: int, merges: Merges) -> None:
    given = ("merge", merges.job.recipe, merges.out, "--unit-size", "1MiB", "--json")
    ended = finish(start(int(by), *given, code=BENT))
    assert (ended.status, ended.out) == (status, "")
    resumed = finish(start(*given))
    assert resumed.status == 0, resumed.err
    assert resumed.document["output_digest"] == merges.job.digest
    assert resumed.document["resumed_units"] > 0


def test_a_second_signal_ends_the_process_at_once(merges: Merges) -> None:
    ended = merges.start(die=(WRITE, 3), by=signal.SIGSTOP)
    wait_until_stopped(ended)
    ended.kill(signal.SIGTERM)
    ended.kill(signal.SIGINT)  # two different ones: equal pending signals are one
    ended.kill(signal.SIGCONT)
    assert ended.wait() in (75, 130)
    assert standing(merges.out, merges.job.versions) is None
    merges.finished()


# -- paused ------------------------------------------------------------------------------------------------------------


def wait_until_stopped(process: Forked) -> None:
    deadline = time.monotonic() + 60
    while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        assert process.running() and time.monotonic() < deadline, process.log.read_text()
        time.sleep(0.01)


PAUSES = [
    ("ties_dist.worker.merging:Worker.observe", 3),
    (WRITE, 4),
    ("os:pwrite", 1),  # past the fence: these bytes, of the wrong majority sign, reach the disk after the other's
    ("os:pwrite", 4),
    (WRITE, UNITS + 2),
    ("os:pwrite", UNITS + 2),
    *PUBLISH,
]


@pytest.mark.parametrize(("call", "number"), PAUSES)
def test_a_paused_run_that_was_replaced_gives_up_and_harms_nothing(call: str, number: int, merges: Merges) -> None:
    paused = merges.start(die=(call, number), by=signal.SIGSTOP)
    wait_until_stopped(paused)
    refused = merges.start()
    assert refused.wait() == 2
    assert f"another run is merging into {merges.out}: process {paused.pid} on" in refused.log.read_text()
    merges.finished("--wait")  # takes over once the lease has stood still
    before = {path: path.stat().st_mtime_ns for path in merges.out.iterdir() if path.is_file()}
    paused.kill(signal.SIGCONT)
    assert paused.wait() == 2
    assert f"LockedError: this run lost {merges.out}" in paused.log.read_text()
    assert "Traceback" not in paused.log.read_text()
    assert version_of(merges.out) == merges.job.versions["new"]
    assert {path: path.stat().st_mtime_ns for path in merges.out.iterdir() if path.is_file()} == before
    assert sorted(os.listdir(merges.out / ".ties_dist")) == ["lock.guard", "manifest.json", "report.json"]


def test_of_two_merges_at_once_one_wins_and_one_waits_for_its_result(merges: Merges) -> None:
    both = [merges.start("--wait"), merges.start("--wait")]
    assert [each.wait() for each in both] == [0, 0]
    reports = [json.loads((text := each.log.read_text())[text.index("{\n") :]) for each in both]
    assert sorted(report["already_done"] for report in reports) == [False, True]
    assert {report["output_digest"] for report in reports} == {merges.job.digest}
    assert version_of(merges.out) == merges.job.versions["new"]
