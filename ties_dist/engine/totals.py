"""Adding up what the units counted: the majority sign, the proof of the thresholds, non-finite values, the report."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ties_dist.output.report import ExpertReport, MergeReport
from ties_dist.planning.plan import MergePlan
from ties_dist.planning.prepare import Job
from ties_dist.storage.digests import output_digest
from ties_dist.thresholds import Cuts, ModelCut, proves
from ties_dist.values.items import MergeResult


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Counts per counted tensor, in the order of `MergePlan.counter_names`: (counters,) int64 each."""

    names: Mapping[str, int]
    tensors: Mapping[str, np.ndarray]

    @classmethod
    def of(cls, plan: MergePlan, results: Iterable[MergeResult]) -> Totals:
        """results: disjoint ranges that cover the output."""
        tensors: dict[str, np.ndarray] = {
            t.source: np.zeros(len(plan.counter_names), dtype=np.int64) for t in plan.counted
        }
        for result in results:
            for tensor, counts in result.counts.items():
                tensors[tensor] += np.array(counts, dtype=np.int64)
        return cls(names={name: i for i, name in enumerate(plan.counter_names)}, tensors=tensors)

    def get(self, name: str) -> int:
        """One counter over all d elements."""
        return int(self._overall[self.names[name]])

    @cached_property
    def _overall(self) -> np.ndarray:
        return sum(self.tensors.values(), np.zeros(len(self.names), dtype=np.int64))

    def per_expert(self, name: str, experts: int) -> list[int]:
        return [self.get(f"{name}[{i}]") for i in range(experts)]

    @property
    def majority(self) -> int:
        """Sign of the integer sum of elected signs over d; a zero counts as negative (semantics.md)."""
        return 1 if "sign_sum" in self.names and self.get("sign_sum") > 0 else -1

    def unproven(self, plan: MergePlan, model: Sequence[ModelCut], cuts: Mapping[str, Cuts]) -> list[str]:
        """What the counts above and at the thresholds contradict."""
        rule = plan.method.trim
        if rule is None:
            return []
        cut = rule.tie_policy == "exact_k"
        if rule.scope == "model":
            return list(self.wrong_thresholds(plan, model).values())
        problems = []
        for tensor, counts in self.tensors.items():
            for i, numbers in enumerate(plan.numbers[tensor].experts):
                rank = rule.rank(plan.sizes[tensor], numbers["density"])
                over, at, kept = (int(counts[self.names[f"{name}[{i}]"]]) for name in ("above", "equal", "kept"))
                if rank and not (proves(rank, over, at) and (kept == rank or not cut)):
                    problems.append(
                        f"{tensor}: {over:,} entries of expert {i} above the threshold, {at:,} at it, {kept:,} kept"
                    )
        return problems

    def wrong_thresholds(self, plan: MergePlan, model: Sequence[ModelCut]) -> dict[int, str]:
        """Experts whose whole-model threshold the counts contradict, and how."""
        rule, wrong = plan.method.trim, {}
        assert rule is not None and rule.scope == "model"
        counted = [self.per_expert(name, len(model)) for name in ("above", "equal", "kept")]
        for i, (above, equal, kept) in enumerate(zip(*counted, strict=True)):
            rank = rule.rank(plan.elements, plan.density(i)) if plan.elements else None
            if rank and not (proves(rank, above, equal) and (kept == rank or rule.tie_policy != "exact_k")):
                wrong[i] = (
                    f"expert '{plan.experts[i].name}': {above:,} entries above {model[i].threshold.value:g}, "
                    f"{equal:,} equal to it and {kept:,} kept do not make it the {rank:,}-th largest"
                )
        return wrong

    def nonfinite(self, plan: MergePlan) -> list[str]:
        """NaN and Inf in inputs and output, per tensor."""
        operands = [m.name for m in plan.operands]
        problems = []
        for tensor, counts in self.tensors.items():
            entries = [int(c) for c in counts[: len(operands)]]
            problems += [
                f"{tensor}: {n:,} NaN or Inf in '{name}'" for n, name in zip(entries, operands, strict=True) if n
            ]
            out = int(counts[self.names["nonfinite_out"]])
            if out and not any(entries):
                dtype = next(t.dtype for t in plan.counted if t.source == tensor)
                remedy = "smaller weights or" if dtype == "F32" else "`out_dtype: float32` or"
                problems.append(
                    f"{tensor}: the result overflows {dtype} in {out:,} of {plan.sizes[tensor]:,} entries: use "
                    f"{remedy} a smaller lambda"
                )
        return problems


