"""The conductor: from a prepared job to a published model, resuming whatever an interrupted run left in OUT."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ties_dist.engine.passes import Passes
from ties_dist.engine.totals import describe
from ties_dist.errors import CheckpointError, ClusterError, NumericError, OutputError, PlanError
from ties_dist.executors.base import Executor
from ties_dist.inputs.opening import stamp_inputs
from ties_dist.messages import listing
from ties_dist.output.card import model_card
from ties_dist.output.companions import companion_files
from ties_dist.output.folder import OutFolder
from ties_dist.output.journal import Journal, Record, pack, read_journals
from ties_dist.output.lock import Holder, RunLock
from ties_dist.output.publish import publish
from ties_dist.output.report import MergeReport
from ties_dist.output.resume import adopt, check_space, claim
from ties_dist.planning.arrange import models_of
from ties_dist.planning.plan import MergePlan
from ties_dist.planning.prepare import Job
from ties_dist.progress import Noted, Progress, phase
from ties_dist.statistics.counts import StatisticsStore
from ties_dist.storage.base import BLOCK_BYTES, Writer
from ties_dist.storage.snapshot import Snapshot
from ties_dist.thresholds import Cuts, ModelCut
from ties_dist.values.items import MergeResult, blocks_by_file, output_files
from ties_dist.values.machine import peak_rss_bytes
from ties_dist.worker.operations import StillThere
from ties_dist.worker.site import Site

if TYPE_CHECKING:
    from ties_dist.compiler.cuda import Gpus

logger = logging.getLogger(__name__)


@dataclass
class DurableKeeper:
    """Group commit: bytes are synced first, then their journal lines; both only while the lock is ours."""

    lock: RunLock
    writer: Writer
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
        self.writer.sync(output_files(r.item for r in results))
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
    gpus: Gpus | None = None,
    also: Sequence[MergePlan] = (),
) -> MergeReport:
    """Merge a prepared job into OUT. trust_journal: take journalled ranges over without reading them again.

    also: merges of the same inputs that will look for their thresholds in the store; a scan counts them too.

    Raises OutputError, LockedError, PlanError, NumericError, CheckpointError, StoppedError, ProofError.
    """
    began = time.monotonic()
    folder = OutFolder(path=out, fingerprint=job.plan.fingerprint)
    folder.check([Path(m.path) for m in job.plan.models])
    _ = job.stamps  # taken now: while this run waits for the lock, its inputs may change
    noted = Noted(progress)
    usage = executor.usage
    me = Holder.myself(elsewhere=usage.elsewhere)
    lock = RunLock(folder.state, me=me, news=lambda: {**noted.now, "workers": usage.workers})
    lock.acquire(wait=wait, stop=stop)
    try:
        if (done := claim(folder, job, fresh=fresh, overwrite=overwrite)) is not None:
            _settle(lock.doubts)
            return done
        record = read_journals(folder.run)
        if doubts := lock.doubts:
            logger.warning("the run before may still be alive: going on with copies of its partial shards")
            adopt(folder, job.plan.layout.shards, publishing=record.publishing)
            _settle(doubts)
        check_space(folder, job, publishing=record.publishing)
        site = Site(plan=job.plan, resources=job.resources, folder=folder, holder=lock.me)
        executor.start(site)
        step = site.open(gpus)
        try:
            journal = Journal(folder.run / f"journal-{lock.token}.jsonl")
            passes = Passes(
                plan=job.plan,
                step=step,
                executor=executor,
                keeper=DurableKeeper(lock, step.writer, journal),
                progress=noted,
                store=store,
                scan_snapshot=Snapshot(folder.run / "scan.npz"),
                also=also,
                speculate=speculate,
            )
            return _merge(job, folder, record, passes, journal, lock, trust=trust_journal, began=began)
        except NumericError:
            lock.check()
            shutil.rmtree(folder.run, ignore_errors=True)  # of no use to a run with repaired inputs
            raise
        finally:
            step.writer.close()
    except (OutputError, PlanError, ClusterError):
        lock.check()  # a run that lost OUT, or its workers, finds its files gone: this is why
        raise
    finally:
        if usage.unanswered and folder.run.exists():
            with suppress(OSError):  # LockedError: whoever took over doubts us anyhow
                lock.check()
                lock.doubt(lock.token)
        lock.release()


def _settle(doubts: Sequence[Path]) -> None:
    for doubt in doubts:
        doubt.unlink(missing_ok=True)  # by whoever took over meanwhile


def _merge(
    job: Job,
    folder: OutFolder,
    record: Record,
    passes: Passes,
    journal: Journal,
    lock: RunLock,
    *,
    trust: bool,
    began: float,
) -> MergeReport:
    shards = job.plan.layout.shards
    kept = {s.name for s in shards if folder.part(s, publishing=record.publishing) is not None}
    for shard in shards:
        if shard.name not in kept:
            passes.step.writer.create(shard.name, shard.size)
    passes.warm_up()
    passes.cuts |= record.cuts
    passes.find_thresholds(record.thresholds)
    current = record.covering(
        r for r in record.merged if kept.issuperset(output_files([r.item])) and passes.is_current(r)
    )
    resumed = _take_over(passes, current, trust=trust)
    passes.merge_missing()
    passes.prove()
    passes.settle_majority()
    passes.check_numbers()
    _check_inputs(job, folder, lock)
    _bring_home(folder, passes, publishing=record.publishing)
    blocks, remarks = _blocks(job, passes), passes.remarks
    report = describe(
        job,
        passes.totals,
        passes.model_cuts,
        passes.results.values(),
        blocks,
        bytes_read=passes.worker.requested_bytes + passes.executor.usage.requested_bytes,
        elapsed_seconds=time.monotonic() - began,
        peak_rss_bytes=max(peak_rss_bytes(), passes.executor.usage.peak_rss_bytes),
        resumed_units=resumed,
        redone_units=passes.redone,
        kernel=passes.worker.kernel.kind,
        executor=passes.executor.name,
        thresholds_from=passes.thresholds_from,
        mispredicted=passes.mispredicted,
        phases=passes.phases,
        remarks=remarks,
    )
    for remark in remarks:
        logger.info("%s", remark)
    companions = companion_files(job.base_path, job.recipe, model_card(job.recipe, report), job.companions)
    journal.publishing()
    journal.commit()
    origin = {
        "models": {m.text: m.relative_to(folder.path) for m in models_of(job.recipe)},
        "max_shard_bytes": job.max_shard_bytes,
        "thresholds": pack(passes.model_cuts),
        "majority": report.majority_sign,
        "stamps": job.stamps,
    }
    publish(folder, job.plan.layout, blocks, report, companions, origin, lock.check)
    return report


def _take_over(passes: Passes, results: Sequence[MergeResult], *, trust: bool) -> int:
    """Accept journalled ranges that today's thresholds would give and whose bytes are still what they were."""
    if not results:
        return 0
    if trust:
        passes.results |= {r.item: r for r in results}
        return len(results)
    with phase(passes.progress, "check", sum(r.item.nbytes for r in results)):
        checked = passes.executor.call(passes.step, StillThere(), results, lambda result: result.item.portion)
        for result, same in checked:
            if same:
                passes.results[result.item] = result
            passes.progress.advance(result.item.nbytes)
    logger.info("resuming: %d of %d journalled units stand", len(passes.results), len(results))
    return len(passes.results)


