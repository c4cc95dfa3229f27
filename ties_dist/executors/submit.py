"""Sending a merge to a Ray cluster through its Jobs API, from a machine that sees neither its nodes nor its files.

The id of a job follows from what is asked and from how often it was: who asks again while it runs is attached to it,
who asks after its end starts the next attempt, which resumes. The driver then runs on the cluster and outlives us.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from ties_dist.errors import ClusterError, StoppedError
from ties_dist.storage.digests import digest

PREFIX = "ties-dist"
POLL_SECONDS = 1.0
PATIENCE_SECONDS = 60.0
"""How long a head that does not answer is asked again: the job goes on without us."""
ENDED = frozenset(("STOPPED", "SUCCEEDED", "FAILED"))


class JobClient(Protocol):
    """What is used of Ray's `JobSubmissionClient`."""

    def list_jobs(self) -> Sequence[Any]: ...

    def submit_job(self, *, entrypoint: str, submission_id: str) -> str: ...

    def get_job_info(self, job_id: str) -> Any: ...

    def get_job_logs(self, job_id: str) -> str: ...


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A job. attached: it was there already."""

    id: str
    attached: bool


def entrypoint(recipe: Path, out: Path, root: Path, options: Sequence[str]) -> str:
    """The command that the cluster runs. Relative paths are taken from `root` as the cluster's nodes see it."""
    place = PurePosixPath(root)
    # `--wait`: a driver that is taken for dead while it lives must not make its successor fail.
    parts = ["ties-dist", "merge", str(place / recipe), str(place / out), "--executor", "ray", "--wait", *options]
    return shlex.join(parts)


def submit(client: JobClient, command: str, *, recipe: Path | None = None) -> Submission:
    """Start a job, or find the one that does the same. recipe: its text counts, too, where it can be read here."""
    text = recipe.read_bytes() if recipe is not None and recipe.is_file() else b""
    name = f"{PREFIX}-{digest(command.encode() + text)[:12]}"
    until = time.monotonic() + PATIENCE_SECONDS
    while True:
        attempts = {}
        try:
            jobs = client.list_jobs()
        except (RuntimeError, OSError) as error:
            raise ClusterError(f"the cluster does not say which jobs it has: {error}") from error
        for job in jobs:
            stem, _, number = (job.submission_id or "").rpartition("-")
            if stem == name and number.isdigit():
                attempts[int(number)] = str(getattr(job.status, "value", job.status))
        running = [n for n, status in attempts.items() if status not in ENDED]
        if running:
            return Submission(id=f"{name}-{max(running)}", attached=True)
        wanted = f"{name}-{max(attempts, default=0) + 1}"
        try:
            return Submission(id=client.submit_job(entrypoint=command, submission_id=wanted), attached=False)
        except RuntimeError as error:
            if "try again later" in str(error) and time.monotonic() < until:  # a head that has just started
                time.sleep(POLL_SECONDS)
                continue
            if wanted not in {job.submission_id for job in client.list_jobs()}:
                raise ClusterError(f"the cluster does not take the job: {error}") from error
            # somebody else asked for the same at the same time: attach to that


def follow(client: JobClient, job: str, say: Callable[[str], None], *, poll_seconds: float = POLL_SECONDS) -> int:
    """Pass on a job's log until it ends; returns the exit status of its driver. Raises ClusterError, StoppedError."""
    told, silent_since = 0, None
    while True:
        try:
            info = client.get_job_info(job)
            log = client.get_job_logs(job)
        except (RuntimeError, OSError) as error:
            silent_since = silent_since if silent_since is not None else time.monotonic()
            if time.monotonic() - silent_since > PATIENCE_SECONDS:
                raise ClusterError(
                    f"the cluster does not answer any more ({error}). The job may go on: submit again to see."
                ) from error
            time.sleep(poll_seconds)
            continue
        silent_since = None
        if len(log) > told:
            say(log[told:])
            told = len(log)
        status = str(getattr(info.status, "value", info.status))
        if status == "STOPPED":
            raise StoppedError(f"the job {job} was stopped; everything finished is kept. Submit it again to resume.")
        if status in ENDED:
            code = getattr(info, "driver_exit_code", None)
            return code if isinstance(code, int) else 0 if status == "SUCCEEDED" else 1
        time.sleep(poll_seconds)
