"""The conductor: from a prepared job to a published model, resuming whatever an interrupted run left in OUT."""

from __future__ import annotations

import logging
import os
import resource
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ties_dist.errors import CheckpointError, NumericError, OutputError, StoppedError, listing
from ties_dist.executors.base import Executor
from ties_dist.journal import Journal, Record, pack, read_journals
from ties_dist.lock import RunLock
from ties_dist.passes import Passes
from ties_dist.prepare import Job, models_of, stamp_inputs
from ties_dist.progress import Progress, phase
from ties_dist.publish import OutFolder, companion_files, model_card, publish
from ties_dist.report import MergeReport
from ties_dist.resume import adopt, check_space, claim
from ties_dist.statistics import StatisticsStore
from ties_dist.storage.base import BLOCK_BYTES
from ties_dist.storage.local import LocalWriter, open_reader
from ties_dist.summary import describe
from ties_dist.threshold import Cuts, ModelCut
from ties_dist.work import MergeResult, Worker, block_digests

logger = logging.getLogger(__name__)


@dataclass
class DurableKeeper:
    """Group commit: bytes are synced first, then their journal lines; both only while the lock is ours."""

    lock: RunLock
    writer: LocalWriter
    journal: Journal

    def thresholds(self, cuts: Sequence[ModelCut]) -> None:
        self.journal.thresholds(cuts)
        self.journal.commit()

    def cuts(self, cuts: Mapping[str, Cuts]) -> None:
        for tensor, found in cuts.items():
            self.journal.cuts(tensor, found)
        self.journal.commit()

    def merged(self, results: Sequence[MergeResult]) -> None:
        self.lock.check()
        self.writer.sync(sorted({r.unit.shard for r in results}))
        for result in results:
            self.journal.merged(result)
        self.journal.commit()


def run(
    job: Job,
    out: Path,
    *,
    executor: Executor,
    progress: Progress,
    store: StatisticsStore | None = None,
    fresh: bool = False,
    overwrite: bool = False,
    wait: bool = False,
    trust_journal: bool = False,
    speculate: bool | None = None,
    stop: threading.Event | None = None,
) -> MergeReport:
    """Merge a prepared job into OUT. trust_journal: take journalled ranges over without reading them again.

    Raises OutputError, LockedError, PlanError, NumericError, CheckpointError, StoppedError, ProofError.
    """
    began = time.monotonic()
    folder = OutFolder(path=out, fingerprint=job.plan.fingerprint)
    folder.check([Path(m.path) for m in (job.plan.base, *job.plan.experts, *job.plan.extras)])
    _ = job.stamps  # taken now: while this run waits for the lock, its inputs may change
    lock = RunLock(folder.state)
    lock.acquire(wait=wait, stop=stop)
    try:
        if (done := claim(folder, job, fresh=fresh, overwrite=overwrite)) is not None:
            lock.doubt.unlink(missing_ok=True)
            return done
        record = read_journals(folder.run)
        if lock.doubt.exists():
            logger.warning("the run before may still be alive: going on with copies of its partial shards")
            adopt(folder, job.plan.layout, publishing=record.publishing)
            lock.doubt.unlink()
        check_space(folder, job, publishing=record.publishing)
        writer = LocalWriter(folder.parts, folder.path, fence=lock.check)
        try:
            keeper = DurableKeeper(lock, writer, Journal(folder.run / f"journal-{lock.token}.jsonl"))
            passes = Passes(
                plan=job.plan,
                worker=Worker(job.plan, lambda path: open_reader(path, job.resources.backend), job.resources.kernel),
                executor=executor,
                writer=writer,
                keeper=keeper,
                progress=progress,
                store=store,
                scan_checkpoint=folder.run / "scan.npz",
                speculate=speculate,
            )
            return _merge(job, folder, record, passes, keeper, trust=trust_journal, stop=stop, began=began)
        except NumericError:
            lock.check()
            shutil.rmtree(folder.run, ignore_errors=True)  # of no use to a run with repaired inputs
            raise
        except OutputError:
            lock.check()  # a run that lost OUT finds its files gone: this is why
            raise
        finally:
            writer.close()
    finally:
        lock.release()


