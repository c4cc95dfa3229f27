"""Jobs by the Jobs API: the id follows from what is asked, who asks again is attached, the exit status is passed on."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.integration.command import run
from ties_dist.errors import ClusterError, StoppedError
from ties_dist.executors.submit import entrypoint, follow, submit


@dataclass
class Head:
    """A cluster that runs nothing. jobs: id -> status."""

    jobs: dict[str, str] = field(default_factory=dict)
    commands: list[str] = field(default_factory=list)
    log: str = ""
    exit_code: int | None = None
    silent: int = 0
    rival: bool = False

    def list_jobs(self) -> list[Any]:
        return [SimpleNamespace(submission_id=name, status=status) for name, status in self.jobs.items()]

    def submit_job(self, *, entrypoint: str, submission_id: str) -> str:
        if self.rival:  # somebody was faster
            self.rival = False
            self.jobs[submission_id] = "PENDING"
        if submission_id in self.jobs:
            raise RuntimeError(f"Job with submission_id {submission_id} already exists")
        self.jobs[submission_id] = "PENDING"
        self.commands.append(entrypoint)
        return submission_id

    def get_job_info(self, job_id: str) -> Any:
        if self.silent:
            self.silent -= 1
            raise RuntimeError("503 Service Unavailable")
        return SimpleNamespace(status=self.jobs[job_id], driver_exit_code=self.exit_code)

    def get_job_logs(self, job_id: str) -> str:
        return self.log


COMMAND = "ties-dist merge /shared/r.yml /shared/out --executor ray --wait"


def test_paths_are_those_that_the_cluster_sees() -> None:
    assert entrypoint(Path("r.yml"), Path("my out"), Path("/shared"), ["--threads", "4"]) == (
        "ties-dist merge /shared/r.yml '/shared/my out' --executor ray --wait --threads 4"
    )
    assert entrypoint(Path("/a/r.yml"), Path("/b/out"), Path("/shared"), []) == (
        "ties-dist merge /a/r.yml /b/out --executor ray --wait"
    )


def test_the_same_command_is_attached_to_while_it_runs_and_tried_again_when_it_ended() -> None:
    head = Head()
    first = submit(head, COMMAND)
    assert (first.attached, first.id[-2:]) == (False, "-1")
    assert submit(head, COMMAND) == type(first)(id=first.id, attached=True)
    head.jobs[first.id] = "FAILED"
    second = submit(head, COMMAND)
    assert second.id == first.id[:-1] + "2"
    head.jobs[second.id] = "RUNNING"
    assert submit(head, COMMAND).id == second.id
    head.jobs[second.id] = "SUCCEEDED"
    assert submit(head, COMMAND).id == first.id[:-1] + "3"
    assert head.commands == [COMMAND] * 3


def test_another_command_or_recipe_is_another_job(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yml"
    recipe.write_text("merge_method: ties")
    head = Head()
    names = {
        submit(head, COMMAND).id,
        submit(head, COMMAND + " --threads 2").id,
        submit(head, COMMAND, recipe=recipe).id,
    }
    recipe.write_text("merge_method: linear")
    names.add(submit(head, COMMAND, recipe=recipe).id)
    assert len(names) == 4
    assert {name[-2:] for name in names} == {"-1"}


def test_of_two_who_submit_at_once_one_is_attached() -> None:
    head = Head(rival=True)
    assert submit(head, COMMAND).attached
    assert head.commands == []


def test_a_head_that_takes_no_job_is_told() -> None:
    class Full(Head):
        def submit_job(self, *, entrypoint: str, submission_id: str) -> str:
            raise RuntimeError("500 Internal Server Error")

    with pytest.raises(ClusterError, match="does not take the job: 500 Internal Server Error"):
        submit(Full(), COMMAND)


def test_a_head_that_has_just_started_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ties_dist.executors.submit.POLL_SECONDS", 0.01)

    class Starting(Head):
        def submit_job(self, *, entrypoint: str, submission_id: str) -> str:
            if self.silent:
                self.silent -= 1
                raise RuntimeError("500: No available agent to submit job, please try again later.")
            return super().submit_job(entrypoint=entrypoint, submission_id=submission_id)

    assert submit(Starting(silent=3), COMMAND).id.endswith("-1")
    monkeypatch.setattr("ties_dist.executors.submit.PATIENCE_SECONDS", 0.05)
    with pytest.raises(ClusterError, match="does not take the job: 500: No available agent"):
        submit(Starting(silent=10**9), COMMAND)


def test_a_head_that_does_not_answer_is_told() -> None:
    class Away(Head):
        def list_jobs(self) -> list[Any]:
            raise ConnectionError("connection refused")

    with pytest.raises(ClusterError, match="does not say which jobs it has: connection refused"):
        submit(Away(), COMMAND)


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> Head:
    found = Head()
    monkeypatch.setattr("ties_dist.executors.ray.job_client", lambda address: found)
    return found


@pytest.mark.parametrize(("given", "sent"), [("cache", "/shared/cache"), ("/big/cache", "/big/cache")])
def test_a_cache_folder_is_one_that_the_cluster_sees(
    given: str, sent: str, head: Head, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--root", "/shared", "--address", "http://head:8265", "--cache-dir", given]
    assert run(capsys, "submit", "r.yml", "out", *options).status == 0
    assert head.commands[0].startswith("ties-dist merge /shared/r.yml /shared/out --executor ray --wait")
    assert head.commands[0].endswith(f" --cache-dir {sent}")


def test_a_relative_root_is_taken_from_here(
    head: Head, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job's own folder is somewhere in Ray's."""
    monkeypatch.chdir(tmp_path)
    assert run(capsys, "submit", "r.yml", "out", "--root", "data", "--address", "http://head:8265").status == 0
    assert head.commands == [f"ties-dist merge {tmp_path}/data/r.yml {tmp_path}/data/out --executor ray --wait"]


