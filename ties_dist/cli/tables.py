"""What a person sees on a terminal: tables and progress bars, by rich."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from ties_dist.checkpoints.catalogue import Checkpoint
from ties_dist.cli.console import console_of
from ties_dist.messages import readable
from ties_dist.methods.base import Method
from ties_dist.methods.known import METHODS
from ties_dist.output.report import MergeReport, trim_warning

if TYPE_CHECKING:
    from ties_dist.analysis.figures import Analysis, Group, MeanMagnitudes
    from ties_dist.engine.forecast import PlanReport
    from ties_dist.sweeping.sweeping import Swept


def merge_table(report: MergeReport, out: Path, *, tensors: bool = False) -> None:
    """Leads with density asked against share kept: ties make them differ."""
    console = console_of()
    if report.already_done:
        console.print(f"already done: {out} holds this merge (digest {report.output_digest})", soft_wrap=True)
        return
    if any(e.kept_fraction is not None for e in report.experts):
        moved = any(e.moved_fraction is not None for e in report.experts)
        table = Table("expert", "weight", "density asked", *(["differs"] if moved else []), "kept", "at threshold")
        table.add_column("threshold", no_wrap=True)
        for e in report.experts:
            table.add_row(
                e.name,
                "varies" if e.weight is None else f"{e.weight:g}",
                "varies"
                if e.density is None
                else f"{e.density:.1%}" + (" of what differs" if e.moved_fraction else ""),
                *([] if not moved else ["-" if e.moved_fraction is None else f"{e.moved_fraction:.2%}"]),
                f"{e.kept_fraction or 0:.2%}",
                f"{e.tie_fraction or 0:.2%}" if e.threshold is not None else "-",
                f"{e.threshold:.6g}" if e.threshold is not None else "per tensor" if e.density != 1 else "none",
            )
        console.print(table)
        for line in trim_warning(report):
            console.print(line, soft_wrap=True)
    if tensors and report.tensors:
        votes = report.conflict_fraction is not None
        detail = Table("tensor", "kept, per expert", *(["sign conflicts"] if votes else []))
        for name, shares in report.tensors.items():
            kept = shares["kept_fraction"]
            listed = ", ".join(f"{k:.1%}" for k in kept) if isinstance(kept, list) else f"{kept:.1%}"
            detail.add_row(escape(name), listed, *([f"{shares['conflict_fraction']:.1%}"] if votes else []))
        console.print(detail)
    rate = (report.bytes_read + report.bytes_written) / max(report.elapsed_seconds, 1e-9)
    lines = [
        f"{report.method}{f' ({report.semantics})' if report.method == 'ties' else ''}: {report.elements:,} elements, "
        f"{len(report.experts)} experts, {report.units:,} units ({report.resumed_units:,} resumed), "
        f"{report.kernel} kernel",
    ]
    if report.conflict_fraction is not None:
        lines.append(f"sign conflicts: {report.conflict_fraction:.2%} of the elements")
    lines += [
        f"read {readable(report.bytes_read)}, wrote {readable(report.bytes_written)} in {report.elapsed_seconds:.1f} s "
        f"({readable(rate)}/s); peak memory {readable(report.peak_rss_bytes)} of "
        f"{readable(report.projected_bytes)} projected",
        f"digest {report.output_digest}",
        f"-> {out}",
    ]
    for line in lines:
        console.print(line, soft_wrap=True)


def sweep_table(done: Sequence[Swept]) -> None:
    """One row an output; below it what all of them read together."""
    console = console_of()
    names = list(done[0].variant.values)
    table = Table(*names, "kept, per expert", "sign conflicts")
    table.add_column("digest", no_wrap=True)
    table.add_column("output", no_wrap=True)
    for each in done:
        kept = [e.kept_fraction for e in each.report.experts if e.kept_fraction is not None]
        conflicts = each.report.conflict_fraction
        table.add_row(
            *(f"{value:g}" for value in each.variant.values.values()),
            ", ".join(f"{share:.1%}" for share in kept) or "-",
            "-" if conflicts is None else f"{conflicts:.2%}",
            each.report.output_digest[:16],
            escape(str(each.path)),
        )
    console.print(table)
    fresh = [each.report for each in done if not each.report.already_done]
    read, wrote = sum(r.bytes_read for r in fresh), sum(r.bytes_written for r in fresh)
    console.print(
        f"{len(done)} outputs, {len(done) - len(fresh)} of them there already; read {readable(read)}, wrote "
        f"{readable(wrote)} in {max((r.elapsed_seconds for r in fresh), default=0.0):.1f} s",
        soft_wrap=True,
    )


def analysis_table(found: Analysis, *, detailed: bool = False) -> None:
    """Experts, then what is between them, and last what to act on. detailed: also by layer and by tensor."""
    console, moved = console_of(), [e.name for e in found.experts if e.of_moved]
    console.print(
        f"{found.elements:,} elements, {len(found.experts)} experts, base '{found.base}'; trimmed over the whole model "
        f"to density {found.density:g}" + (f" (of what differs: {', '.join(moved)})" if moved else ""),
        soft_wrap=True,
    )
    table = Table("expert", "norm", "of the base's", "zeros", "threshold", "kept", "at threshold", "mass kept")
    for e in found.experts:
        trim = next(t for t in e.trims if t.density == found.density)
        table.add_row(
            escape(e.name),
            f"{e.norm:.4g}",
            f"{e.relative_norm:.2%}",
            f"{e.zero_fraction:.1%}",
            f"{trim.threshold:.6g}{'' if trim.exact else ' (near)'}",
            f"{trim.kept_fraction:.1%}",
            f"{trim.tie_fraction:.1%}",
            f"{trim.mass_fraction:.1%}",
        )
    console.print(table)
    if len(found.experts) > 1:
        conflicts = Table("sign conflicts", *(f"{n} experts" for n in range(2, len(found.experts) + 1)))
        for row in found.conflicts:
            conflicts.add_row(f"density {row.density:g}", *(f"{share:.2%}" for share in row.fractions))
        console.print(conflicts)
        cosines = Table("cosine", *(escape(e.name) for e in found.experts))
        for e, values in zip(found.experts, found.cosines, strict=True):
            cosines.add_row(escape(e.name), *("-" if c is None else f"{round(c, 3) + 0.0:.3f}" for c in values))
        console.print(cosines)
        console.print(_means("influential in", found.interference.influence))
        console.print(_means("sign agreement", found.interference.agreement))
    console.print(_groups("kind of weight", found.kinds))
    if detailed:
        console.print(_groups("layer", found.layers))
        console.print(_groups("tensor", found.tensors))
    run = found.run
    cost = (
        "taken from the statistics store, without a read"
        if run.cached
        else f"read {readable(run.bytes_read)}, {run.bytes_read / max(1, run.input_bytes):.2f} times the inputs"
    ) + (f" after {run.resumed_fraction:.0%} was counted by an interrupted run" if run.resumed_fraction else "")
    console.print(
        f"{cost}, in {run.elapsed_seconds:.1f} s; peak memory {readable(run.peak_rss_bytes)} of "
        f"{readable(run.projected_bytes)} projected",
        soft_wrap=True,
    )
    if any(t.density == found.density and not t.exact for e in found.experts for t in e.trims):
        console.print(
            "(near): a sample's threshold, a little beside the exact one; what is kept is counted exactly at it",
            soft_wrap=True,
        )
    for each in found.warnings:
        console.print(f"warning: {each.text}", soft_wrap=True)


def _means(title: str, rows: Sequence[MeanMagnitudes]) -> Table:
    table = Table(title, "parameters", "plain mean", "trimmed mean", "elected mean")
    for row in rows:
        values = ("-" if v is None else f"{v:.4g}" for v in (row.plain, row.trimmed, row.elected))
        table.add_row(row.label, f"{row.count:,}", *values)
    return table


def _groups(title: str, groups: Sequence[Group]) -> Table:
    table = Table(title, "elements", "kept, per expert", "share of the budget", "sign conflicts")
    for group in groups:
        table.add_row(
            escape(group.name),
            f"{group.elements:,}",
            ", ".join(f"{e.kept_fraction:.1%}" for e in group.experts),
            ", ".join(f"{e.budget_fraction:.1%}" for e in group.experts),
            f"{group.conflict_fraction:.2%}",
        )
    return table


def plan_table(report: PlanReport) -> None:
    console = console_of()
    table = Table(show_header=False)
    best, worst = report.passes
    reads = [readable(b) for b in report.read_bytes]
    rows = {
        "method": f"{report.method}{f' ({report.semantics})' if report.method == 'ties' else ''}",
        "experts": ", ".join(report.experts),
        "tensors": f"{report.tensors:,}, of which {report.merged_tensors:,} are merged",
        "elements (d)": f"{report.elements:,}" + _conditions(report),
        "output": f"{report.shards} shard{'s' * (report.shards != 1)}, {readable(report.write_bytes)}",
        "beside it": f"{len(report.companions)} files of the base, {readable(sum(report.companions.values()))}",
        "units": f"{report.units:,} of {readable(report.unit_bytes)}, {report.threads} threads",
        "reads of the inputs": f"{best} ({reads[0]})"
        if best == worst
        else f"{best} to {worst} ({reads[0]} to {reads[1]})",
        "memory": f"{readable(report.projected_bytes)} projected per worker (budget {readable(report.memory_budget)})",
        "disk": f"{readable(report.disk_needed_bytes)} needed"
        + (f", {readable(report.disk_free_bytes)} free" if report.disk_free_bytes is not None else ""),
        **({"downloads": f"{readable(report.download_bytes)} into the hub's cache"} if report.download_bytes else {}),
        **({"OUT holds": report.out_holds} if report.out_holds is not None else {}),
        "fingerprint": report.fingerprint or "known once that is proven",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
    if report.sample is not None:
        predicted = Table("expert", "threshold (predicted)", "kept (predicted)", "zero deltas")
        for name, threshold, kept, zeros in zip(
            report.experts,
            report.sample.thresholds or [None] * len(report.experts),
            report.sample.kept_fractions or [None] * len(report.experts),
            report.sample.zero_fractions or [0.0] * len(report.experts),
            strict=True,
        ):
            predicted.add_row(
                name,
                "-" if threshold is None else f"{threshold:.6g}",
                "-" if kept is None else f"{kept:.1%}",
                f"{zeros:.1%}",
            )
        console.print(predicted)
        console.print(f"about {report.sample.seconds:.0f} s, at the rate the sample was read")


def _conditions(report: PlanReport) -> str:
    if not report.unproven:
        return ""
    return f" if {' and '.join(report.unproven)}, which the merge proves (reads {readable(report.proof_bytes)})"


def inspect_document(found: Checkpoint) -> dict[str, object]:
    dtypes = Counter[str]()
    for entry in found.tensors.values():
        dtypes[entry.dtype] += entry.numel
    return {
        "name": found.name,
        "shards": {file: found.files[file].size for file in found.shards},
        "tensors": {n: {"dtype": e.dtype, "shape": list(e.shape), "file": e.file} for n, e in found.tensors.items()},
        "elements": dict(dtypes),
        "bytes": found.nbytes,
        "notes": list(found.notes),
    }


def inspect_table(found: Checkpoint) -> None:
    console = console_of()
    dtypes = Counter[str]()
    for entry in found.tensors.values():
        dtypes[entry.dtype] += entry.numel
    table = Table("tensor", "dtype", "shape", "shard")
    for entry in found.tensors.values():
        table.add_row(entry.name, entry.dtype, " x ".join(map(str, entry.shape)) or "scalar", entry.file)
    console.print(table)
    kinds = ", ".join(f"{count:,} {dtype}" for dtype, count in dtypes.most_common())
    console.print(
        f"{len(found.tensors):,} tensors in {len(found.shards)} shards, {readable(found.nbytes)}: {kinds} elements"
    )
    for note in found.notes:
        console.print(f"note: {note}", soft_wrap=True)


def methods_document() -> list[dict[str, object]]:
    return [
        {
            "name": name,
            "summary": method.summary,
            "statistics": method.statistics,
            "reads": _reads(method),
            "parameters": [
                {
                    "name": p.name,
                    "kind": p.kind,
                    "default": p.default,
                    "required": p.required,
                    "per_model": p.per_model,
                    "note": p.note,
                }
                for p in method.parameters
            ],
            "options": sorted(method.options),
        }
        for name, method in METHODS.items()
    ]


def methods_table() -> None:
    console = console_of()
    for name, method in METHODS.items():
        console.print(f"{name}: {method.summary}", soft_wrap=True)
        table = Table("parameter", "default", "per model", "")
        for p in method.parameters:
            default = "required" if p.required else str(p.default).lower()
            table.add_row(p.name, default, "yes" if p.per_model else "", p.note)
        console.print(table)
        needs = f"; needs `ties-dist collect {method.statistics}`" if method.statistics else ""
        own = f"; options of its own (docs/recipe.md): {', '.join(sorted(method.options))}" if method.options else ""
        console.print(f"reads the inputs {_reads(method)}{needs}{own}\n", soft_wrap=True)


def _reads(method: type[Method]) -> str:
    if "trim_scope" in method.options:
        return "once, or twice where thresholds cannot be predicted"
    if "rescale_by" in method.options:
        return "once, or twice with `rescale_by: l1`"
    return "twice" if method().needs.sums is not None else "once"
