"""Charts of an analysis, as SVG that lives inside a page: by matplotlib, without a script and without a network.

matplotlib, because it is the best-kept charting library there is and draws SVG whose text stays text; the pages of the
script libraries weigh 1 to 5 MB and show nothing where scripts are off. Colours are placeholders that become the page's
variables, so that one drawing is right in a light and in a dark page; drawings are 360 units wide, about what a phone
shows, so that text keeps its size.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ties_dist.analysis.figures import Analysis, Group, MeanMagnitudes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH = 360
SERIES = 8
"""Colours before they repeat, then dashed."""
MOST_ROWS = 16
MOST_NUMBERED = 8
"""Models up to which the cells of a matrix have room for numbers."""
RARE = 2e-4
"""Share of entries below which a bin's size is off the chart."""
PLACES = {"ink": "#010101", "muted": "#010102", "line": "#010103", "card": "#010104"} | {
    f"{kind}{i}": f"#0102{10 * j + i:02d}" for j, kind in enumerate("cs") for i in range(SERIES)
}
"""Placeholders by the name of the page's variable; c: of models, s: of an ordered series."""
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 11.5,
    "text.color": PLACES["ink"],
    "axes.edgecolor": PLACES["line"],
    "axes.labelcolor": PLACES["muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "grid.color": PLACES["line"],
    "grid.linewidth": 0.6,
    "xtick.color": PLACES["line"],
    "ytick.color": PLACES["line"],
    "xtick.labelcolor": PLACES["muted"],
    "ytick.labelcolor": PLACES["muted"],
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}


def draw(name: str, paint: Callable[[Axes], None], height: int = 240, left: float = 56) -> str:
    """An <svg> element. name: makes its ids differ from other drawings'. left: room for labels, in units of 360."""
    with rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(WIDTH / 72, height / 72))
        axes = figure.add_axes((left / WIDTH, 42 / height, (WIDTH - left - 18) / WIDTH, (height - 52) / height))
        paint(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r'\1 aria-hidden="true"', svg, count=1)
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font: \1 var(--font)", svg)
    svg = re.sub(
        r'id="(figure|axes|patch|line2d|matplotlib\.axis|xtick|ytick|text|PathCollection|LineCollection)_\d+"', "", svg
    )
    for variable, colour in PLACES.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return re.sub(r"\n\s*", "\n", svg)


def colour(i: int, kind: str = "c") -> str:
    return PLACES[f"{kind}{i % SERIES}"]


def dash(i: int) -> str:
    return "-" if i < SERIES else "--"


def step_name(i: int, count: int) -> str:
    """The page's variable for the i-th of an ordered series, from strong to pale."""
    return f"s{SERIES - 1 - round(i * (SERIES - 2) / max(1, count - 1))}"


def step(i: int, count: int) -> str:
    return PLACES[step_name(i, count)]


def percent(value: float, _: object = None) -> str:
    return f"{100 * value:.3g}%"


def shorten(name: str, most: int = 20) -> str:
    return name if len(name) <= most else f"{name[: most // 2 - 1]}…{name[-(most - most // 2) :]}"


def cosine_text(cosine: float | None) -> str:
    return "-" if cosine is None else f"{round(cosine, 2) + 0.0:.2f}"  # no -0.00


def room(labels: Sequence[str]) -> float:
    return 16 + 6.5 * max(map(len, labels), default=0)


def redundancy(found: Analysis) -> str:
    def paint(axes: Axes) -> None:
        for i, e in enumerate(found.experts):
            curve = e.magnitudes
            entries, mass = (0.0, *curve.top_entries, 1.0), (0.0, *curve.top_mass, 1.0)
            axes.plot(entries, mass, dash(i), color=colour(i))
        axes.axvline(found.density, color=PLACES["muted"], linewidth=1, linestyle=":")
        axes.text(found.density + 0.015, 0.03, f"density {found.density:g}", color=PLACES["muted"])
        axes.set(xlabel="largest entries kept", ylabel="share of the mass", xlim=(0, 1), ylim=(0, 1.02))
        _percents(axes, "xy")

    return draw("redundancy", paint)


