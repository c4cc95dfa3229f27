"""The passes of a merge: thresholds, merge, redo, proof. Where results are kept is the keeper's matter."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Protocol

from ties_dist.engine.scan import NOTHING_PUBLISHED, Scan
from ties_dist.engine.sums import Summation
from ties_dist.engine.totals import Totals
from ties_dist.errors import NumericError, ProofError
from ties_dist.executors.base import Executor
from ties_dist.messages import listing
from ties_dist.methods.scalars import Scalars
from ties_dist.output.journal import Record
from ties_dist.planning.plan import MergePlan
from ties_dist.planning.sample import sample_slices
from ties_dist.progress import Progress, phase
from ties_dist.statistics.counts import StatisticsStore
from ties_dist.storage.snapshot import Snapshot
from ties_dist.thresholds import Cuts, ModelCut, Threshold
from ties_dist.values.items import MergeResult, MergeTask, WorkItem
from ties_dist.values.stretches import Stretch, Vector
from ties_dist.worker.merging import MergeStep, Worker
from ties_dist.worker.operations import SolveMatrix, StillThere

logger = logging.getLogger(__name__)

COMMIT_SECONDS = 2.0
"""Units finished in between are made durable together."""


SIGNS_FROM = 16
"""Samples: a model of fewer tells the majority sign by its first units soon enough."""


class Keeper(Protocol):
    """Remembers what a run found, so that an interrupted one can go on."""

    def thresholds(self, cuts: Sequence[ModelCut]) -> None: ...

    def cuts(self, cuts: Mapping[str, Cuts]) -> None: ...

    def sums(self, taken: Mapping[Stretch, Sequence[Vector]]) -> None: ...

    def merged(self, results: Sequence[MergeResult]) -> None: ...


class Forgetful:
    """Keeps nothing: for merges in memory."""

    def thresholds(self, cuts: Sequence[ModelCut]) -> None: ...

    def cuts(self, cuts: Mapping[str, Cuts]) -> None: ...

    def sums(self, taken: Mapping[Stretch, Sequence[Vector]]) -> None: ...

    def merged(self, results: Sequence[MergeResult]) -> None: ...


@dataclass
class Passes:
    """One merge in progress. results: the units whose bytes are written, by range; cuts: thresholds by tensor; scalars:
    what follows from the sums of a tensor."""

    plan: MergePlan
    step: MergeStep
    executor: Executor
    keeper: Keeper
    progress: Progress
    store: StatisticsStore | None = None
    scan_snapshot: Snapshot | None = None
    found: Record = field(default_factory=Record)
    """What an interrupted run left: thresholds, and units whose bytes can still be read."""
    trust: bool = False
    """Take those units over without reading them again."""
    also: Sequence[MergePlan] = ()
    """Merges whose thresholds a scan counts as well (`Scan`)."""
    speculate: bool | None = None
    """Take predicted thresholds: always, never, or (None) where that is likely to be right."""
    mispredicted: bool = False
    results: dict[WorkItem, MergeResult] = field(default_factory=dict)
    model_cuts: tuple[ModelCut, ...] = ()
    cuts: dict[str, Cuts] = field(default_factory=dict)
    scalars: dict[str, Scalars] = field(default_factory=dict)
    thresholds_from: str | None = None
    resumed: int = 0
    redone: int = 0
    sign_sum: float = 0
    """Of the units so far: a guess at the majority sign, proven or redone at the end."""
    phases: dict[str, float] = field(default_factory=dict)
    unsolved: list[str] = field(default_factory=list)
    """Matrices without a solution."""
    _warming: threading.Thread | None = None

    @property
    def _per_tensor(self) -> bool:
        return self.plan.needs.trim is not None and self.plan.needs.trim.scope == "tensor"

    @property
    def totals(self) -> Totals:
        return Totals.of(self.plan, self.results.values())

    @property
    def worker(self) -> Worker:
        """Of this process."""
        return self.step.worker

    @property
    def remarks(self) -> tuple[str, ...]:
        """What to say of the merge besides its numbers."""
        said = []
        if self.unsolved:
            shown = ", ".join(self.unsolved[:4]) + (", ..." if len(self.unsolved) > 4 else "")
            said.append(f"{len(self.unsolved)} matrices had no solution and took the plain mean: {shown}")
        if count := self.totals.overall.own.get("plain_mean"):
            said.append(f"{count / self.plan.elements:.2%} of the entries have no Fisher information: plain mean")
        return tuple(said)

    def run(self) -> Passes:
        """All passes, in the order that makes each possible; afterwards `results` cover the output, and are proven.

        Raises NumericError, ProofError, and what the executor raises.
        """
        self.warm_up()
        self.cuts |= self.found.cuts
        self.scalars |= self._summation().whole()
        self.find_thresholds(self.found.thresholds)
        self.take_over()
        self.merge_missing()
        self.prove()
        self.settle_majority()
        self.check_numbers()
        return self

    def warm_up(self) -> None:
        """Let the kernel compile while thresholds are looked for; `merge_missing` waits for it."""

        def prepare() -> None:
            with suppress(OSError, MemoryError):  # met again, and told, where a kernel is needed
                self.step.warm_up()

        self._warming = threading.Thread(target=prepare, name="compile", daemon=True)
        self._warming.start()

    def find_thresholds(self, known: Sequence[ModelCut] | None = None) -> None:
        """Whole-model thresholds, once for all units. known: those that an interrupted run has found.

        Thresholds of single tensors are found group by group, just before their tensors merge.
        """
        if self.plan.needs.trim is None:
            return
        if self._per_tensor:
            self.thresholds_from = "scan"
        elif known is not None:
            self._spread(known, "journal")
        else:
            self._scan(self.speculate)

    def _proven(self) -> dict[int, Threshold]:
        """Of thresholds some of which are wrong those that the counts prove: their experts need no scan.

        Where ties are cut all are scanned, since the place of the cut is not proven by itself.
        """
        assert self.plan.needs.trim is not None
        if self.plan.needs.trim.tie_policy == "exact_k":
            return {}
        wrong = self.totals.wrong_thresholds(self.model_cuts)
        return {i: cut.threshold for i, cut in enumerate(self.model_cuts) if i not in wrong}

    def _scan(self, speculate: bool | None, proven: Mapping[int, Threshold] | None = None) -> None:
        with self._timed("scan"):
            scan = self._scanner()
            found = scan.whole_model(speculate=speculate, proven=proven or {})
        self._spread(found, scan.source)
        self.keeper.thresholds(found)

    def _scanner(self) -> Scan:
        return Scan(self.plan, self.step, self.executor, self.progress, self.store, self.scan_snapshot, self.also)

    def _spread(self, cuts: Sequence[ModelCut], source: str) -> None:
        self.model_cuts, self.thresholds_from = tuple(cuts), source
        self.cuts = {t.source: tuple(c.of(t.source, t.numel) for c in cuts) for t in self.plan.counted}

    def task(self, unit: WorkItem, majority: int = 1) -> MergeTask:
        trim, sums = self.plan.needs.trim, self.plan.needs.sums
        tensors = self.plan.tensors_of(unit) if trim or sums else ()
        return MergeTask(
            item=unit,
            cuts={t: self.cuts[t] for t in tensors} if trim else {},
            majority=majority,
            scalars={t: self.scalars[t] for t in tensors} if sums else {},
        )

    def is_current(self, result: MergeResult) -> bool:
        """Whether a result was computed with today's thresholds and sums."""
        if self.plan.by_tensor and self._unfound([result.item]):
            return False
        return self.task(result.item).state_digest == result.state_digest

    def is_final(self, task: MergeTask) -> bool:
        """Whether a task writes the bytes that its unit's result has."""
        result = self.results.get(task.item)
        same_sign = result is not None and (result.majority == task.majority or not result.dependent)
        return result is not None and same_sign and result.state_digest == task.state_digest

    def take_over(self) -> None:
        """Accept units of an interrupted run that today's thresholds would give and whose bytes are what they were."""
        current = self.found.covering(r for r in self.found.merged if self.is_current(r))
        if self.trust:
            self.results |= {r.item: r for r in current}
        elif current:
            with phase(self.progress, "check", sum(r.item.nbytes for r in current)):
                for result, same in self.executor.call(self.step, StillThere(), current, lambda r: r.item.portion):
                    if same:
                        self.results[result.item] = result
                    self.progress.advance(result.item.nbytes)
            logger.info("resuming: %d of %d journalled units stand", len(self.results), len(current))
        self.resumed = len(self.results)

    def merge_missing(self) -> None:
        """Merge what no result covers, taking the majority sign of the units so far for the final one."""
        missing = list(self.plan.items(self.results))
        self.solve(missing)
        if self._warming is not None:
            self._warming.join()
        if self.plan.needs.majority is not None:
            self.sign_sum = self.totals.signs if self.results else self._sampled_signs()
        with self._timed("merge"), phase(self.progress, "merge", sum(u.nbytes for u in missing)):
            for group in self._groups(missing):
                self._merge(group)

    def solve(self, units: Sequence[WorkItem]) -> None:
        """Merge the matrices that these units copy from, the heaviest first. Raises NumericError."""
        touched = {t for unit in units for t in self.plan.tensors_of(unit)} & self.plan.matrices.keys()
        if not touched:
            return
        order = sorted(touched, key=lambda t: (-self.plan.matrices[t].work_bytes, t))
        problems = []
        with (
            self._timed("solve"),
            phase(self.progress, "solve", sum(self.plan.matrices[t].nbytes for t in order)),
        ):
            names = [e.name for e in self.plan.experts]
            asked = self.executor.call(
                self.step, SolveMatrix(), order, lambda tensor: self.plan.matrices[tensor].portion(len(names))
            )
            for tensor, solved in asked:
                problems += [
                    f"{tensor}: {n:,} NaN or Inf in '{name}' or its Gram matrix"
                    for n, name in zip(solved.nonfinite, names, strict=True)
                    if n
                ]
                if solved.overflowing:
                    problems.append(
                        f"{tensor}: the result overflows in {solved.overflowing:,} entries: use `out_dtype: float32`"
                    )
                if solved.plain:
                    self.unsolved.append(tensor)
                self.progress.advance(self.plan.matrices[tensor].nbytes)
        if problems:
            raise NumericError(listing("some numbers are not finite:", problems, NOTHING_PUBLISHED))
        if self.unsolved:
            logger.warning(
                "no solution for %d matrices (%s): they take the plain mean", len(self.unsolved), self.unsolved[0]
            )

    def _sampled_signs(self) -> float:
        """A guess at the sign of the sum of elected signs, so that the first units assume the right majority already.

        Later ones weigh the units before them more.
        """
        slices, weights = sample_slices(self.plan)
        if self._per_tensor or self.plan.elements < SIGNS_FROM * sum(stop - start for _, start, stop in slices):
            return 0.0
        return self.worker.sample_signs(slices, weights, self.cuts)

    def _groups(self, units: Sequence[WorkItem]) -> Iterator[Sequence[WorkItem]]:
        """All units at once; or, where tensors have thresholds or sums of their own, budget-sized groups behind those.

        The second read of a group then comes from the page cache, not from the disk.
        """
        if not self.plan.by_tensor:
            yield units
            return
        group: list[WorkItem] = []
        tensors: set[str] = set()
        for i, unit in enumerate(units):
            group.append(unit)
            tensors |= self._unfound([unit])
            group_bytes = sum(self.plan.sizes[t] for t in tensors) * 4 * len(self.plan.operands)
            if group_bytes >= self.plan.memory_budget // 2 or i == len(units) - 1:
                self.select_for(group)
                yield group
                group, tensors = [], set()

    def select_for(self, units: Iterable[WorkItem]) -> None:
        """Find the thresholds and sums of the tensors these units touch, where each tensor has its own."""
        touched = sorted(self._unfound(units)) if self.plan.by_tensor else []
        if self._per_tensor:
            found = self._scanner().per_tensor(touched)
            self.cuts |= found
            self.keeper.cuts(found)
        if self.plan.needs.sums is not None:
            with self._timed("sum"):
                self.scalars |= self._summation().of(touched)

    def _unfound(self, units: Iterable[WorkItem]) -> set[str]:
        """Of the tensors that these units touch those of which something is still to be found."""
        found = self.cuts if self._per_tensor else self.scalars
        return {t for unit in units for t in self.plan.tensors_of(unit)} - found.keys()

    def _summation(self) -> Summation:
        return Summation(self.plan, self.step, self.executor, self.found.sums, self.keeper.sums, COMMIT_SECONDS)

    def _merge(self, units: Iterable[WorkItem], majority: int | None = None) -> None:
        pending: list[MergeResult] = []
        last = time.monotonic()

        def describe(unit: WorkItem) -> MergeTask:
            return self.task(unit, majority or (1 if self.sign_sum >= 0 else -1))

        try:
            for result in self.executor.map_unordered(self.step, units, describe):
                pending.append(result)
                self.sign_sum += result.sign_sum
                self.progress.advance(result.item.nbytes)
                if time.monotonic() - last > COMMIT_SECONDS:
                    self._keep(pending)
                    pending, last = [], time.monotonic()
        finally:
            self._keep(pending)

    def _keep(self, results: Sequence[MergeResult]) -> None:
        if results:
            self.keeper.merged(results)
            self.results |= {r.item: r for r in results}

    def _redo(self, units: Sequence[WorkItem], *, majority: int | None, reason: str, level: int = logging.INFO) -> None:
        if units:
            logger.log(level, "%s: redoing %d of %d units", reason, len(units), len(self.results))
            with self._timed("redo"), phase(self.progress, "redo", sum(u.nbytes for u in units)):
                self._merge(sorted(units), majority=majority)
            self.redone += len(units)

    def settle_majority(self) -> None:
        """Redo the units with exact cancellations, if the majority sign turned out not to be what they assumed."""
        if self.plan.needs.majority is not None:
            sign = self.totals.majority
            wrong = [r.item for r in self.results.values() if r.dependent and r.majority != sign]
            reason = f"exact cancellations took the wrong sign (the majority's is {sign:+d})"
            self._redo(wrong, majority=sign, reason=reason, level=logging.DEBUG)  # the usual way, nothing went wrong

    def prove(self) -> None:
        """Raises ProofError unless the entries counted above and at each threshold prove it.

        Wrong ones from a sample, or from a stale cache entry (taken now, or by the run that this one resumes), are
        found by a scan, and what they changed is redone.
        """
        wrong = self.totals.unproven(self.model_cuts)
        if wrong and self.model_cuts and self.thresholds_from != "scan":
            logger.warning("the thresholds from the %s were wrong (%s): scanning", self.thresholds_from, wrong[0])
            self.mispredicted = True
            for i in range(len(self.plan.experts) if self.store is not None else 0):
                assert self.store is not None
                self.store.discard(self.store.key(self.plan.base, self.plan.experts[i], self.plan.sizes))
            self._scan(speculate=False, proven=self._proven())
            stale = [r.item for r in self.results.values() if not self.is_current(r)]
            self._redo(stale, majority=None, reason="thresholds changed")
            wrong = self.totals.unproven(self.model_cuts)
        if wrong:
            raise ProofError(
                listing("counts contradict the thresholds:", wrong, "Were inputs changed while they were read?")
            )

    def check_numbers(self) -> None:
        """Raises NumericError where NaN or Inf came in or went out."""
        if problems := self.totals.nonfinite():
            raise NumericError(listing("some numbers are not finite:", problems, NOTHING_PUBLISHED))

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self.phases[name] = self.phases.get(name, 0.0) + time.monotonic() - began
