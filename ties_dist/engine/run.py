"""The conductor: from a prepared job to a published model, resuming whatever an interrupted run left in OUT.

What has to be undone or noted on the way out is carried by contexts: the lock (`hold`), the open files (`open_run`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ties_dist.engine.passes import Passes
from ties_dist.engine.reporting import describe
from ties_dist.engine.reread import reread
from ties_dist.errors import CheckpointError, ClusterError, NumericError, OutputError, PlanError
from ties_dist.executors.base import Executor
from ties_dist.inputs.stamps import changed_meanwhile
from ties_dist.messages import listing
from ties_dist.output.card import model_card
from ties_dist.output.companions import companion_files
from ties_dist.output.folder import OutFolder
from ties_dist.output.holder import Holder
from ties_dist.output.journal import Journal, Record
from ties_dist.output.lock import RunLock
from ties_dist.output.manifest import Manifest, Origin, Shard
from ties_dist.output.publish import Finished, give_names
from ties_dist.output.report import MergeReport
from ties_dist.output.resume import adopt, claim
from ties_dist.planning.arrange import models_of
from ties_dist.planning.plan import SEMANTICS_VERSION, MergePlan
from ties_dist.planning.prepare import Job
from ties_dist.progress import Noted, Progress
from ties_dist.statistics.counts import StatisticsStore
from ties_dist.storage.base import BLOCK_BYTES, Writer
from ties_dist.storage.place import Place
from ties_dist.storage.snapshot import Snapshot
from ties_dist.thresholds import Cuts, ModelCut
from ties_dist.values.items import MergeResult, blocks_by_file, output_files
from ties_dist.values.machine import peak_rss_bytes
from ties_dist.values.stretches import Stretch, Vector
from ties_dist.worker.merging import MergeStep
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

    def sums(self, taken: Mapping[Stretch, Sequence[Vector]]) -> None:
        for stretch, vectors in taken.items():
            self.journal.sums(stretch, vectors)
        self.journal.commit()

    def merged(self, results: Sequence[MergeResult]) -> None:
        self.lock.check()
        self.writer.sync(output_files(r.item for r in results))
        for result in results:
            self.journal.merged(result)
        self.journal.commit()


@dataclass(frozen=True, kw_only=True)
class Run:
    """One merge under way in an OUT that is ours. record: what interrupted runs of it left."""

    job: Job
    folder: OutFolder
    lock: RunLock
    record: Record
    journal: Journal
    step: MergeStep


def run(
    job: Job,
    out: Place,
    *,
    executor: Executor,
    progress: Progress,
    store: StatisticsStore | None = None,
    stop: threading.Event | None = None,
    gpus: Gpus | None = None,
    also: Sequence[MergePlan] = (),
) -> MergeReport:
    """Merge a prepared job into OUT, as its options say.

    also: merges of the same inputs that will look for their thresholds in the store; a scan counts them too.

    Raises OutputError, LockedError, PlanError, NumericError, CheckpointError, StoppedError, ProofError.
    """
    began, options = time.monotonic(), job.options
    folder = OutFolder(place=out, fingerprint=job.plan.fingerprint)
    folder.check(job.plan.models)
    _ = job.sight  # taken now: while this run waits for the lock, its inputs may change
    noted = Noted(progress)
    with hold(folder, executor, noted, wait=options.wait, stop=stop) as lock:
        standing = claim(folder, job, lock.check)
        if standing.done is not None:
            lock.settle(lock.doubts)
            return standing.done
        with open_run(job, folder, lock, standing.record, executor, gpus) as opened:
            passes = Passes(
                plan=job.plan,
                step=opened.step,
                executor=executor,
                keeper=DurableKeeper(lock, opened.step.writer, opened.journal),
                progress=noted,
                store=store,
                scan_snapshot=Snapshot(out, f"{folder.run}/scan.npz"),
                also=also,
                speculate=options.speculate,
                found=resume(opened),
                trust=options.trust_journal,
            )
            return publish(opened, passes.run(), began)


@contextmanager
def hold(
    folder: OutFolder, executor: Executor, noted: Noted, *, wait: bool, stop: threading.Event | None
) -> Iterator[RunLock]:
    """OUT's lock. What others may still write at the end is noted, for whoever comes next."""
    usage = executor.usage
    me = Holder.myself(elsewhere=usage.elsewhere)
    lock = RunLock(folder.place, me=me, news=lambda: {**noted.now, "workers": usage.workers})
    with lock.held(wait=wait, stop=stop):
        try:
            yield lock
        except (OutputError, PlanError, ClusterError, FileNotFoundError):
            lock.check()  # a run that lost OUT, or its workers, finds its files gone: this is why
            raise
        finally:
            if usage.unanswered:
                with suppress(OutputError):  # LockedError: whoever took over doubts us anyhow
                    lock.check()
                    if folder.is_begun():
                        lock.doubt(lock.token)


@contextmanager
def open_run(
    job: Job, folder: OutFolder, lock: RunLock, record: Record, executor: Executor, gpus: Gpus | None
) -> Iterator[Run]:
    """Everything opened that the merge needs. Work that met NaN or Inf is discarded: of no use to repaired inputs."""
    if doubts := lock.doubts:
        logger.warning("the run before may still be alive: going on with copies of its partial shards")
        adopt(folder, job.plan.layout.shards, publishing=record.publishing)
        lock.settle(doubts)
    site = Site(plan=job.plan, resources=job.resources, folder=folder, holder=lock.me)
    try:
        executor.start(site)
    finally:
        site.tidy()
    step, journal = site.open(gpus), Journal(folder.place, folder.run, lock.token, job.plan.counters.names)
    with closing(step.writer), _discarding(folder, lock, on=NumericError):
        yield Run(job=job, folder=folder, lock=lock, record=record, journal=journal, step=step)