def magnitudes(found: Analysis) -> str:
    def paint(axes: Axes) -> None:
        for i, e in enumerate(found.experts):
            octaves: dict[int, int] = {}  # eighths show little but the grid of 16-bit weights
            for start, count in zip(e.magnitudes.starts, e.magnitudes.counts, strict=True):
                octave = math.frexp(start)[1] - 1
                octaves[octave] = octaves.get(octave, 0) + count
            seen = [o for o, count in octaves.items() if count > RARE * found.elements]
            places = range(min(seen) - 1, max(seen) + 2) if seen else range(0)
            shares = [octaves.get(o, 0) / found.elements for o in places]
            axes.plot([2.0**o for o in places], shares, f"{dash(i)}o", color=colour(i), markersize=3.5)
        axes.set_xscale("log")
        axes.set(xlabel="size of an entry, |delta|", ylabel="share of entries", ylim=(0, None))
        axes.minorticks_off()
        _percents(axes, "y")

    return draw("magnitudes", paint, left=58)


def budget_by_kind(found: Analysis) -> str:
    """Share kept of each kind of weight, largest kinds first, against what a trim tensor by tensor keeps."""
    kinds = sorted(found.kinds, key=lambda g: -g.elements)[:MOST_ROWS]
    labels = [shorten(g.name) for g in kinds]

    def paint(axes: Axes) -> None:
        for row, group in enumerate(kinds):
            shares = [e.kept_fraction for e in group.experts]
            axes.plot([min(shares), max(shares)], [row, row], color=PLACES["line"], linewidth=4)
            for i, kept in enumerate(shares):
                axes.plot(kept, row, "o", color=colour(i), markersize=6, markeredgecolor=PLACES["card"])
        axes.axvline(found.density, color=PLACES["ink"], linewidth=1, linestyle="--")
        axes.set_yticks(range(len(kinds)), labels)
        axes.set(xlabel="share of its entries kept", xlim=(0, None), ylim=(len(kinds) - 0.4, -0.6))
        axes.grid(axis="y", visible=False)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        _percents(axes, "x")

    return draw("kinds", paint, height=62 + 20 * len(kinds), left=room(labels))


def stacks(found: Analysis) -> dict[str, list[Group]]:
    """Groups by stack of layers, in order; those outside of layers are in none."""
    listed: dict[str, list[Group]] = {}
    for group in found.layers:
        stack, dot, index = group.name.rpartition(".")
        if dot and index.isdigit():
            listed.setdefault(stack, []).append(group)
    return listed


def by_layer(found: Analysis, name: str, label: str, value: str, *, level: float | None = None) -> str | None:
    """Lines over the layers, one stack behind another. value: a field of `Share`. None for fewer than two layers."""
    groups = [group for listed in stacks(found).values() for group in listed]
    if len(groups) < 2:
        return None
    cuts = [len(listed) for listed in stacks(found).values()]

    def paint(axes: Axes) -> None:
        for i in range(len(found.experts)):
            start = 0
            for count in cuts:
                numbers = [float(getattr(g.experts[i], value)) for g in groups[start : start + count]]
                marker = "o" if count < 16 else ""
                axes.plot(range(start, start + count), numbers, dash(i) + marker, color=colour(i), markersize=3.5)
                start += count
        if level is not None:
            axes.axhline(level, color=PLACES["ink"], linewidth=1, linestyle="--")
        title = "layer" if len(cuts) == 1 else f"layer ({', then '.join(stacks(found))})"
        axes.set(xlabel=title, ylabel=label, ylim=(0, None))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        _percents(axes, "y")

    return draw(name, paint, left=58)


