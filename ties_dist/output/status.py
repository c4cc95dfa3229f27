"""What stands in OUT and what is going on there, from any machine that sees it: the lock, its lease and the journals.

Nothing is asked of the process that merges, which may be on another machine, or dead.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ties_dist.errors import OutputError
from ties_dist.messages import readable
from ties_dist.output.folder import OutFolder
from ties_dist.output.journal import read_journals
from ties_dist.output.lock import HEARTBEAT_SECONDS, Holder, RunLock

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


def status(out: Path, *, watched_seconds: float = WATCHED_SECONDS) -> Status:
    """watched_seconds: how long a lease that does not move is looked at before its holder is taken for dead.

    Raises OutputError where OUT is not ours.
    """
    for _ in range(LOOKS):
        with suppress(FileNotFoundError):  # renamed or removed just now, by who publishes
            return _status(out, watched_seconds)
    raise OutputError(f"{out} changes faster than it can be looked at. Ask again.")


def _status(out: Path, watched_seconds: float) -> Status:
    folder = OutFolder(path=out, fingerprint="")
    if not folder.state.is_dir():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise OutputError(f"{out} was not written by ties_dist.")
        return Status(state="empty")
    lock = RunLock(folder.state)
    holder = lock.holder()
    lease = _moving_lease(lock, holder, watched_seconds)
    runs = [p for p in folder.state.iterdir() if p.is_dir() and (p / "plan.json").exists()]
    run = max(runs, key=lambda p: p.stat().st_mtime) if runs else None
    done = folder.finished()
    if lease is None and run is None:
        if done is None:
            return Status(state="damaged" if folder.holds_model() or folder.stamps() else "empty")
        return Status(state="finished", fingerprint=done.fingerprint, output_digest=done.output_digest)
    durable, total, thresholds = _progress(folder, run)
    told = lease or {}
    return Status(
        state="merging" if lease is not None else "interrupted",
        holder=str(holder) if holder is not None else None,
        fingerprint=run.name if run is not None else None,
        durable_bytes=durable,
        total_bytes=total,
        thresholds=thresholds,
        phase=told.get("phase"),
        phase_bytes=int(told.get("done_bytes", 0)),
        phase_total=int(told.get("total_bytes", 0)),
        phase_seconds=max(0.0, time.time() - float(told.get("began", time.time()))),
        workers=told.get("workers"),
    )


def _moving_lease(lock: RunLock, holder: Holder | None, seconds: float) -> Mapping[str, Any] | None:
    """What a living holder says; None where there is none, or where its lease stands still."""
    if holder is None or holder.is_dead(lock.me):
        return None
    path = lock.lease_of(holder.token)
    first, until = _read(path), time.monotonic() + seconds
    local = holder.shares_processes(lock.me)
    while not local and time.monotonic() < until and _read(path) == first:
        time.sleep(min(0.2, seconds / 4))
    latest = _read(path)
    if not local and latest == first:
        return None
    with suppress(ValueError):
        found = json.loads(latest)
        return found if isinstance(found, dict) else {}
    return {}


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _progress(folder: OutFolder, run: Path | None) -> tuple[int, int, tuple[float, ...]]:
    """Durable bytes of the output, all its bytes, and the thresholds found."""
    if run is None:
        return 0, 0, ()
    record = read_journals(run)
    durable = sum(r.item.nbytes for r in record.covering(record.merged))
    parts = list((run / "parts").glob("*.partial"))
    total = sum(p.stat().st_size for p in parts)
    if record.publishing:
        total += sum(p.stat().st_size for p in folder.path.glob("*.safetensors"))
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
