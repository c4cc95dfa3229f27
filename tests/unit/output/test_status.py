"""`status`: what another machine learns of a merge from OUT alone."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

import ties_dist
from tests.conftest import Checkpoints, random_models
from tests.unit.output.test_resume import interrupt
from ties_dist.engine.verify import verify
from ties_dist.errors import DamageError, OutputError
from ties_dist.output import status as status_module
from ties_dist.output.holder import Holder
from ties_dist.output.journal import Record, read_journals
from ties_dist.output.lock import RunLock, lease_of
from ties_dist.output.status import Status, describe
from ties_dist.planning.options import RunOptions
from ties_dist.progress import LogProgress
from ties_dist.storage.local_place import LocalPlace
from ties_dist.storage.place import Place


def status(out: Path, **options: float) -> Status:
    return status_module.status(LocalPlace(out), **options)


@pytest.fixture
def recipe(merge_job: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("ties_dist.engine.passes.COMMIT_SECONDS", -1.0)
    return merge_job(random_models({"a.weight": (1024, 512), "b.weight": (1024, 512)}, experts=2))


def test_a_folder_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert status(tmp_path / "out").state == "empty"
    assert describe(status(tmp_path / "out")) == "nothing was merged here yet."


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="was not written by ties_dist"):
        status(tmp_path)


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.yml").touch()
    with pytest.raises(OutputError, match=r"recipe\.yml was not written by ties_dist"):
        status(tmp_path / "recipe.yml")


def test_a_merge_that_publishes_meanwhile_is_looked_at_again(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(recipe, tmp_path / "out", after=3)

    def read(place: Place, run: str) -> Record:
        monkeypatch.setattr("ties_dist.output.status.read_journals", read_journals)
        listed = place.list(run)
        ties_dist.merge(recipe, tmp_path / "out")
        monkeypatch.setattr(LocalPlace, "list", lambda *_: listed)
        try:
            return read_journals(place, run)
        finally:
            monkeypatch.setattr(LocalPlace, "list", list_really)

    list_really = LocalPlace.list

    monkeypatch.setattr("ties_dist.output.status.read_journals", read)
    assert status(tmp_path / "out").state == "finished"


def test_a_finished_merge_tells_its_digest(recipe: Path, tmp_path: Path) -> None:
    report = ties_dist.merge(recipe, tmp_path / "out")
    found = status(tmp_path / "out")
    assert (found.state, found.output_digest) == ("finished", report.output_digest)
    assert report.output_digest in describe(found)


@pytest.mark.parametrize("lost", ["README.md", "ties_dist_recipe.yml", "model.safetensors"])
def test_a_model_that_lost_a_file_is_not_finished_and_the_same_merge_mends_it(
    lost: str, recipe: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    report = ties_dist.merge(recipe, out)
    content = (out / lost).read_bytes()
    (out / lost).unlink()
    assert status(out).state == "damaged" and "missing" in describe(status(out))
    with pytest.raises(DamageError, match=rf"{lost}: missing"):
        verify(LocalPlace(out), RunOptions(), progress=LogProgress())
    again = ties_dist.merge(recipe, out)
    assert not again.already_done and again.output_digest == report.output_digest
    assert (out / lost).read_bytes() == content and status(out).state == "finished"
    verify(LocalPlace(out), RunOptions(), progress=LogProgress())


def test_an_interrupted_merge_tells_what_is_durable(recipe: Path, tmp_path: Path) -> None:
    journalled = interrupt(recipe, tmp_path / "out", after=3)
    found = status(tmp_path / "out")
    assert found.state == "interrupted"
    assert journalled * (1 << 20) >= found.durable_bytes > (journalled - 2) * (1 << 20)
    assert found.total_bytes > 4 << 20
    assert len(found.thresholds) == 2
    assert "the same command resumes" in describe(found)


def elsewhere(out: Path) -> RunLock:
    """Held by a process of another machine, whose life shows in its lease alone."""
    lock = RunLock(LocalPlace(out), me=replace(Holder.myself(), host="node-7", boot="another"))
    (out / ".ties_dist").mkdir(parents=True, exist_ok=True)
    (out / ".ties_dist" / "lock").write_text(json.dumps({**lock.me.__dict__}))
    return lock


def test_a_merge_on_another_machine_is_seen_by_its_moving_lease(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupt(recipe, out, after=3)
    lock, over = elsewhere(out), threading.Event()
    news = {"phase": "merge", "done_bytes": 1 << 20, "total_bytes": 4 << 20, "began": time.time() - 2, "workers": 12}

    def beat() -> None:
        beats = 0
        while not over.wait(0.02):
            beats += 1
            (out / lease_of(lock.token)).write_text(json.dumps({"beats": beats, **news}))

    beating = threading.Thread(target=beat)
    beating.start()
    time.sleep(0.1)
    try:
        found = status(out, watched_seconds=5)
    finally:
        over.set()
        beating.join()
    assert (found.state, found.phase, found.workers, found.phase_total) == ("merging", "merge", 12, 4 << 20)
    assert "on node-7" in describe(found)
    assert "merge: 1MiB of 4MiB" in describe(found)
    assert "12 workers" in describe(found)


def test_a_lease_that_stands_still_is_a_dead_merge(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupt(recipe, out, after=3)
    lock = elsewhere(out)
    (out / lease_of(lock.token)).write_text(json.dumps({"beats": 3}))
    assert status(out, watched_seconds=0.1).state == "interrupted"


def test_a_running_merge_tells_its_phase_in_its_lease(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ties_dist.output.lock.HEARTBEAT_SECONDS", 0.02)
    told: set[str | None] = set()

    class Looking:
        def begin(self, phase: str, total_bytes: int) -> None: ...

        def advance(self, done_bytes: int) -> None:
            time.sleep(0.06)
            found = status(tmp_path / "out")
            assert found.state == "merging"
            told.add(found.phase)

        def end(self) -> None: ...

    ties_dist.merge(recipe, tmp_path / "out", progress=Looking(), unit_size=1 << 20, threads=1, threshold_pass="scan")
    assert {"scan", "merge"} <= told