def conflicts_by_experts(found: Analysis) -> str:
    def paint(axes: Axes) -> None:
        numbers = range(2, len(found.experts) + 1)
        for i, row in enumerate(found.conflicts):
            axes.plot(numbers, row.fractions, "-o", color=step(i, len(found.conflicts)), markersize=4)
        axes.set(xlabel="experts merged, in the recipe's order", ylabel="parameters in conflict", ylim=(0, None))
        axes.set_xticks(list(numbers) if len(numbers) < 10 else list(numbers)[:: len(numbers) // 6])
        _percents(axes, "y")

    return draw("conflicts-experts", paint, left=58)


def conflicts_by_density(found: Analysis) -> str:
    def paint(axes: Axes) -> None:
        densities = [row.density for row in found.conflicts]
        count = len(found.experts) - 1
        for i in range(count):
            shares = [row.fractions[i] for row in found.conflicts]
            axes.plot(densities, shares, "-o", color=step(count - 1 - i, count), markersize=4)
        axes.set_xscale("log")
        axes.minorticks_off()
        shown = [d for d in densities if d in (1, 0.5, 0.2, 0.1, 0.05)] or densities
        axes.set_xticks(shown, [f"{d:g}" for d in shown])
        axes.set(xlabel="density", ylabel="parameters in conflict", ylim=(0, None))
        _percents(axes, "y")

    return draw("conflicts-density", paint, left=58)


def cosines(found: Analysis) -> str:
    names = [shorten(e.name, 16) for e in found.experts]
    side = WIDTH - 18 - room(names)
    count = len(names)

    def paint(axes: Axes) -> None:
        for y, row in enumerate(found.cosines):
            for x, cosine in enumerate(row):
                strength = min(1.0, abs(cosine or 0.0))
                fill = PLACES["s7"] if (cosine or 0.0) >= 0 else PLACES["c7"]
                axes.fill([x, x + 1, x + 1, x], [y, y, y + 1, y + 1], color=fill, alpha=0.05 + 0.5 * strength, lw=0)
                if count <= MOST_NUMBERED:
                    axes.text(
                        x + 0.5,
                        y + 0.5,
                        cosine_text(cosine),
                        ha="center",
                        va="center",
                        fontsize=10 if count < 7 else 8.5,
                    )
        places = [i + 0.5 for i in range(count)]
        axes.set_yticks(places, names)
        axes.set_xticks(places, [str(i + 1) for i in range(count)])
        axes.set_yticks(places, [f"{i + 1}  {name}" for i, name in enumerate(names)])
        axes.set(xlim=(0, count), ylim=(count, 0))
        axes.tick_params(length=0)
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)

    return draw("cosines", paint, height=int(min(side, 56 + 34 * count) + 56), left=room(names) + 14)


def interference(
    name: str, label: str, rows: Sequence[tuple[str, MeanMagnitudes]], arms: Sequence[tuple[str, int]]
) -> str:  # fmt: skip
    """Bars of mean magnitudes. label: of the rows' own. arms: field of `MeanMagnitudes`, colour."""
    heights = {arm: [float(getattr(row, arm) or 0.0) for _, row in rows] for arm, _ in arms}
    most = max(value for values in heights.values() for value in values)
    power = math.floor(math.log10(most)) if most else 0

    def paint(axes: Axes) -> None:
        width = 0.8 / len(arms)
        for j, (arm, shade) in enumerate(arms):
            places = [i - 0.4 + (j + 0.5) * width for i in range(len(rows))]
            axes.bar(places, [h / 10**power for h in heights[arm]], width * 0.92, color=colour(shade), linewidth=0)
        axes.set_xticks(range(len(rows)), [row for row, _ in rows])
        axes.tick_params(axis="x", length=0)
        axes.grid(axis="x", visible=False)
        axes.set(xlabel=label, ylabel=f"mean |merged delta|, x 1e{power}" if power else "mean |merged delta|")
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))

    return draw(name, paint, left=58)


def _percents(axes: Axes, which: str) -> None:
    for axis in which:
        getattr(axes, f"{axis}axis").set_major_formatter(FuncFormatter(partial(percent)))
