"""The report: a table and a figure per claim, the paper's number beside ours, and a plain verdict."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.measure import machine, table
from benchmarks.paper.claims import Claim
from benchmarks.paper.lab import Lab

Part = tuple[Sequence[Lab], Sequence[Claim]]


def write_report(parts: Sequence[Part], path: Path, seconds: float) -> Path:
    """parts: the labs of each kind of data, and what was found in them."""
    labs = parts[0][0]
    size, figures = labs[0].size, path.with_suffix("")
    option = " --quick" if size.name == "quick" else ""
    seeds = "one seed" if len(labs) == 1 else f"{len(labs)} seeds"
    lines = [
        f"# The paper's claims ({size.name} form): {', '.join(labs[0].domain.name for labs, _ in parts)}",
        "",
        f"`python -m benchmarks.paper.run{option} --report`, {path.name[:10]}, {seconds / 60:.0f} minutes, models that "
        "were trained before not counted.",
        "",
        *(f"- {name}: {value}" for name, value in machine(path.parent).items()),
        "",
        f"{seeds[0].upper()}{seeds[1:]}, {size.steps} steps a fine-tuning, {size.slices['test']} test examples a task.",
        "Scores are accuracy in percent of the accuracy of the task's own expert, averaged over tasks; in brackets the",
        "95 % interval of a bootstrap over groups of test examples" + (" and over seeds." if len(labs) > 1 else "."),
        "With one seed an interval says nothing of another training run." if len(labs) == 1 else "",
        "",
    ]
    rows = [
        (f"{labs[0].domain.name} {number}. {claim.title}", claim.verdict)
        for labs, claims in parts
        for number, claim in enumerate(claims, start=1)
    ]
    lines += ["| claim | verdict |", "|---|---|", *(f"| {title} | {said} |" for title, said in rows)]
    for labs, claims in parts:
        lines += _part(labs, claims, figures)
    path.write_text("\n".join(lines) + "\n")
    return path


def _part(labs: Sequence[Lab], claims: Sequence[Claim], figures: Path) -> list[str]:
    domain = labs[0].domain
    lines = [
        "",
        f"# {domain.name.capitalize()}",
        "",
        f"Base model: {domain.base_name}. Heads are trained on the base and frozen.",
        "",
        "| task | labels | test examples | pretrained, % | expert, % |",
        "|---|---|---|---|---|",
    ]
    for name in (*domain.merged, *domain.held_out):
        task = labs[0].tasks[name]
        base, own = (
            100 * float(np.mean([lab.right(model, name).float().mean().item() for lab in labs]))
            for model in ("base", f"experts/{name}")
        )
        held = " (held out)" if name in domain.held_out else ""
        lines.append(
            f"| {name}{held}: {task.question} | {len(task.labels)} | {len(task.test)} | {base:.1f} | {own:.1f} |"
        )
    for number, claim in enumerate(claims, start=1):
        lines += ["", f"## {domain.name.capitalize()} {number}. {claim.title}", "", f"Paper: {claim.paper}.", ""]
        lines.append(table(claim.columns, claim.rows))
        if claim.series:
            figures.mkdir(parents=True, exist_ok=True)
            file = figures / f"{domain.name}-{number}.svg"
            draw(claim, file)
            lines += ["", f"![{claim.title}]({figures.name}/{file.name})"]
        lines += ["", f"**Verdict: {claim.verdict}.** {claim.notes}".rstrip()]
    return lines


def draw(claim: Claim, file: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "ties_dist"  # the same file from the same numbers
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    for name, points in claim.series.items():
        x = [at for at, _ in points]
        y = np.array([e.mean for _, e in points])
        bounds = np.array([[e.mean - e.low for _, e in points], [e.high - e.mean for _, e in points]]).clip(0)
        axes.errorbar(x, y, bounds, marker="o", capsize=3, label=name)
    axes.set_xlabel(claim.x_label)
    axes.set_ylabel("%")
    axes.set_title(claim.title, fontsize="medium")
    if len(claim.series) > 1:
        axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)
