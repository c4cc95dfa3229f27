"""The statistics pass: exact thresholds for the whole model, or for one tensor after another.

Whole model: one read counts every expert's coarse histogram and, bit by bit, the few buckets in which a sample expects
the threshold; only where that guess fails does a second read count the right bucket. Cached statistics skip the read.
"""

from __future__ import annotations

import io
import json
import logging
import random
import time
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ties_dist.errors import NumericError, listing
from ties_dist.executors.base import Executor, Ledger
from ties_dist.plan import MergePlan, Unit
from ties_dist.progress import Progress, phase
from ties_dist.statistics import StatisticsStore
from ties_dist.storage.local import write_durably
from ties_dist.threshold import (
    KEEP_ALL,
    KEEP_NONE,
    Cuts,
    Histogram,
    ModelCut,
    Threshold,
    Window,
    guess_window,
    resolve,
)
from ties_dist.work import Observation, Worker

logger = logging.getLogger(__name__)

SAMPLE_SLICES = 1024
SAMPLE_ELEMENTS = 2048
"""1,000 pages of 2,048 elements predicted the exact bf16 threshold in 60 of 60 trials, whatever the model's size."""
CHECKPOINT_SECONDS = 20.0
NAMED_TENSORS = 20
"""With NaN or Inf: read again to say in which model."""


@dataclass
class Scan:
    """Finds the thresholds of one plan. keep: where a long scan leaves its counts, so that a kill loses seconds."""

    plan: MergePlan
    worker: Worker
    executor: Executor
    progress: Progress
    store: StatisticsStore | None
    keep: Path | None = None
    source: str = "scan"
    _counted: dict[int, Histogram] = field(default_factory=dict)

    def whole_model(self) -> tuple[ModelCut, ...]:
        """The exact threshold of every expert over all d elements. Raises NumericError on NaN or Inf."""
        rule = self.plan.method.trim
        assert rule is not None and rule.scope == "model"
        densities = [self.plan.numbers[t.source].experts for t in self.plan.counted[:1]]
        ranks = {
            i: rule.rank(self.plan.elements, numbers["density"])
            for experts in densities
            for i, numbers in enumerate(experts)
        }
        found = {i: KEEP_ALL if rank is None else KEEP_NONE for i, rank in ranks.items() if not rank}
        wanted = {i: rank for i, rank in ranks.items() if rank}
        windows = self._from_cache(wanted, found)
        if windows:
            self._count(windows)
        while missing := {i: rank for i, rank in wanted.items() if i not in found}:
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
            return self._cut_ties(found, wanted)
        return tuple(ModelCut(found.get(i, KEEP_ALL)) for i in range(len(self.plan.experts)))

    def _from_cache(self, wanted: Mapping[int, int], found: dict[int, Threshold]) -> dict[int, Window]:
        """Thresholds known already, into `found`; windows for a read that has to settle the others."""
        windows: dict[int, Window] = {}
        for i, rank in wanted.items():
            known = self.store.load(self.store.key(self.plan, i), self.plan.elements) if self.store else None
            threshold = known.threshold(rank) if known else None
            if threshold is not None:
                found[i] = threshold
                self.source = "cache"
            elif known is not None:
                windows[i] = known.window(rank)
        unknown = [i for i in wanted if i not in found and i not in windows]
        if unknown:
            sampled = self.worker.sample(sample_slices(self.plan))
            windows |= {i: guess_window(sampled[i], wanted[i] / self.plan.elements) for i in unknown}
        if windows:
            self.source = "scan"
        return windows

    def _count(self, windows: Mapping[int, Window]) -> None:
        """One read of the base and these experts."""
        ledger, done = self._resume(windows)
        models = len(windows) + 1
        saved = time.monotonic()
        with phase(self.progress, "scan", self.plan.layout.total_bytes * models):
            self.progress.advance(sum(unit.nbytes for unit in done) * models)

            def fold(unit: Unit, into: Observation) -> None:
                self.worker.observe(unit, windows, into)

            while ledger.missing:
                for partial in self.executor.reduce(fold, sorted(ledger.missing)):
                    if ledger.accept(partial):
                        self.progress.advance(sum(unit.nbytes for unit in partial.units) * models)
                    if self.keep is not None and time.monotonic() - saved > CHECKPOINT_SECONDS:
                        self._save(windows, ledger)
                        saved = time.monotonic()
        self._finish(ledger.total, windows)

    def _finish(self, total: Observation, windows: Mapping[int, Window]) -> None:
        if total.nonfinite:
            raise nonfinite_error(self.plan, self.worker, total.nonfinite)
        for i, window in windows.items():
            histogram = total.histograms.get(i, Histogram(window))
            assert histogram.total == self.plan.elements, "a scan must count every element exactly once"
            self._counted[i] = histogram
            if self.store is not None:
                self.store.save(self.store.key(self.plan, i), histogram)

    def _save(self, windows: Mapping[int, Window], ledger: Ledger) -> None:
        """Counts so far with the byte ranges they are of: unit sizes may differ when the run is resumed."""
        assert self.keep is not None
        arrays = {
            f"{kind}{i}": getattr(h, kind) for i, h in ledger.total.histograms.items() for kind in ("coarse", "fine")
        }
        facts = {
            "windows": [[i, *w] for i, w in sorted(windows.items())],
            "units": sorted(ledger.total.units),
            "nonfinite": [[*key, n] for key, n in ledger.total.nonfinite.items()],
        }
        buffer = io.BytesIO()
        np.savez(buffer, facts=np.frombuffer(json.dumps(facts).encode(), dtype=np.uint8), **arrays)
        write_durably(self.keep, buffer.getvalue())

    def _resume(self, windows: Mapping[int, Window]) -> tuple[Ledger, set[Unit]]:
        total = Observation()
        if self.keep is not None and self.keep.exists():
            try:
                total = _counts_so_far(self.keep, windows)
            except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
                logger.warning("the counts of the interrupted scan are damaged (%s): counting again", error)
        done: dict[str, list[tuple[int, int]]] = {}
        for unit in total.units:
            done.setdefault(unit.shard, []).append((unit.start, unit.stop))
        ledger = Ledger(self.plan.units(done))
        ledger.total = total
        return ledger, set(total.units)

    def _cut_ties(self, found: Mapping[int, Threshold], ranks: Mapping[int, int]) -> tuple[ModelCut, ...]:
        """Where more entries equal a threshold than may be kept: the first that is dropped, in canonical order."""
        tied = {i: ranks[i] - t.above for i, t in found.items() if i in ranks and t.above + t.equal > ranks[i]}
        cuts = {i: ModelCut(t) for i, t in found.items()}
        if tied:
            bits = [found.get(i, KEEP_ALL).bits for i in range(len(self.plan.experts))]
            totals: dict[str, np.ndarray] = {}
            units = list(self.plan.units())
            with phase(self.progress, "ties", sum(u.nbytes for u in units) * (1 + len(bits))):
                for unit, counts in self.executor.call(lambda u: self.worker.count_ties(u, bits), units):
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

        def select(tensor: str) -> tuple[Cuts, dict[tuple[int, str], int]]:
            return self.worker.select(tensor, self.plan.sizes[tensor])

        for tensor, (found, bad) in self.executor.call(select, tensors):
            cuts[tensor] = found
            nonfinite |= bad
        if nonfinite:
            raise nonfinite_error(self.plan, self.worker, nonfinite)
        return cuts