def _merge(
    job: Job,
    folder: OutFolder,
    record: Record,
    passes: Passes,
    keeper: DurableKeeper,
    *,
    trust: bool,
    stop: threading.Event | None,
    began: float,
) -> MergeReport:
    shards = job.plan.layout.shards
    kept = {s.name for s in shards if folder.part(s, publishing=record.publishing) is not None}
    for shard in shards:
        if shard.name not in kept:
            keeper.writer.create(shard.name, shard.size)
    passes.warm_up()
    passes.cuts |= record.cuts
    passes.find_thresholds(record.thresholds)
    current = record.covering(r for r in record.merged if r.unit.shard in kept and passes.is_current(r))
    resumed = _take_over(passes, keeper.writer, current, trust=trust, stop=stop)
    passes.merge_missing()
    passes.prove()
    passes.settle_majority()
    passes.check_numbers()
    _check_inputs(job, folder, keeper.lock)
    blocks = _blocks(job, passes)
    report = describe(
        job,
        passes.totals,
        passes.model_cuts,
        passes.results.values(),
        blocks,
        bytes_read=passes.worker.requested_bytes,
        elapsed_seconds=time.monotonic() - began,
        peak_rss_bytes=peak_rss_bytes(),
        resumed_units=resumed,
        redone_units=passes.redone,
        kernel=passes.worker.kernel.kind,
        executor=passes.executor.name,
        thresholds_from=passes.thresholds_from,
        mispredicted=passes.mispredicted,
        phases=passes.phases,
    )
    companions = companion_files(job.base_path, job.recipe, model_card(job.recipe, report))
    keeper.journal.publishing()
    keeper.journal.commit()
    origin = {
        "models": {m.text: os.path.relpath(m.path, folder.path) for m in models_of(job.recipe)},
        "max_shard_bytes": job.max_shard_bytes,
        "thresholds": pack(passes.model_cuts),
        "majority": report.majority_sign,
        "stamps": job.stamps,
    }
    publish(folder, job.plan.layout, blocks, report, companions, origin, keeper.lock.check)
    return report


def peak_rss_bytes() -> int:
    """This process's largest resident set. Not `ru_maxrss`: it is inherited from the process that started this one."""
    with suppress(OSError), open("/proc/self/status") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _take_over(
    passes: Passes, writer: LocalWriter, results: Sequence[MergeResult], *, trust: bool, stop: threading.Event | None
) -> int:
    """Accept journalled ranges that today's thresholds would give and whose bytes are still what they were."""
    if not results:
        return 0
    with phase(passes.progress, "check", sum(r.unit.nbytes for r in results)):
        for result in results:
            if stop is not None and stop.is_set():
                raise StoppedError("stopped; everything finished is kept. Run the same command again to resume.")
            unit = result.unit
            if trust or block_digests(writer.read(unit.shard, unit.start, unit.stop)) == result.blocks:
                passes.results[unit] = result
            passes.progress.advance(unit.nbytes)
    logger.info("resuming: %d of %d journalled units stand", len(passes.results), len(results))
    return len(passes.results)


def _check_inputs(job: Job, folder: OutFolder, lock: RunLock) -> None:
    """Raises CheckpointError, and discards the work, where an input file was changed while it was read."""
    now = stamp_inputs([job.plan.base, *job.plan.experts, *job.plan.extras])
    if changed := sorted(name for name, stamp in job.stamps.items() if now.get(name) != stamp):
        lock.check()
        shutil.rmtree(folder.run, ignore_errors=True)
        raise CheckpointError(
            listing("inputs were changed while they were merged:", changed, "Nothing was published. Run again.")
        )


def _blocks(job: Job, passes: Passes) -> dict[str, list[str]]:
    """Digests of every 1 MiB block of every shard, in file order."""
    blocks: dict[str, list[str]] = {shard.name: [] for shard in job.plan.layout.shards}
    for unit in sorted(passes.results):
        blocks[unit.shard].extend(passes.results[unit].blocks)
    for shard in job.plan.layout.shards:
        assert len(blocks[shard.name]) == -(-shard.size // BLOCK_BYTES), "every byte in exactly one unit"
    return blocks
