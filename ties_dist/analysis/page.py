"""`report.html`: an analysis as one page that needs nothing else, for a phone and for a desk.

First what was found in plain words and what to act on, then charts, each with what it shows, then tables. No script and
nothing from a network: it can be mailed, archived and opened in twenty years.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from importlib.resources import files

from ties_dist.analysis import charts
from ties_dist.analysis.charts import SERIES
from ties_dist.analysis.figures import Analysis, Group, MeanMagnitudes, share_of, span
from ties_dist.errors import printable

MOST_TENSORS = 1000
SMALL_KIND = 0.01
"""Share of the entries below which a kind of weight is not worth a sentence."""
ARMS = (("plain", "plain mean", 1), ("trimmed", "trimmed, no election", 2), ("elected", "elected (TIES)", 0))
"""Field, name and colour."""


def page(found: Analysis) -> str:
    """The whole document."""
    style = files("ties_dist.analysis").joinpath("page.css").read_text(encoding="utf-8")
    count = len(found.experts)
    title = f"{count} expert{'s' * (count != 1)} of {found.base}"
    body = "\n".join(
        [
            f"<header><h1>{escape(title)}</h1>",
            f"<p class=lead>{found.elements:,} parameters · figures at density {found.density:g}{of_moved(found)} · "
            f"method {escape(found.method)}</p></header>",
            *_warnings(found),
            "<section><h2>In short</h2><ul class=short>",
            *(f"<li>{line}</li>" for line in summary(found)),
            "</ul></section>",
            *_charts(found),
            *_tables(found),
            *_footer(found),
        ]
    )
    return (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width, initial-scale=1"><meta name=color-scheme content="light '
        'dark">'
        f"<title>{escape(printable(title))}</title><link rel=icon href=data:,><style>\n{style}</style></head>\n"
        f"<body><main>\n{printable(body)}\n</main></body></html>\n"
    )


def of_moved(found: Analysis) -> str:
    """Whose density is a share of what differs from the base."""
    names = [e.name for e in found.experts if e.of_moved]
    if not names:
        return ""
    return " of what differs from the base" + (
        f" (of {escape(', '.join(names))})" if len(names) < len(found.experts) else ""
    )


def summary(found: Analysis) -> Iterator[str]:
    """Sentences, as HTML."""
    at = found.densities.index(found.density)
    trims = [e.trims[at] for e in found.experts]
    yield (
        f"<b>Redundancy.</b> Trimmed to density {found.density:g}, each delta keeps "
        f"{span([t.kept_fraction for t in trims])} of its entries and with them "
        f"{span([t.mass_fraction for t in trims])} of its mass. {span([e.zero_fraction for e in found.experts])} of "
        "the entries are exactly zero."
    )
    if untrimmed := [e.name for e in found.experts if e.is_untrimmed(found.density)]:
        names = ", ".join(f"<code>{escape(name)}</code>" for name in untrimmed)
        yield (
            f"<b>No trim.</b> The threshold of {names} is 0: fewer of its entries differ from the base than density "
            f"{found.density:g} asks for, and all of them are kept."
        )
    large = [g for g in found.kinds if g.elements >= SMALL_KIND * found.elements]
    kinds = sorted(large, key=lambda g: _mean([e.kept_fraction for e in g.experts]))
    if len(kinds) > 1:
        yield (
            f"<b>Budget.</b> One threshold for the whole model keeps most of <code>{escape(kinds[-1].name)}</code> "
            f"({share_of(_mean([e.kept_fraction for e in kinds[-1].experts]))}) and least of "
            f"<code>{escape(kinds[0].name)}</code> ({share_of(_mean([e.kept_fraction for e in kinds[0].experts]))}); "
            "a trim "
            f"tensor by tensor keeps {share_of(found.density)} of each."
        )
    if len(found.experts) < 2:
        return
    influence = [row.count / found.elements for row in found.interference.influence]
    yield (
        f"<b>Overlap.</b> {share_of(influence[0])} of the parameters matter to no expert, {share_of(influence[1])} to "
        "exactly "
        f"one, {share_of(sum(influence[2:]))} to several."
    )
    pairs = [c for i, row in enumerate(found.cosines) for c in row[:i] if c is not None]
    ends = dict.fromkeys(charts.cosine_text(c) for c in (min(pairs, default=0.0), max(pairs, default=0.0)))
    close = f" Cosines between the deltas are {' to '.join(ends)}." if pairs else ""
    yield (
        f"<b>Conflicts.</b> At {share_of(found.conflicts[at].fractions[-1])} of the parameters the trimmed experts "
        "pull in "
        f"both directions; untrimmed at {share_of(found.conflicts[0].fractions[-1])}.{close}"
    )
    one = found.interference.influence[1]
    if one.count and one.plain is not None and one.trimmed:
        yield (
            f"<b>Interference.</b> A plain mean shrinks what matters to exactly one expert to "
            f"{share_of(one.plain / one.trimmed)} of the size it keeps when only the deltas that survive are averaged."
        )


def _warnings(found: Analysis) -> Iterator[str]:
    if not found.warnings:
        yield "<p class=fine>Nothing asks for an action.</p>"
        return
    yield f"<section class=warnings><h2>To act on ({len(found.warnings)})</h2><ul>"
    for each in found.warnings:
        yield f"<li>{_code(escape(each.text))}</li>"
    yield "</ul></section>"


def _charts(found: Analysis) -> Iterator[str]:
    experts = [(charts.shorten(e.name, 18), f"c{i % SERIES}") for i, e in enumerate(found.experts)]
    d = f"{found.density:g}"
    yield "<section><h2>Each expert</h2><div class=grid>"
    yield _figure(
        "How redundant a delta is",
        charts.redundancy(found),
        "How much of a delta's mass its largest entries hold. The steeper the start, the less a trim costs.",
        experts,
    )
    yield _figure(
        "How large its entries are",
        charts.magnitudes(found),
        "Entries by size, a bin for every factor of two; exact zeros are in none.",
        experts,
    )
    layers = charts.by_layer(found, "norms", "delta's norm / base's", "relative_norm")
    if layers:
        yield _figure(
            "How far each layer moved", layers, "The delta's norm as a share of the base's, by layer.", experts
        )
    yield "</div></section><section><h2>Where a trim spends its budget</h2><div class=grid>"
    yield _figure(
        "By kind of weight",
        charts.budget_by_kind(found),
        "Share of each kind's entries that one threshold for the whole model keeps. A trim tensor by tensor keeps "
        f"{d} of "
        "each (dashed).",
        experts,
    )
    kept = charts.by_layer(found, "budget", "share kept", "kept_fraction", level=found.density)
    if kept:
        yield _figure(
            "By layer", kept, "The same by layer. Above the dashed line a layer gets more than its share.", experts
        )
    yield "</div></section>"
    if len(found.experts) > 1:
        yield from _between(found)


def _between(found: Analysis) -> Iterator[str]:
    d, count = f"{found.density:g}", len(found.conflicts)
    densities = [(f"density {row.density:g}", charts.step_name(i, count)) for i, row in enumerate(found.conflicts)]
    numbers = len(found.experts) - 1
    yield "<section><h2>Between experts</h2><div class=grid>"
    yield _figure(
        "Conflicts as experts are added",
        charts.conflicts_by_experts(found),
        "Parameters at which both signs occur among the entries that survive the trim.",
        densities,
    )
    yield _figure(
        "Conflicts as less is kept",
        charts.conflicts_by_density(found),
        "The same against the density: what a trim takes out of the way before any sign is elected.",
        [(f"{i + 2} experts", charts.step_name(numbers - 1 - i, numbers)) for i in range(numbers)][
            :: max(1, numbers // 5)
        ],
    )
    yield _figure(
        "How alike the deltas are",
        charts.cosines(found),
        "Cosines between deltas: near 0 for unrelated tasks, near 1 for the same change, negative where they undo each "
        "other.",
        [],
    )
    influence = found.interference.influence
    rows = [("no expert", influence[0]), ("one", influence[1]), ("several", _joined(influence[2:]))]
    yield "</div></section><section><h2>What a merge does to the parameters that matter</h2><div class=grid>"
    yield _figure(
        "Influential in no, one or several experts",
        charts.interference("influence", "influential in", rows, [(arm, shade) for arm, _, shade in ARMS[:2]]),
        f"Mean size of the merged delta. A parameter is influential in an expert that keeps it at density {d}. A plain "
        "mean shrinks what one expert needs; trimming first and averaging what is left does not.",
        [(name, f"c{shade}") for _, name, shade in ARMS[:2]],
    )
    agreement = [(row.label.replace(" to ", "-"), row) for row in found.interference.agreement if row.count]
    if agreement:  # of experts that change different parameters there is none
        yield _figure(
            "By agreement of signs",
            charts.interference(
                "agreement",
                "share of the commoner sign",
                agreement,
                [(arm, shade) for arm, _, shade in (ARMS[0], ARMS[2])],
            ),
            "Where two or more experts have an influential entry, by the share of the commoner sign. The less they "
            "agree, the "
            "more a plain mean cancels; the elected mean averages one side only.",
            [(name, f"c{shade}") for _, name, shade in (ARMS[0], ARMS[2])],
        )
    yield "</div></section>"


def _joined(rows: Sequence[MeanMagnitudes]) -> MeanMagnitudes:
    """Several bins as one."""
    count = sum(row.count for row in rows)

    def mean(arm: str) -> float | None:
        return sum(row.count * (getattr(row, arm) or 0.0) for row in rows) / count if count else None

    return MeanMagnitudes(
        label="several", count=count, plain=mean("plain"), trimmed=mean("trimmed"), elected=mean("elected")
    )


def _tables(found: Analysis) -> Iterator[str]:
    at = found.densities.index(found.density)
    yield "<section><h2>Numbers</h2><h3>Experts</h3>"
    yield _table(
        ["expert", "norm", "of the base's", "exact zeros", "threshold", "kept", "equal to it", "mass kept"],
        [
            [
                e.name,
                f"{e.norm:.4g}",
                f"{e.relative_norm:.2%}",
                f"{e.zero_fraction:.1%}",
                f"{t.threshold:.4g}" + ("" if t.exact else " ≈"),
                f"{t.kept_fraction:.2%}",
                f"{t.tie_fraction:.2%}",
                f"{t.mass_fraction:.1%}",
            ]
            for e in found.experts
            for t in [e.trims[at]]
        ],
    )
    if any(not e.trims[at].exact for e in found.experts):
        yield (
            "<p class=note>≈: a sample's threshold, a little beside the exact one; what is kept is counted exactly "
            "at the "
            "value shown.</p>"
        )
    if len(found.experts) > 1:
        means = ["parameters", *(name for _, name, _ in ARMS)]
        yield "<h3>Parameters by how many experts they are influential in</h3>"
        yield _table(["experts", *means], [_row(row, found.elements) for row in found.interference.influence])
        yield "<h3>Parameters by agreement of signs</h3>"
        yield _table(["agreement", *means], [_row(row, found.elements) for row in found.interference.agreement])
        yield "<h3>Sign conflicts</h3>"
        yield _table(
            ["density", *(f"{n} experts" for n in range(2, len(found.experts) + 1))],
            [[f"{row.density:g}", *(f"{share:.2%}" for share in row.fractions)] for row in found.conflicts],
        )
    yield from _group_table("Kinds of weight", found, found.kinds)
    yield from _group_table("Layers", found, found.layers)
    yield from _group_table("Tensors", found, found.tensors)
    yield "</section>"


def _row(row: MeanMagnitudes, elements: int) -> list[str]:
    values = ("-" if v is None else f"{v:.3g}" for v in (row.plain, row.trimmed, row.elected))
    return [row.label, f"{row.count / elements:.2%}", *values]


def _group_table(title: str, found: Analysis, groups: Sequence[Group]) -> Iterator[str]:
    shown = groups[:MOST_TENSORS]
    yield f"<details><summary>{title} ({len(groups):,})</summary>"
    if len(shown) < len(groups):
        yield f"<p class=note>The first {len(shown):,}; all are in analysis.json.</p>"
    names = [e.name for e in found.experts]
    yield _table(
        ["name", "entries", *(f"kept: {name}" for name in names), "conflicts", *(f"zeros: {name}" for name in names)],
        [
            [
                g.name,
                f"{g.elements:,}",
                *(f"{e.kept_fraction:.1%}" for e in g.experts),
                f"{g.conflict_fraction:.2%}",
                *(f"{e.zero_fraction:.1%}" for e in g.experts),
            ]
            for g in shown
        ],
    )
    yield "</details>"


def _footer(found: Analysis) -> Iterator[str]:
    for note in found.notes:
        yield f"<p class=note>{_code(escape(note))}</p>"
    yield (
        "<footer>Deltas are expert minus base in float32; experts count alike, without weights. Definitions: Yadav "
        "et al. "
        "2023, TIES-Merging, arXiv:2306.01708. All numbers of this page, and more, are in analysis.json.</footer>"
    )


def _figure(title: str, svg: str, caption: str, legend: Sequence[tuple[str, str]]) -> str:
    keys = "".join(
        f'<span class=key><i style="background:var(--{colour})"></i>{escape(name)}</span>' for name, colour in legend
    )
    label = escape(f"{title}. {caption}", quote=True)
    return (
        f'<figure><h3>{escape(title)}</h3><div class=legend>{keys}</div><div role=img aria-label="{label}">{svg}</div>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th scope=col>{escape(cell)}</th>" for cell in head)
    lines = "\n".join(
        f"<tr><th scope=row>{escape(first)}</th>" + "".join(f"<td>{escape(cell)}</td>" for cell in rest) + "</tr>"
        for first, *rest in rows
    )
    return f"<div class=scroll tabindex=0><table><thead><tr>{top}</tr></thead><tbody>\n{lines}</tbody></table></div>"


def _code(text: str) -> str:
    """`words` of a message as code."""
    parts = text.split("`")
    return "".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