def _bring_home(folder: OutFolder, passes: Passes, *, publishing: bool) -> None:
    """Go on with copies of shards of which other bytes than the final ones may still be on their way to the disk.

    A worker that was lost may have written a unit with a guess that was corrected since; what had arrived of it before
    the copy was made is merged again here.
    """
    unanswered = (task for tasks in passes.executor.usage.unanswered.values() for task in tasks)
    stray = {task.item for task in unanswered if not passes.is_final(task)}
    names = set(output_files(stray))
    if not stray:
        return
    logger.info("writes of lost workers may still arrive: going on with copies of %d shards", len(names))
    adopt(folder, [s for s in passes.plan.layout.shards if s.name in names], publishing=publishing)
    step = passes.step
    step.writer.close()  # opens the copies
    for unit in sorted(stray):
        result = passes.results[unit]
        if not StillThere()(step, result):
            task = passes.task(unit, result.majority)
            again = step.store(task, step.compute(task, step.load(task)))
            assert again.blocks == result.blocks, "the same bytes, whoever merges"
    step.writer.sync(sorted(names))


def _check_inputs(job: Job, folder: OutFolder, lock: RunLock) -> None:
    """Raises CheckpointError, and discards the work, where an input file was changed while it was read."""
    now = stamp_inputs(job.plan.models)
    if changed := sorted(name for name, stamp in job.stamps.items() if now.get(name) != stamp):
        lock.check()
        shutil.rmtree(folder.run, ignore_errors=True)
        raise CheckpointError(
            listing("inputs were changed while they were merged:", changed, "Nothing was published. Run again.")
        )


def _blocks(job: Job, passes: Passes) -> dict[str, list[str]]:
    """Digests of every 1 MiB block of every shard, in file order."""
    blocks = blocks_by_file(passes.results.values())
    for shard in job.plan.layout.shards:
        assert len(blocks[shard.name]) == -(-shard.size // BLOCK_BYTES), "every byte in exactly one unit"
    return blocks
