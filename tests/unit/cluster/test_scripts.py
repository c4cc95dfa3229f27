"""`launch.sh` and `slurm.sh`, run as they are, against commands that only remember how they were called."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import click
import pytest

from tests.kubernetes import ROOT
from ties_dist.cli.commands import cli

RECORD = """#!/bin/bash
line=$(printf '%s\\t' "$(basename "$0")" "$@")
echo "$line" >> "$CALLS"
"""


class Commands:
    """A PATH of fakes. calls: every one so far, as words."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bin").mkdir(parents=True)

    def add(self, name: str, body: str = "") -> None:
        path = self.folder / "bin" / name
        path.write_text(RECORD + body)
        path.chmod(0o755)

    def environment(self, more: Mapping[str, str]) -> dict[str, str]:
        known = {"PATH": f"{self.folder}/bin:{os.environ['PATH']}", "CALLS": f"{self.folder}/calls"}
        return known | {"FOLDER": str(self.folder), **more}

    @contextmanager
    def started(self, script: Path, *arguments: str, **more: str) -> Iterator[subprocess.Popen[bytes]]:
        """Ended with all that it started. What it says goes to a file, which those that outlive it do not hold up."""
        with open(self.folder / "said", "wb") as said:
            process = subprocess.Popen(
                ["bash", str(script), *arguments],
                env=self.environment(more),
                stdout=said,
                stderr=said,
                start_new_session=True,
            )
            try:
                yield process
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def run(self, script: Path, *arguments: str, **more: str) -> tuple[int, str]:
        with self.started(script, *arguments, **more) as process:
            status = process.wait(timeout=30)
        return status, (self.folder / "said").read_text()

    def calls(self, name: str) -> list[list[str]]:
        lines = (self.folder / "calls").read_text().splitlines() if (self.folder / "calls").exists() else []
        return [words[1:-1] for words in (line.split("\t") for line in lines) if words[0] == name]

    def wait_for(self, condition: Callable[[], bool]) -> None:
        until = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < until
            time.sleep(0.02)


@pytest.fixture
def commands(tmp_path: Path) -> Commands:
    return Commands(tmp_path / "fakes")


# launch.sh

LAUNCH = ROOT / "cluster" / "launch.sh"

NONE = ""
RUNNING = "u1\nRunning\nRUNNING\n\n"
DONE = "u1\nComplete\nSUCCEEDED\n\nJob finished successfully."


def failed(status: int) -> str:
    """As KubeRay passes on what Ray's job supervisor says."""
    said = f"Job entrypoint command failed with exit code {status}, last available logs (truncated to 20,000 chars):"
    return f"u1\nFailed\nFAILED\nAppFailed\n{said}\nfailed with exit code 2, says a line of the log"


def kubectl(commands: Commands, answers: Sequence[str | None]) -> None:
    """answers: to one `get` after the other, the last one for ever; None: the API server does not answer."""
    for number, answer in enumerate(answers):
        if answer is not None:
            (commands.folder / f"answer-{number}").write_text(answer)
    commands.add(
        "kubectl",
        f"""
if [ "$1" = get ]; then
    number=$(cat "$FOLDER/asked" 2>/dev/null || echo 0)
    echo $((number + 1)) > "$FOLDER/asked"
    if [ "$number" -gt {len(answers) - 1} ]; then number={len(answers) - 1}; fi
    cat "$FOLDER/answer-$number" 2>/dev/null || exit 1
elif [ "$1" = create ]; then
    exit "${{CREATE_STATUS:-0}}"
fi
""",
    )


