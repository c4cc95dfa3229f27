"""The statistics pass: exact thresholds for the whole model, or for one tensor after another.

Whole model: one read counts every expert's coarse histogram and, bit by bit, the few buckets in which a sample expects
the threshold; only where that guess fails does a second read count the right bucket. Cached statistics skip the read.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ties_dist.errors import NumericError
from ties_dist.executors.base import Executor
from ties_dist.executors.ledger import Ledger
from ties_dist.messages import listing
from ties_dist.planning.plan import MergePlan
from ties_dist.planning.sample import SAMPLE_ELEMENTS, SAMPLE_SLICES, sample_slices
from ties_dist.progress import Progress, phase
from ties_dist.statistics.counts import StatisticsStore
from ties_dist.storage.snapshot import Snapshot
from ties_dist.thresholds import (
    KEEP_ALL,
    KEEP_NONE,
    NO_WINDOW,
    ZEROS,
    Cuts,
    Histogram,
    ModelCut,
    Prediction,
    Threshold,
    Window,
    guess_window,
    predict,
    resolve,
    to_bits,
    zero_share,
)
from ties_dist.values.items import Portion, WorkItem, as_item
from ties_dist.values.observation import Observation
from ties_dist.worker.merging import MergeStep, Worker
from ties_dist.worker.operations import CountTies, Observe, SelectTensor

logger = logging.getLogger(__name__)

LARGER_SAMPLE, LARGER_FROM = 4, 64
"""Where the sample cannot tell an atom from the next, so many times of it can halve its error; of models that are so
many times larger still, of which a scan would cost far more."""
NAMED_TENSORS = 20
"""With NaN or Inf: read again to say in which model."""
NOTHING_PUBLISHED = (
    "Nothing was published. Repair the checkpoint, or list these names under `exclude` to keep the base's."
)


@dataclass
class Scan:
    """Finds the thresholds of one plan. keep: where a long scan leaves its counts, so that a kill loses seconds."""

    plan: MergePlan
    step: MergeStep
    executor: Executor
    progress: Progress
    store: StatisticsStore | None
    keep: Snapshot | None = None
    also: Sequence[MergePlan] = ()
    """Merges of the same inputs with other densities, whose thresholds a scan counts in the same read."""
    source: str = "scan"
    _counted: dict[int, Histogram] = field(default_factory=dict)

    @property
    def worker(self) -> Worker:
        return self.step.worker

    def whole_model(
        self, *, speculate: bool | None = False, proven: Mapping[int, Threshold] | None = None
    ) -> tuple[ModelCut, ...]:
        """The exact threshold of every expert over all d elements. Raises NumericError on NaN or Inf.

        speculate: take a sample's prediction for it (`source` is then "sample"), which the merge's counts must prove;
        None: where that is likely to be right. proven: thresholds of experts that need not be looked for.
        """
        rule = self.plan.needs.trim
        assert rule is not None and rule.scope == "model"
        experts = range(len(self.plan.experts) if self.plan.elements else 0)
        found, ranks = dict(proven or {}), dict[int, int]()
        for i in experts:
            if not self._waits_for_zeros(i):
                self._rank(i, 0, ranks, found)
        windows = self._from_cache([i for i in experts if i not in found], ranks, found)
        unknown = [i for i in experts if i not in found]
        if speculate is not False and rule.tie_policy == "keep_all":
            taken = self._speculate({i: ranks[i] for i in unknown if i in ranks}, take_all=bool(speculate))
            found |= taken
            unknown = [i for i in unknown if i not in taken]
            if taken:
                self.source = "sample and scan" if unknown else "sample"
        if unknown:
            unseen = self._predict([i for i in unknown if i not in windows])
            windows |= {
                i: guess_window(unseen[i].value) if i in unseen else NO_WINDOW for i in unknown if i not in windows
            }
            waiting = [i for i in unknown if i not in ranks]
            self._count(windows | self._windows_of_others(windows) | {self._of_zeros(i): ZEROS for i in waiting})
            for i in waiting:
                self._rank(i, int(self._counted[self._of_zeros(i)].fine[0]), ranks, found)
        while missing := {i: rank for i, rank in ranks.items() if i not in found}:
            again = {}
            for i, rank in missing.items():
                answer = resolve(self._counted[i], rank)
                if isinstance(answer, Threshold):
                    found[i] = answer
                else:
                    again[i] = Window(answer, 1)
            if again:
                logger.info("the sample missed the bucket of %d thresholds: reading these experts again", len(again))
                self._count(again)
        if rule.tie_policy == "exact_k":
            return self._cut_ties(found, ranks)
        return tuple(ModelCut(found.get(i, KEEP_ALL)) for i in range(len(self.plan.experts)))

    def _waits_for_zeros(self, expert: int) -> bool:
        """Whether a rank is known only when it is known how many entries did not move."""
        rule = self.plan.needs.trim
        return rule is not None and rule.is_of_moved(expert) and self.plan.density(expert) < 1

    def _rank(self, expert: int, zeros: int, ranks: dict[int, int], found: dict[int, Threshold]) -> None:
        """Note an expert's rank, or the threshold that needs none."""
        rank = self.plan.rank(expert, zeros)
        if rank:
            ranks[expert] = rank
        else:
            found.setdefault(expert, KEEP_ALL if rank is None else KEEP_NONE)

    def _of_zeros(self, expert: int) -> int:
        """The number under which an expert's zeros are counted, behind all windows of its magnitudes."""
        return expert + (len(self.also) + 1) * len(self.plan.experts)

    def _windows_of_others(self, own: Mapping[int, Window]) -> dict[int, Window]:
        """Further windows of the experts that are read anyhow, by expert plus a multiple of their number."""
        count = len(self.plan.experts)
        windows: dict[int, Window] = {}
        for number, other in enumerate(self.also, 1):
            for i, prediction in self._predict(list(own), plan=other).items():
                window = guess_window(prediction.value)
                if self.store is not None and window not in {
                    own[i],
                    *(w for k, w in windows.items() if k % count == i),
                }:
                    windows[i + number * count] = window
        return windows

    def _from_cache(
        self, wanted: Sequence[int], ranks: dict[int, int], found: dict[int, Threshold]
    ) -> dict[int, Window]:
        """Thresholds known already, into `found`; of others the bucket that a read has to count, where that is."""
        windows: dict[int, Window] = {}
        for i in wanted if self.store is not None else ():
            assert self.store is not None
            key = self.store.key(self.plan.base, self.plan.experts[i], self.plan.sizes)
            known = self.store.load(key, self.plan.elements)
            zeros = known.zeros if known is not None and i not in ranks else 0
            if known is None or zeros is None:
                continue
            rank = self.plan.rank(i, zeros)
            threshold = known.threshold(rank) if rank else None
            if rank and threshold is None:
                windows[i] = known.window(rank)  # zeros are counted again, beside it: nothing scanned rests on a cache
                continue
            self._rank(i, zeros, ranks, found)
            if threshold is not None:
                found[i] = threshold
            self.source = "cache"
        return windows

    def _speculate(self, ranks: Mapping[int, int], *, take_all: bool) -> dict[int, Threshold]:
        """Predicted thresholds of experts whose rank lies well inside an atom: a miss costs a scan and another merge.

        Of a rank near an atom's edge a larger sample decides, where the model is large enough to be worth it; the
        experts that it cannot tell either are scanned. take_all: every prediction is taken as it comes.
        """
        if not take_all and not self.plan.is_16_bit:
            return {}
        predictions = self._predict(list(ranks))
        if not take_all:
            unsure = [i for i, rank in ranks.items() if not self._is_likely(predictions[i], rank)]
            if self.plan.elements >= LARGER_FROM * LARGER_SAMPLE * SAMPLE_SLICES * SAMPLE_ELEMENTS:
                for i in unsure:  # one at a time: a larger sample takes 100 MB
                    predictions |= self._predict([i], LARGER_SAMPLE)
            predictions = {i: p for i, p in predictions.items() if self._is_likely(p, ranks[i])}
        return {i: self._taken(p) for i, p in predictions.items()}

    def _predict(
        self, wanted: Sequence[int], times: int = 1, *, plan: MergePlan | None = None
    ) -> dict[int, Prediction]:
        """What a sample says of these experts' thresholds in a plan, by default this one; of those that have any."""
        if not wanted:
            return {}
        plan, found = plan or self.plan, {}
        magnitudes, weights = self.worker.sample(*sample_slices(self.plan, times), sorted(wanted))
        for i in wanted:
            zeros = round(plan.elements * zero_share(magnitudes[i], weights))
            if rank := plan.rank(i, zeros):
                found[i] = predict(magnitudes[i], weights, rank / plan.elements)
        return found

    def _is_likely(self, p: Prediction, rank: int) -> bool:
        """Whether a rank lies inside its predicted atom by more than the sample's error."""
        return p.above + p.error < rank / self.plan.elements < p.above + p.equal - p.error

    def _taken(self, prediction: Prediction) -> Threshold:
        """A predicted threshold; its counts are estimates."""
        d = self.plan.elements
        return Threshold(to_bits(prediction.value), round(prediction.above * d), max(1, round(prediction.equal * d)))

    def _count(self, windows: Mapping[int, Window]) -> None:
        """One read of the base and these experts."""
        ledger, done = self._resume(windows)
        models = len(windows) + 1
        with phase(self.progress, "scan", self.plan.layout.total_bytes * models):
            self.progress.advance(sum(unit.nbytes for unit in done) * models)
            while ledger.missing:
                for partial in self.executor.reduce(self.step, Observe(windows), sorted(ledger.missing)):
                    if ledger.accept(partial):
                        self.progress.advance(sum(unit.nbytes for unit in partial.items) * models)
                    if self.keep is not None:
                        self.keep.keep_now_and_then(lambda: _as_kept(windows, ledger.total))
        self._finish(ledger.total, windows)

    def _finish(self, total: Observation, windows: Mapping[int, Window]) -> None:
        if total.nonfinite:
            raise nonfinite_error(self.plan, self.worker, total.nonfinite)
        for i, window in windows.items():
            histogram = total.histograms.get(i, Histogram(window))
            assert histogram.total == self.plan.elements, "a scan must count every element exactly once"
            self._counted[i] = histogram
            if self.store is not None:
                self.store.save(
                    self.store.key(self.plan.base, self.plan.experts[i % len(self.plan.experts)], self.plan.sizes),
                    histogram,
                )

    def _resume(self, windows: Mapping[int, Window]) -> tuple[Ledger[WorkItem, Observation], set[WorkItem]]:
        kept = self.keep.load() if self.keep is not None else None
        total = _counts_so_far(*kept, windows) if kept else Observation()
        return Ledger(self.plan.items(total.items), total), set(total.items)

    def _cut_ties(self, found: Mapping[int, Threshold], ranks: Mapping[int, int]) -> tuple[ModelCut, ...]:
        """Where more entries equal a threshold than may be kept: the first that is dropped, in canonical order."""
        tied = {i: ranks[i] - t.above for i, t in found.items() if i in ranks and t.above + t.equal > ranks[i]}
        cuts = {i: ModelCut(t) for i, t in found.items()}
        if tied:
            bits = [found.get(i, KEEP_ALL).bits for i in range(len(self.plan.experts))]
            totals: dict[str, np.ndarray] = {}
            units, operation = list(self.plan.items()), CountTies(tuple(bits))
            with phase(self.progress, "ties", sum(u.nbytes for u in units) * (1 + len(bits))):
                for unit, counts in self.executor.call(self.step, operation, units, lambda unit: unit.portion):
                    for tensor, count in counts.items():
                        totals[tensor] = totals.get(tensor, np.zeros(len(bits), np.int64)) + np.array(count)
                    self.progress.advance(unit.nbytes * (1 + len(bits)))
            for i, keep in tied.items():
                for spec in self.plan.counted:
                    here = int(totals[spec.source][i]) if spec.source in totals else 0
                    if keep < here:
                        before = self.worker.find_tie(spec.source, i, bits[i], keep)
                        cuts[i] = ModelCut(found[i], spec.source, before)
                        break
                    keep -= here
        return tuple(cuts.get(i, ModelCut(KEEP_ALL)) for i in range(len(self.plan.experts)))

    def per_tensor(self, tensors: Sequence[str]) -> dict[str, Cuts]:
        """Exact thresholds of some tensors, each over its own elements. Raises NumericError on NaN or Inf."""
        nonfinite: dict[tuple[int, str], int] = {}
        cuts: dict[str, Cuts] = {}
        sizes = self.plan.sizes
        asked = self.executor.call(self.step, SelectTensor(), tensors, lambda tensor: Portion(sizes[tensor]))
        for tensor, (found, bad) in asked:
            cuts[tensor] = found
            nonfinite |= bad
        if nonfinite:
            raise nonfinite_error(self.plan, self.worker, nonfinite)
        return cuts