def test_options_before_the_recipe_are_not_taken_for_paths(head: Head, capsys: pytest.CaptureFixture[str]) -> None:
    told = run(capsys, "submit", "--threads", "1", "r.yml", "out", "--address", "http://head:8265")
    assert told.status == 2
    assert "RECIPE and OUT come first" in told.err
    assert head.commands == []


@pytest.mark.parametrize(
    ("status", "code", "expected"), [("SUCCEEDED", 0, 0), ("FAILED", 2, 2), ("FAILED", 75, 75), ("FAILED", None, 1)]
)
def test_the_exit_status_of_the_merge_is_passed_on(status: str, code: int | None, expected: int) -> None:
    head = Head(jobs={"job": status}, exit_code=code, log="merge: 2GiB\n")
    said: list[str] = []
    assert follow(head, "job", said.append, poll_seconds=0) == expected
    assert said == ["merge: 2GiB\n"]


def test_the_log_is_told_once_as_it_grows() -> None:
    class Growing(Head):
        def get_job_logs(self, job_id: str) -> str:
            self.log += f"line {len(self.log)}\n"
            if len(self.log) > 30:
                self.jobs[job_id] = "SUCCEEDED"
            return self.log

    head, said = Growing(jobs={"job": "RUNNING"}), []
    assert follow(head, "job", said.append, poll_seconds=0) == 0
    assert "".join(said) == head.log
    assert len(said) > 2


def test_a_head_that_is_silent_for_a_while_is_asked_again() -> None:
    head = Head(jobs={"job": "SUCCEEDED"}, silent=3)
    assert follow(head, "job", print, poll_seconds=0) == 0


def test_a_head_that_stays_silent_is_given_up_without_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ties_dist.executors.submit.PATIENCE_SECONDS", 0.05)
    with pytest.raises(ClusterError, match="The job may go on"):
        follow(Head(jobs={"job": "RUNNING"}, silent=10**9), "job", print, poll_seconds=0.01)


def test_a_stopped_job_is_resumable() -> None:
    with pytest.raises(StoppedError, match="Submit it again to resume"):
        follow(Head(jobs={"job": "STOPPED"}), "job", print, poll_seconds=0)
