"""Adding up what the units counted: the majority sign, the proof of the thresholds, non-finite values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ties_dist.methods.needs import TrimRule
from ties_dist.planning.plan import MergePlan
from ties_dist.thresholds import ModelCut, proves
from ties_dist.values.counters import Counts
from ties_dist.values.items import MergeResult


@dataclass(frozen=True, kw_only=True)
class Totals:
    """What was counted over a whole merge. rows: per counted tensor, (counters,) int64 each."""

    plan: MergePlan
    rows: Mapping[str, np.ndarray]

    @classmethod
    def of(cls, plan: MergePlan, results: Iterable[MergeResult]) -> Totals:
        """results: disjoint ranges that cover the output."""
        rows = {t.source: np.zeros(len(plan.counters.names), dtype=np.int64) for t in plan.counted}
        for result in results:
            for tensor, row in result.counts.items():
                rows[tensor] += np.array(row, dtype=np.int64)
        return cls(plan=plan, rows=rows)

    def by_tensor(self) -> Iterator[tuple[str, Counts]]:
        for tensor, row in self.rows.items():
            yield tensor, self.plan.counters.read(row)

    @cached_property
    def overall(self) -> Counts:
        """Over all d elements."""
        none = np.zeros(len(self.plan.counters.names), dtype=np.int64)
        return self.plan.counters.read(sum(self.rows.values(), none))

    @property
    def signs(self) -> int:
        """The sum of elected signs, where the method asks for their majority."""
        majority = self.plan.needs.majority
        return self.overall.own[majority.signs] if majority is not None else 0

    @property
    def majority(self) -> int:
        """Sign of the sum of elected signs over d; a zero counts as negative, as in the published code."""
        return 1 if self.signs > 0 else -1

    def unproven(self, model: Sequence[ModelCut]) -> list[str]:
        """What the counts above and at the thresholds contradict. model: whole-model thresholds, where there are."""
        rule = self.plan.needs.trim
        if rule is None:
            return []
        if rule.scope == "model":
            return list(self.wrong_thresholds(model).values())
        problems = []
        for tensor, counts in self.by_tensor():
            for i, numbers in enumerate(self.plan.numbers[tensor].experts):
                entries = rule.ranked(i, self.plan.sizes[tensor], counts.zeros(i))
                if not _stands(rule, rule.rank(entries, numbers["density"]), entries, counts, i):
                    problems.append(
                        f"{tensor}: {counts.above[i]:,} entries of expert {i} above the threshold, {counts.equal[i]:,} "
                        f"at it, {counts.passed[i]:,} kept"
                    )
        return problems

    def wrong_thresholds(self, model: Sequence[ModelCut]) -> dict[int, str]:
        """Experts whose whole-model threshold the counts contradict, and how."""
        plan, counts, wrong = self.plan, self.overall, {}
        rule = plan.needs.trim
        assert rule is not None and rule.scope == "model"
        for i, cut in enumerate(model):
            entries, rank = rule.ranked(i, plan.elements, counts.zeros(i)), plan.rank(i, counts.zeros(i))
            if not _stands(rule, rank, entries, counts, i):
                right = f"the {rank:,}-th largest of {entries:,}" if rank else f"what {entries:,} that moved ask for"
                wrong[i] = (
                    f"expert '{plan.experts[i].name}': {counts.above[i]:,} entries above {cut.threshold.value:g}, "
                    f"{counts.equal[i]:,} equal to it and {counts.passed[i]:,} kept do not make it {right}"
                )
        return wrong

    def nonfinite(self) -> list[str]:
        """NaN and Inf in inputs and output, per tensor."""
        operands = [m.name for m in self.plan.operands]
        problems = []
        for tensor, counts in self.by_tensor():
            problems += [
                f"{tensor}: {n:,} NaN or Inf in '{name}'"
                for n, name in zip(counts.nonfinite, operands, strict=True)
                if n
            ]
            if counts.nonfinite_out and not any(counts.nonfinite):
                problems.append(self._overflow(tensor, counts.nonfinite_out))
        return problems

    def _overflow(self, tensor: str, entries: int) -> str:
        dtype = next(t.dtype for t in self.plan.counted if t.source == tensor)
        remedy = "smaller weights or" if dtype == "F32" else "`out_dtype: float32` or"
        return (
            f"{tensor}: the result overflows {dtype} in {entries:,} of {self.plan.sizes[tensor]:,} entries: use "
            f"{remedy} a smaller lambda"
        )


def _stands(rule: TrimRule, rank: int | None, entries: int, counts: Counts, expert: int) -> bool:
    """Whether counts prove an expert's threshold of a rank among some entries.

    Without a rank there is none to prove, unless that there is none followed from a count itself.
    """
    if not rank:
        return not rule.is_of_moved(expert) or counts.kept[expert] == (entries if rank is None else 0)
    exact = rule.tie_policy != "exact_k" or counts.passed[expert] == rank
    return exact and proves(rank, counts.above[expert], counts.equal[expert])