@contextmanager
def _discarding(folder: OutFolder, lock: RunLock, *, on: type[Exception]) -> Iterator[None]:
    """Remove what was done where an error says that it is of no use."""
    try:
        yield
    except on:
        lock.check()
        folder.discard()
        raise


def resume(run: Run) -> Record:
    """What an interrupted run left, of the shards that can be read back; the others are laid out anew."""
    record, kept = run.record, set()
    for shard in run.job.plan.layout.shards:
        if run.folder.resumable(shard, publishing=record.publishing) is not None:
            kept.add(shard.name)
        else:
            run.step.writer.create(shard.name, shard.size)
    return replace(record, merged=[r for r in record.merged if kept.issuperset(output_files([r.item]))])


def publish(run: Run, passes: Passes, began: float) -> MergeReport:
    """Give what the passes have merged its names, once nothing else can reach its bytes. began: by time.monotonic."""
    _check_inputs(run)
    _bring_home(run, passes)
    job, layout, blocks = run.job, run.job.plan.layout, blocks_by_file(passes.results.values())
    for shard in layout.shards:
        assert len(blocks[shard.name]) == -(-shard.size // BLOCK_BYTES), "every byte in exactly one unit"
    reread(run.folder, layout.shards, blocks, passes.executor.usage, passes.progress)
    for remark in passes.remarks:
        logger.info("%s", remark)
    report = _report(job, passes, blocks, time.monotonic() - began)
    companions = companion_files(job.copied, job.recipe, model_card(job.recipe, report), job.companions)
    origin = Origin(
        models={m.text: tuple(m.relative_to(str(run.folder.place))) for m in models_of(job.recipe)},
        max_shard_bytes=job.options.max_shard_size,
        thresholds=passes.model_cuts,
        majority=report.majority_sign,
        sight=job.sight,
    )
    manifest = Manifest(
        fingerprint=report.fingerprint,
        semantics_version=SEMANTICS_VERSION,
        output_digest=report.output_digest,
        companions=tuple(sorted(companions)),
        origin=origin,
        shards={s.name: Shard(size=s.size, blocks=tuple(blocks[s.name])) for s in layout.shards},
    )
    run.journal.publishing()
    run.journal.commit()
    finished = Finished(layout=layout, manifest=manifest, report=report, companions=companions)
    give_names(run.folder, finished, run.lock.check)
    return report


def _report(job: Job, passes: Passes, blocks: Mapping[str, Sequence[str]], seconds: float) -> MergeReport:
    usage = passes.executor.usage
    return describe(
        job,
        passes.totals,
        passes.model_cuts,
        passes.results.values(),
        blocks,
        bytes_read=passes.worker.requested_bytes + usage.requested_bytes,
        elapsed_seconds=seconds,
        peak_rss_bytes=max(peak_rss_bytes(), usage.peak_rss_bytes),
        resumed_units=passes.resumed,
        redone_units=passes.redone,
        kernel=passes.worker.kernel.kind,
        processor=passes.worker.kernel.processor,
        executor=passes.executor.name,
        thresholds_from=passes.thresholds_from,
        mispredicted=passes.mispredicted,
        phases=passes.phases,
        remarks=passes.remarks,
    )


def _check_inputs(run: Run) -> None:
    """Raises CheckpointError, and discards the work, where an input file was changed while it was read."""
    if changed := changed_meanwhile(run.job.sight, run.job.plan.models):
        run.lock.check()
        run.folder.discard()
        raise CheckpointError(
            listing("inputs were changed while they were merged:", changed, "Nothing was published. Run again.")
        )


def _bring_home(run: Run, passes: Passes) -> None:
    """Go on with copies of shards of which other bytes than the final ones may still be on their way to the disk.

    A worker that was lost may have written a unit with a guess that was corrected since; what had arrived of it before
    the copy was made is merged again here. What cannot be copied is begun anew, and all of it merged again.
    """
    unanswered = (task for tasks in passes.executor.usage.unanswered.values() for task in tasks)
    stray = {task.item for task in unanswered if not passes.is_final(task)}
    if not stray:
        return
    step, names = run.step, set(output_files(stray))
    shards = [s for s in run.job.plan.layout.shards if s.name in names]
    if run.folder.place.reads_parts:
        logger.info("writes of lost workers may still arrive: going on with copies of %d shards", len(names))
        adopt(run.folder, shards, publishing=run.record.publishing)
        step.writer.close()  # opens the copies
    else:
        logger.info("writes of lost workers may still arrive: merging %d shards again", len(names))
        for shard in shards:
            step.writer.create(shard.name, shard.size)
        stray = {item for item in passes.results if names.intersection(output_files([item]))}
    for unit in sorted(stray):
        result = passes.results[unit]
        if not (run.folder.place.reads_parts and StillThere()(step, result)):
            task = passes.task(unit, result.majority)
            again = step.store(task, step.compute(task, step.load(task)))
            assert again.blocks == result.blocks, "the same bytes, whoever merges"
    step.writer.sync(sorted(names))