def launch(commands: Commands, answers: Sequence[str | None], **more: str) -> tuple[int, str, list[str]]:
    """Exit status, what was said, and what was done to the RayJob."""
    kubectl(commands, answers)
    status, said = commands.run(LAUNCH, "night", "/launch/rayjob.yaml", POLL_SECONDS="0.01", API_ATTEMPTS="4", **more)
    calls = commands.calls("kubectl")
    assert all(call[1:3] == ["rayjobs.ray.io", "night"] for call in calls if call[0] != "create")
    assert all(call[1:] == ["--filename", "/launch/rayjob.yaml"] for call in calls if call[0] == "create")
    return status, said, [call[0] for call in calls if call[0] != "get"]


def test_a_launcher_lasts_as_long_as_the_ray_job_it_created(commands: Commands) -> None:
    status, _, done = launch(commands, [NONE, "u1\n\n\n\n", "u1\nInitializing\n\n\n", RUNNING, RUNNING, DONE])
    assert (status, done) == (0, ["create"])
    assert len(commands.calls("kubectl")) == 7


def test_an_active_ray_job_is_waited_for_and_not_doubled(commands: Commands) -> None:
    status, said, done = launch(commands, [RUNNING, RUNNING, DONE])
    assert (status, done) == (0, [])
    assert "night is active (Running): waiting" in said


@pytest.mark.parametrize("state", ["", "Initializing", "Suspended", "Suspending", "Waiting", "Retrying"])
def test_a_ray_job_that_waits_in_a_queue_is_active(commands: Commands, state: str) -> None:
    status, _, done = launch(commands, [f"u1\n{state}\n\n\n", DONE])
    assert (status, done) == (0, [])


def test_an_ended_ray_job_is_removed_before_the_next_is_created(commands: Commands) -> None:
    status, _, done = launch(commands, [failed(75), failed(75), NONE, RUNNING, DONE])
    assert (status, done) == (0, ["delete", "delete", "create"])


def test_where_another_launcher_was_quicker_its_ray_job_is_waited_for(commands: Commands) -> None:
    status, _, done = launch(commands, [NONE, RUNNING, DONE], CREATE_STATUS="1")
    assert (status, done) == (0, ["create"])


@pytest.mark.parametrize(
    ("end", "status"),
    [
        (failed(2), 2),
        (failed(1), 1),
        (failed(75), 75),
        (failed(137), 75),  # killed for memory: resumable
        (failed(-9), 75),
        ("u1\nFailed\n\nSubmissionFailed\nthe submitter is gone", 75),
        ("u1\nFailed\nRUNNING\nPreRunningDeadlineExceeded\nno nodes", 75),
        ("u1\nValidationFailed\n\nValidationFailed\nspec is wrong", 2),
        ("u1\nComplete\nSTOPPED\n\nstopped by a person", 1),
    ],
)
def test_the_exit_status_is_the_merges(commands: Commands, end: str, status: int) -> None:
    assert launch(commands, [NONE, RUNNING, end])[0] == status


def test_a_ray_job_that_was_deleted_is_not_started_again(commands: Commands) -> None:
    status, said, done = launch(commands, [NONE, RUNNING, NONE])
    assert (status, done) == (1, ["create"])
    assert "was deleted" in said


def test_an_api_server_that_is_away_for_a_moment_is_asked_again(commands: Commands) -> None:
    assert launch(commands, [None, NONE, RUNNING, None, None, DONE])[0] == 0


def test_an_api_server_that_stays_away_ends_in_another_attempt(commands: Commands) -> None:
    status, said, done = launch(commands, [RUNNING, None])
    assert (status, done) == (75, [])
    assert "does not answer" in said


def test_a_ray_job_that_cannot_be_created_ends_in_another_attempt(commands: Commands) -> None:
    assert launch(commands, [NONE, NONE], CREATE_STATUS="1")[0] == 75


def test_a_launcher_that_is_evicted_ends_at_once_and_leaves_the_ray_job(commands: Commands) -> None:
    kubectl(commands, [RUNNING])
    with commands.started(LAUNCH, "night", "/launch/rayjob.yaml", POLL_SECONDS="30") as process:
        commands.wait_for(lambda: "is active" in (commands.folder / "said").read_text())
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == 75
    assert {call[0] for call in commands.calls("kubectl")} == {"get"}