def describe(
    job: Job,
    totals: Totals,
    model_cuts: Sequence[ModelCut],
    results: Collection[MergeResult],
    blocks: Mapping[str, Sequence[str]],
    *,
    bytes_read: int,
    elapsed_seconds: float,
    peak_rss_bytes: int,
    resumed_units: int,
    redone_units: int,
    kernel: str,
    executor: str,
    thresholds_from: str | None,
    mispredicted: bool,
    phases: Mapping[str, float],
    remarks: Sequence[str] = (),
) -> MergeReport:
    plan = job.plan
    trims, votes = plan.method.trim is not None, "conflicts" in totals.names
    d = max(1, plan.elements)
    return MergeReport(
        method=plan.method.name,
        semantics=job.recipe.options.semantics,
        experts=tuple(_expert(job, totals, model_cuts, i) for i in range(len(plan.experts))),
        conflict_fraction=totals.get("conflicts") / d if votes else None,
        elements=plan.elements,
        bytes_read=bytes_read,
        bytes_written=plan.layout.total_bytes,
        elapsed_seconds=elapsed_seconds,
        peak_rss_bytes=peak_rss_bytes,
        projected_bytes=plan.projected_bytes,
        units=len(results),
        resumed_units=resumed_units,
        redone_units=redone_units,
        kernel=kernel,
        executor=executor,
        threads=plan.threads,
        unit_bytes=plan.unit_bytes,
        output_digest=output_digest((s.name, s.size, blocks[s.name]) for s in plan.layout.shards),
        fingerprint=plan.fingerprint,
        majority_sign=totals.majority if plan.method.asks_majority else None,
        thresholds_from=thresholds_from,
        mispredicted=mispredicted,
        phases=phases,
        tensors={name: _tensor(plan, totals, name) for name in totals.tensors} if trims else {},
        notes=(*job.notes, *remarks),
    )


def _expert(job: Job, totals: Totals, model_cuts: Sequence[ModelCut], i: int) -> ExpertReport:
    plan, settings = job.plan, job.recipe.experts[i].parameters
    name = plan.experts[i].name
    weight = settings["weight"].constant if "weight" in settings else None
    if plan.method.trim is None:
        return ExpertReport(name=name, weight=weight)
    d = max(1, plan.elements)
    cut = model_cuts[i] if model_cuts else None
    ranked = cut is not None and cut.threshold.ranked
    return ExpertReport(
        name=name,
        weight=weight,
        density=settings["density"].constant,
        kept_fraction=totals.get(f"kept[{i}]") / d,
        kept_nonzero_fraction=totals.get(f"kept_nonzero[{i}]") / d,
        tie_fraction=_ties(plan, totals, i) / d if cut is None or ranked else 0.0,
        threshold=cut.threshold.value if cut is not None and ranked else None,
    )


def _ties(plan: MergePlan, totals: Totals, i: int) -> int:
    """Entries equal to their threshold; where a tensor is kept whole there is none, though its zeros were counted."""
    rule, equal = plan.method.trim, totals.names[f"equal[{i}]"]
    assert rule is not None
    if rule.scope == "model":
        return totals.get(f"equal[{i}]")
    return sum(
        int(counts[equal])
        for tensor, counts in totals.tensors.items()
        if rule.rank(plan.sizes[tensor], plan.numbers[tensor].experts[i]["density"]) is not None
    )


def _tensor(plan: MergePlan, totals: Totals, name: str) -> dict[str, float | list[float]]:
    counts, numel = totals.tensors[name], max(1, plan.sizes[name])
    kept = [float(counts[totals.names[f"kept[{i}]"]]) / numel for i in range(len(plan.experts))]
    return {"kept_fraction": kept, "conflict_fraction": float(counts[totals.names["conflicts"]]) / numel}
