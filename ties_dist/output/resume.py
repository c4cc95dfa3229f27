"""Whether a job may go on in OUT, start there, or is done already; with messages for everything in between."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ties_dist.errors import CheckpointError, OutputError, PlanError
from ties_dist.messages import listing, readable
from ties_dist.output.folder import OutFolder
from ties_dist.output.report import MergeReport
from ties_dist.planning.layout import OutputShard
from ties_dist.planning.prepare import Job
from ties_dist.storage.local import copy_sparse, output_error, sync_folder, write_durably

SPARE_BYTES = 64 << 20
"""Journals, companions and the file system's own needs."""


def claim(out: OutFolder, job: Job, *, fresh: bool, overwrite: bool) -> MergeReport | None:
    """Make OUT ready for this job (called with its lock held), or return the report of the same merge, done before.

    Raises OutputError where OUT holds something else, CheckpointError where inputs changed since an interruption.
    """
    out.fence()
    done = out.finished()
    if done is not None and done.fingerprint == out.fingerprint and not (fresh and overwrite):
        if changed := _changed(job, out.stamps()):
            raise CheckpointError(
                listing(
                    f"OUT {out.path} holds this merge, made before these inputs were written again:",
                    changed,
                    "Merge again with --fresh --overwrite, or keep it as it is.",
                )
            )
        shutil.rmtree(out.run, ignore_errors=True)  # left by a kill between the commit point and the tidying
        return replace(done, already_done=True)
    if (others := out.other_runs()) and not fresh:
        raise _unfinished(out, job, others[0])
    what = "the finished model of another merge (other recipe, inputs or --max-shard-size)"
    strange = out.holds_model() and not out.run.exists() and not out.lacks_files()
    if not overwrite and (done is not None or strange):
        what = what if done else "model files that no finished merge left"
        raise OutputError(f"OUT {out.path} holds {what}. Choose another OUT, or replace it with --overwrite.")
    if fresh:
        for name in (*out.other_runs(), out.fingerprint):
            shutil.rmtree(out.state / name, ignore_errors=True)
    _check_stamps(out, job)
    try:
        out.parts.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise output_error(error, out.parts) from error
    if not _record(out.run).exists():
        write_durably(_record(out.run), json.dumps({"recipe": job.recipe.canonical(), "stamps": job.stamps}))
    return None


def _record(run: Path) -> Path:
    return run / "plan.json"


def _read(run: Path) -> Mapping[str, object]:
    try:
        found = json.loads(_record(run).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _changed(job: Job, stamps: object) -> list[str]:
    """Input files whose size or time is not what an interrupted run saw."""
    known = stamps.items() if isinstance(stamps, dict) else ()
    before = {name: tuple(stamp) for name, stamp in known if isinstance(stamp, list)}
    return sorted(name for name, stamp in job.stamps.items() if name in before and before[name] != stamp)


def _check_stamps(out: OutFolder, job: Job) -> None:
    if changed := _changed(job, _read(out.run).get("stamps")):
        raise _inputs_changed(out, changed)


def _inputs_changed(out: OutFolder, changed: Sequence[str]) -> CheckpointError:
    return CheckpointError(
        listing(
            f"inputs changed since the interrupted merge in {out.path}:",
            changed,
            "Restore them and run again, or start over with --fresh.",
        )
    )


def _unfinished(out: OutFolder, job: Job, other: str) -> OutputError | CheckpointError:
    found = _read(out.state / other)
    same_recipe = found.get("recipe") == json.loads(json.dumps(job.recipe.canonical()))
    if same_recipe and (changed := _changed(job, found.get("stamps"))):
        return _inputs_changed(out, changed)
    what = "other inputs or shard sizes" if same_recipe else "another recipe"
    return OutputError(
        f"OUT {out.path} holds an unfinished merge of {what}. Finish it with its own command, choose another OUT, or "
        "discard it with --fresh."
    )


def adopt(out: OutFolder, shards: Iterable[OutputShard], *, publishing: bool) -> None:
    """Copy partial shards, and go on with the copies: who was replaced, but may live, still has the old ones open.

    A range that it wrote before it was paused can reach them at any time, merged with a guess that has been corrected
    since. publishing: see `OutFolder.part`. Raises OutputError.
    """
    for shard in shards:
        path = out.part(shard, publishing=publishing)
        copy = out.parts / f"{shard.name}.copy"
        try:
            if path is not None:
                copy_sparse(path, copy)
                os.replace(copy, out.partial(shard.name))
                sync_folder(out.parts)
        except OSError as error:
            raise output_error(error, copy) from error


def check_space(out: OutFolder, job: Job, *, publishing: bool) -> None:
    """Raises PlanError where the disk has no room for what is still to be written. publishing: see `OutFolder.part`."""
    needed = job.plan.layout.total_bytes + sum(m.nbytes for m in job.plan.matrices.values())
    files = (out.part(shard, publishing=publishing) for shard in job.plan.layout.shards)
    have = sum(file.stat().st_blocks * 512 for file in files if file is not None)
    free = shutil.disk_usage(out.path).free
    if needed - have + SPARE_BYTES > free:
        raise PlanError(
            f"the disk of {out.path} has {readable(free)} free; the output needs {readable(needed)}"
            + (f", of which {readable(have)} are there" if have else "")
            + f", and {readable(SPARE_BYTES)} to spare. Free some space (a model that is replaced stays until the new "
            "one is whole), or choose another OUT."
        )
