"""From what the units counted to the report of a merge."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from ties_dist.engine.totals import Totals
from ties_dist.methods.needs import TrimRule
from ties_dist.output.report import ExpertReport, MergeReport
from ties_dist.planning.plan import MergePlan
from ties_dist.planning.prepare import Job
from ties_dist.storage.digests import output_digest
from ties_dist.thresholds import ModelCut
from ties_dist.values.counters import Counts
from ties_dist.values.items import MergeResult


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
    processor: str,
    executor: str,
    thresholds_from: str | None,
    mispredicted: bool,
    phases: Mapping[str, float],
    remarks: Sequence[str] = (),
) -> MergeReport:
    plan = job.plan
    d, conflicts = max(1, plan.elements), totals.overall.own.get("conflicts")
    return MergeReport(
        method=plan.method.name,
        semantics=job.recipe.options.semantics,
        experts=tuple(_expert(job, totals, model_cuts, i) for i in range(len(plan.experts))),
        conflict_fraction=conflicts / d if conflicts is not None else None,
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
        processor=processor,
        executor=executor,
        threads=plan.threads,
        unit_bytes=plan.unit_bytes,
        output_digest=output_digest((s.name, s.size, blocks[s.name]) for s in plan.layout.shards),
        fingerprint=plan.fingerprint,
        majority_sign=totals.majority if plan.needs.majority is not None else None,
        thresholds_from=thresholds_from,
        mispredicted=mispredicted,
        phases=phases,
        tensors={name: _shares(plan, name, counts) for name, counts in totals.by_tensor()}
        if plan.needs.trim is not None
        else {},
        notes=(*job.notes, *remarks),
        counters=totals.overall.own,
    )


def _expert(job: Job, totals: Totals, model_cuts: Sequence[ModelCut], i: int) -> ExpertReport:
    plan, settings = job.plan, job.recipe.experts[i].parameters
    name = plan.experts[i].name
    weight = settings["weight"].constant if "weight" in settings else None
    if plan.needs.trim is None:
        return ExpertReport(name=name, weight=weight)
    d = max(1, plan.elements)
    cut = model_cuts[i] if model_cuts else None
    ranked = cut is not None and cut.threshold.ranked
    return ExpertReport(
        name=name,
        weight=weight,
        density=settings["density"].constant,
        kept_fraction=totals.overall.kept[i] / d,
        moved_fraction=1 - totals.overall.zeros(i) / d if plan.needs.trim.is_of_moved(i) else None,
        tie_fraction=_ties(plan.needs.trim, totals, i) / d if cut is None or ranked else 0.0,
        threshold=cut.threshold.value if cut is not None and ranked else None,
        untrimmed=_untrimmed(plan.needs.trim, totals, i),
    )


def _ties(rule: TrimRule, totals: Totals, i: int) -> int:
    """Entries equal to their threshold; where a tensor is kept whole there is none, though its zeros were counted."""
    if rule.scope == "model":
        return totals.overall.equal[i]
    return sum(n.equal[i] for tensor, n in totals.by_tensor() if _rank(rule, totals.plan, tensor, n, i) is not None)


def _rank(rule: TrimRule, plan: MergePlan, tensor: str, counts: Counts, i: int) -> int | None:
    """Of an expert's threshold in one tensor."""
    entries = rule.ranked(i, plan.sizes[tensor], counts.zeros(i))
    return rule.rank(entries, plan.numbers[tensor].experts[i]["density"])


def _untrimmed(rule: TrimRule, totals: Totals, i: int) -> int:
    """Tensors that have a threshold of their own, which is 0: all that the expert moved there is kept."""
    return sum(
        n.passed[i] > n.kept[i] > 0 and _rank(rule, totals.plan, tensor, n, i) is not None
        for tensor, n in (totals.by_tensor() if rule.scope == "tensor" else ())
    )


def _shares(plan: MergePlan, tensor: str, counts: Counts) -> dict[str, float | list[float]]:
    """What of a tensor is kept of each expert, and in conflict where the method counts that."""
    numel = max(1, plan.sizes[tensor])
    shares: dict[str, float | list[float]] = {"kept_fraction": [float(kept) / numel for kept in counts.kept]}
    if "conflicts" in counts.own:
        shares["conflict_fraction"] = counts.own["conflicts"] / numel
    return shares