def _as_kept(windows: Mapping[int, Window], total: Observation) -> tuple[Any, dict[str, np.ndarray]]:
    """Counts with the byte ranges they are of: unit sizes may differ when the run is resumed."""
    facts = {
        "windows": [[i, *w] for i, w in sorted(windows.items())],
        "items": sorted(total.items),
        "nonfinite": [[*key, n] for key, n in total.nonfinite.items()],
    }
    arrays = {f"{kind}{i}": getattr(h, kind) for i, h in total.histograms.items() for kind in ("coarse", "fine")}
    return facts, arrays


def _counts_so_far(facts: Any, arrays: Mapping[str, np.ndarray], windows: Mapping[int, Window]) -> Observation:
    """What an interrupted scan of the same windows left; nothing where it had others."""
    if facts["windows"] != [[i, *w] for i, w in sorted(windows.items())] or not facts.get("items"):
        return Observation()
    return Observation(
        items={as_item(each) for each in facts["items"]},
        nonfinite={(i, name): n for i, name, n in facts["nonfinite"]},
        histograms={i: Histogram(w, arrays[f"coarse{i}"], arrays[f"fine{i}"]) for i, w in windows.items()},
    )


def nonfinite_error(plan: MergePlan, worker: Worker, counts: Mapping[tuple[int, str], int]) -> NumericError:
    """NaN or Inf met while counting deltas. counts: (expert, tensor) -> entries.

    Reads the first of these tensors again: a delta does not tell whether base or expert is to blame.
    """
    tensors = sorted({tensor for _, tensor in counts})
    problems = []
    for tensor in tensors[:NAMED_TENSORS]:
        blamed = [f"{tensor}: {n:,} NaN or Inf in '{name}'" for name, n in worker.count_nonfinite(tensor).items() if n]
        problems += blamed or [
            f"{tensor}: expert '{plan.experts[expert].name}' minus the base overflows float32 in {count:,} of "
            f"{plan.sizes[tensor]:,} entries"
            for (expert, name), count in sorted(counts.items())
            if name == tensor
        ]
    return NumericError(
        listing(
            f"NaN or Inf in {len(tensors):,} of {len(plan.counted):,} tensors:",
            problems + tensors[NAMED_TENSORS:],
            NOTHING_PUBLISHED,
        )
    )
