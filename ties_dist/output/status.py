"""What stands in OUT and what is going on there, from any machine that sees it: the lock, its lease and the journals.

Nothing is asked of the process that merges, which may be on another machine, or dead.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from ties_dist.errors import OutputError
from ties_dist.messages import readable
from ties_dist.output.documents import parse
from ties_dist.output.folder import BEGUN, WEIGHTS, OutFolder
from ties_dist.output.holder import Holder
from ties_dist.output.journal import read_journals
from ties_dist.output.lock import HEARTBEAT_SECONDS, STATE, Lease, RunLock, read_lease
from ties_dist.storage.place import Place, partial_name

WATCHED_SECONDS = 1.6 * HEARTBEAT_SECONDS
LOOKS = 5
State = Literal["merging", "interrupted", "finished", "damaged", "empty"]


@dataclass(frozen=True, kw_only=True)
class Status:
    """state: `merging` where a holder's lease moves, `damaged` where a model has lost files.

    durable_bytes: of the output, in journals; total_bytes: of it all.

    phase, phase_bytes, phase_total, phase_seconds: what the holder told of its own work in its latest lease.
    """

    state: State
    holder: str | None = None
    fingerprint: str | None = None
    durable_bytes: int = 0
    total_bytes: int = 0
    thresholds: tuple[float, ...] = ()
    phase: str | None = None
    phase_bytes: int = 0
    phase_total: int = 0
    phase_seconds: float = 0.0
    workers: int | None = None
    output_digest: str | None = None


def status(out: Place, *, watched_seconds: float = WATCHED_SECONDS) -> Status:
    """watched_seconds: how long a lease that does not move is looked at before its holder is taken for dead.

    Raises OutputError where OUT is not ours.
    """
    for _ in range(LOOKS):
        with suppress(FileNotFoundError):  # renamed or removed just now, by who publishes
            return _status(out, watched_seconds)
    raise OutputError(f"{out} changes faster than it can be looked at. Ask again.")


def _status(out: Place, watched_seconds: float) -> Status:
    folder = OutFolder(place=out, fingerprint="")
    try:
        folder.check([])
    except OutputError as error:
        raise OutputError(f"{out} was not written by ties_dist.") from error
    lock = RunLock(out)
    holder = lock.holder()
    lease = _moving_lease(lock, holder, watched_seconds)
    run = _latest(folder)
    done = folder.finished()
    if lease is None and run is None:
        if done is None:
            return Status(state="damaged" if folder.holds_model() or folder.manifest() is not None else "empty")
        return Status(state="finished", fingerprint=done.fingerprint, output_digest=done.output_digest)
    durable, total, thresholds = (0, 0, ()) if run is None else _progress(OutFolder(place=out, fingerprint=run))
    told = lease or Lease()
    return Status(
        state="merging" if lease is not None else "interrupted",
        holder=str(holder) if holder is not None else None,
        fingerprint=run,
        durable_bytes=durable,
        total_bytes=total,
        thresholds=thresholds,
        phase=told.phase,
        phase_bytes=told.done_bytes,
        phase_total=told.total_bytes,
        phase_seconds=max(0.0, time.time() - told.began) if told.began is not None else 0.0,
        workers=told.workers,
    )


def _latest(folder: OutFolder) -> str | None:
    """Of the unfinished merges the one that was worked on last."""
    changed = {}
    for run in folder.runs():
        found = {entry.name: entry.changed for entry in folder.place.list(f"{STATE}/{run}")}
        if BEGUN in found:
            changed[run] = max(found.values())
    return max(changed, key=changed.__getitem__, default=None)


def _moving_lease(lock: RunLock, holder: Holder | None, seconds: float) -> Lease | None:
    """What a living holder says; None where there is none, or where its lease stands still."""
    if holder is None or holder.is_dead(lock.me):
        return None
    first, until = read_lease(lock.place, holder), time.monotonic() + seconds
    local = holder.shares_processes(lock.me)
    while not local and time.monotonic() < until and read_lease(lock.place, holder) == first:
        time.sleep(min(0.2, seconds / 4))
    latest = read_lease(lock.place, holder)
    if not local and latest == first:
        return None
    with suppress(OutputError):  # torn: it is being written
        return parse(latest, Lease, "the lease")
    return Lease()


def _progress(folder: OutFolder) -> tuple[int, int, tuple[float, ...]]:
    """Durable bytes of the output, all its bytes, and the thresholds found."""
    record = read_journals(folder.place, folder.run)
    durable = sum(r.item.nbytes for r in record.covering(record.merged))
    total = sum(e.size or 0 for e in folder.place.list(folder.parts) if e.name.endswith(partial_name("")))
    if record.publishing:
        total += sum(e.size or 0 for e in folder.place.list() if e.name.endswith(WEIGHTS))
    return durable, total, tuple(c.threshold.value for c in record.thresholds or ())


def describe(found: Status) -> str:
    """For people."""
    if found.state == "empty":
        return "nothing was merged here yet."
    if found.state == "damaged":
        return "files of a finished model are missing or cut short: run its merge again."
    if found.state == "finished":
        return f"finished: digest {found.output_digest}, fingerprint {found.fingerprint}."
    share = f"{found.durable_bytes / found.total_bytes:.0%}" if found.total_bytes else "0%"
    lines = [
        f"merging: {found.holder}"
        if found.state == "merging"
        else f"interrupted{f' ({found.holder})' if found.holder else ''}: the same command resumes",
        f"durable: {readable(found.durable_bytes)} of {readable(found.total_bytes)} ({share})",
    ]
    if found.thresholds:
        lines.append("thresholds: " + ", ".join(f"{t:.6g}" for t in found.thresholds))
    if found.phase:
        rate = found.phase_bytes / max(found.phase_seconds, 1e-6)
        left = (found.phase_total - found.phase_bytes) / rate if rate else 0.0
        lines.append(
            f"{found.phase}: {readable(found.phase_bytes)} of {readable(found.phase_total)}, {readable(int(rate))}/s"
            + (f", {left:.0f} s left" if rate else "")
            + (f", {found.workers} workers" if found.workers is not None else "")
        )
    return "\n".join(lines)