# slurm.sh

SLURM = ROOT / "cluster" / "slurm.sh"
ALLOCATION = {
    "SLURM_JOB_ID": "4242",
    "SLURM_JOB_NUM_NODES": "3",
    "SLURMD_NODENAME": "node1",
    "TIES_DIST_IP": "10.0.0.1",
}


def slurm(commands: Commands, merge: str = "exit 0", plan: str = "exit 0") -> None:
    commands.add("srun", "exec sleep 60")
    commands.add("ray")
    commands.add("scontrol")
    commands.add("ties-dist", f'case "$1" in plan) {plan} ;; merge) {merge} ;; esac')


def parse(words: list[str]) -> dict[str, Any]:
    with click.Context(cli, **cli.context_settings) as above:
        command = cli.get_command(above, words[0])
        assert command is not None
        return command.make_context(words[0], list(words[1:]), parent=above).params


def test_slurm_starts_a_head_and_workers_and_merges_on_them(commands: Commands) -> None:
    slurm(commands, merge='until [ "$(grep -c ^srun "$CALLS")" = 2 ]; do sleep 0.02; done')
    status, said = commands.run(SLURM, "r.yml", "/out", "--device", "cuda", **ALLOCATION)
    assert status == 0, said
    head, workers = sorted(commands.calls("srun"), key=lambda call: "--head" not in call)  # they run at the same time
    address = "10.0.0.1:24242"
    assert {"--nodelist=node1", "--head", "--node-ip-address=10.0.0.1", "--port=24242"} < set(head)
    assert {"--exclude=node1", "--nodes=2", "--ntasks=2", f"--address={address}"} < set(workers)
    plan, merge = commands.calls("ties-dist")
    assert parse(plan)["out"] == Path("/out")
    values = parse(merge)
    assert (values["executor"], values["address"], values["device"]) == ("ray", address, "cuda")
    assert values["wait"]
    assert commands.calls("scontrol") == []


def test_slurm_on_one_node_needs_no_further_workers(commands: Commands) -> None:
    slurm(commands, merge='until [ "$(grep -c ^srun "$CALLS")" = 1 ]; do sleep 0.02; done')
    assert commands.run(SLURM, "r.yml", "/out", **(ALLOCATION | {"SLURM_JOB_NUM_NODES": "1"}))[0] == 0
    assert len(commands.calls("srun")) == 1


def test_slurm_stops_at_a_plan_that_fails_before_anything_is_started(commands: Commands) -> None:
    slurm(commands, plan="exit 2")
    assert commands.run(SLURM, "r.yml", "/out", **ALLOCATION)[0] == 2
    assert commands.calls("srun") == commands.calls("scontrol") == []


@pytest.mark.parametrize(
    ("merge", "restarts", "requeued"),
    [(75, "0", True), (75, "9", True), (75, "10", False), (2, "0", False), (1, "0", False)],
)
def test_slurm_requeues_what_is_resumable_and_nothing_else(
    commands: Commands, merge: int, restarts: str, requeued: bool
) -> None:
    slurm(commands, merge=f"exit {merge}")
    status, _ = commands.run(SLURM, "r.yml", "/out", SLURM_RESTART_COUNT=restarts, **ALLOCATION)
    assert status == merge
    assert commands.calls("scontrol") == ([["requeue", "4242"]] if requeued else [])


def test_slurm_passes_the_end_of_its_time_to_the_merge_and_resumes_later(commands: Commands) -> None:
    slurm(commands, merge='trap "sleep 0.2; exit 75" TERM; touch "$FOLDER/merging"; sleep 60 & wait $!')
    with commands.started(SLURM, "r.yml", "/out", **ALLOCATION) as process:
        commands.wait_for((commands.folder / "merging").exists)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 75
    assert commands.calls("scontrol") == [["requeue", "4242"]]