def _counts_so_far(path: Path, windows: Mapping[int, Window]) -> Observation:
    """What an interrupted scan of the same windows left; nothing where it had others."""
    with np.load(path) as kept:
        facts = json.loads(kept["facts"].tobytes())
        if facts["windows"] != [[i, *w] for i, w in sorted(windows.items())] or not facts["units"]:
            return Observation()
        return Observation(
            units={Unit(*u) for u in facts["units"]},
            nonfinite={(i, name): n for i, name, n in facts["nonfinite"]},
            histograms={i: Histogram(w, kept[f"coarse{i}"], kept[f"fine{i}"]) for i, w in windows.items()},
        )


def sample_slices(plan: MergePlan) -> list[tuple[str, int, int]]:
    """Slices (tensor, start, stop) drawn evenly over the counted elements, in file order; the same in every run."""
    counted = [t for t in plan.counted if t.numel]
    if not counted:
        return []
    ends = np.cumsum([t.numel for t in counted])
    draw = random.Random(0)
    count = min(SAMPLE_SLICES, -(-plan.elements // SAMPLE_ELEMENTS))
    slices = set()
    for position in (draw.randrange(plan.elements) for _ in range(count)):
        which = int(np.searchsorted(ends, position, side="right"))
        tensor = counted[which]
        inside = position - (int(ends[which]) - tensor.numel)
        start = inside // SAMPLE_ELEMENTS * SAMPLE_ELEMENTS
        slices.add((tensor.source, start, min(tensor.numel, start + SAMPLE_ELEMENTS)))
    return sorted(slices)


def nonfinite_error(plan: MergePlan, worker: Worker, counts: Mapping[tuple[int, str], int]) -> NumericError:
    """NaN or Inf met while counting deltas. counts: (expert, tensor) -> entries.

    Reads the first of these tensors again: a delta does not tell whether base or expert is to blame.
    """
    tensors = sorted({tensor for _, tensor in counts})
    problems = []
    for tensor in tensors[:NAMED_TENSORS]:
        blamed = [f"{tensor}: {n:,} NaN or Inf in '{name}'" for name, n in worker.count_nonfinite(tensor).items() if n]
        problems += blamed or [
            f"{tensor}: expert '{plan.experts[expert].name}' minus the base overflows float32 in {count:,} entries"
            for (expert, name), count in sorted(counts.items())
            if name == tensor
        ]
    return NumericError(
        listing(
            f"NaN or Inf in {len(tensors):,} of {len(plan.counted):,} tensors:",
            problems + tensors[NAMED_TENSORS:],
            "Nothing was published. Repair the checkpoint, or list these names under `exclude`.",
        )
    )
