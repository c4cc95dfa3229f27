"""What the deltas of a merge look like, as values: per expert, per layer and kind of weight, and between experts.

Every count is an exact integer at the thresholds that are stated, and every sum is rounded once, so
that an analysis is a function of its inputs. The definitions are those of Yadav et al. 2023 (arXiv:2306.01708).
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ties_dist.output.report import TIES_MATTER_FROM

VERSION = 2
UNRELATED_FROM = 0.5
"""A delta's norm as a share of the base's: unrelated weights of one spread have 1.4, fine-tunes a few percent."""
DOMINATING_FROM = 5.0
"""A delta's norm as a multiple of the others' median."""
TWIN_FROM = 0.9999


@dataclass(frozen=True, kw_only=True)
class Trim:
    """What one density keeps of one expert over the whole model, at the threshold that is stated.

    asked_fraction: the density, or that share of what differs from the base's. rank: of the exact threshold, from the
    largest |delta|; 0 without one. exact: whether `threshold` is it, proven by `above` and
    `equal`, the entries that are larger and equal; else a sample's prediction, and all counts are those at it. kept: of
    those the ones that are not zero. mass: sum of |delta|. Fractions are of all entries and of the whole mass.
    """

    density: float
    asked_fraction: float
    rank: int
    threshold: float
    exact: bool
    above: int
    equal: int
    kept: int
    kept_fraction: float
    tie_fraction: float
    mass_fraction: float


@dataclass(frozen=True, kw_only=True)
class Magnitudes:
    """Distribution of |delta| without zeros, and the redundancy curve: the top `top_entries` share of all entries,
    zeros included, holds the `top_mass` share of the mass. starts: lower bounds of buckets, largest first."""

    starts: tuple[float, ...]
    counts: tuple[int, ...]
    top_entries: tuple[float, ...]
    top_mass: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class ExpertAnalysis:
    """norm: of the delta; relative_norm: to the base's. base_cosine: of the expert's and the base's weights. of_moved:
    whether a density is a share of what differs from the base's."""

    name: str
    norm: float
    relative_norm: float
    base_cosine: float
    mass: float
    zeros: int
    zero_fraction: float
    of_moved: bool
    trims: tuple[Trim, ...]
    magnitudes: Magnitudes

    def is_untrimmed(self, density: float) -> bool:
        """Whether a density's threshold is 0, so that all that differs from the base is kept."""
        return any(t.density == density and t.rank and t.threshold == 0 for t in self.trims)


@dataclass(frozen=True, kw_only=True)
class Share:
    """One expert in one group of tensors. kept: entries that the whole-model trim keeps, kept_fraction: of the group's;
    a trim tensor by tensor keeps the density of every tensor. budget_fraction: of all that it keeps in the model. ties:
    entries equal to the threshold."""

    norm: float
    relative_norm: float
    zeros: int
    zero_fraction: float
    kept: int
    kept_fraction: float
    budget_fraction: float
    ties: int
    tie_fraction: float
    mass_fraction: float
    magnitudes: Magnitudes | None = None


@dataclass(frozen=True, kw_only=True)
class Group:
    """Tensors of one layer or of one kind of weight, or one tensor. experts: in recipe order."""

    name: str
    tensors: int
    elements: int
    conflicts: int
    conflict_fraction: float
    experts: tuple[Share, ...]


@dataclass(frozen=True, kw_only=True)
class Conflicts:
    """At one density: parameters at which both signs survive among the first 2, 3, ... experts of the recipe."""

    density: float
    counts: tuple[int, ...]
    fractions: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class MeanMagnitudes:
    """Mean |merged delta| over some parameters, None where there are none.

    plain: mean of all experts. trimmed: of the deltas that survive, without election. elected: of the survivors that
    have the sign of their sum.
    """

    label: str
    count: int
    plain: float | None
    trimmed: float | None
    elected: float | None


@dataclass(frozen=True, kw_only=True)
class Interference:
    """influence: by how many experts have a surviving delta there; agreement: where two or more have, by the share of
    the commoner sign."""

    influence: tuple[MeanMagnitudes, ...]
    agreement: tuple[MeanMagnitudes, ...]


@dataclass(frozen=True, kw_only=True)
class Advice:
    """Something a person can act on. subjects: names of experts."""

    kind: Literal["unrelated", "dominating", "ties", "untrimmed", "empty", "twin"]
    subjects: tuple[str, ...]
    text: str


@dataclass(frozen=True, kw_only=True)
class Run:
    """What the analysis cost. resumed_fraction: of the work, that an interrupted run had done. thresholds_from:
    'sample', 'cache' or both. cached: read from the statistics store."""

    bytes_read: int = 0
    resumed_fraction: float = 0.0
    input_bytes: int = 0
    elapsed_seconds: float = 0.0
    peak_rss_bytes: int = 0
    projected_bytes: int = 0
    threads: int = 0
    unit_bytes: int = 0
    thresholds_from: str = "sample"
    cached: bool = False


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """density: that of the figures, the groups and the tensors. cosines: of the deltas, None where one is zero."""

    base: str
    method: str
    elements: int
    density: float
    densities: tuple[float, ...]
    experts: tuple[ExpertAnalysis, ...]
    conflicts: tuple[Conflicts, ...]
    cosines: tuple[tuple[float | None, ...], ...]
    interference: Interference
    layers: tuple[Group, ...]
    kinds: tuple[Group, ...]
    tensors: tuple[Group, ...]
    warnings: tuple[Advice, ...] = ()
    notes: tuple[str, ...] = ()
    version: int = VERSION
    run: Run = field(default_factory=Run)


def advise(found: Analysis, *, trims: bool) -> Iterator[Advice]:
    """What in the figures asks for an action. trims: whether the merge trims as the figures do: over the
    whole model, keeping all ties."""
    for i, expert in enumerate(found.experts):
        if expert.norm == 0:
            yield Advice(
                kind="empty",
                subjects=(expert.name,),
                text=f"'{expert.name}' is equal to the base: it adds nothing to a sum and shrinks a mean. Leave it "
                "out.",
            )
            continue
        if expert.relative_norm >= UNRELATED_FROM:
            yield Advice(
                kind="unrelated",
                subjects=(expert.name,),
                text=f"'{expert.name}' is probably no fine-tune of '{found.base}': its delta is "
                f"{expert.relative_norm:.0%} as long as the base's weights (of fine-tunes a few percent), and the "
                f"cosine of the two models is {round(expert.base_cosine, 2) + 0.0:.2f} (of fine-tunes 0.99 or more). "
                "Check `base_model`, or leave it out.",
            )
        others = [other.norm for other in found.experts if other is not expert]
        usual = statistics.median(others) if others else 0.0
        if usual and expert.norm >= DOMINATING_FROM * usual:
            ratio = expert.norm / usual
            yield Advice(
                kind="dominating",
                subjects=(expert.name,),
                text=f"'{expert.name}' dominates: its delta is {ratio:.3g} times as long as is usual among the "
                f"others, so that it decides nearly every sign and the size of the result. A `weight` of about "
                f"{1 / ratio:.2g} would level it.",
            )
        for j in range(i):
            cosine = found.cosines[i][j]
            if cosine is not None and cosine >= TWIN_FROM:
                yield Advice(
                    kind="twin",
                    subjects=(expert.name,),
                    text=f"'{found.experts[j].name}' and '{expert.name}' have the same delta (cosine {cosine:.5f}): "
                    "one model counts twice. Leave one out.",
                )
    if trims:
        yield from _advise_on_trims(found)


def _advise_on_trims(found: Analysis) -> Iterator[Advice]:
    tied = {e.name: t for e in found.experts for t in e.trims if t.density == found.density and _keeps_too_much(t)}
    if tied:
        some = f"{len(tied)} of {len(found.experts)} experts" if len(tied) < len(found.experts) else "every expert"
        names = f"'{next(iter(tied))}'" if len(tied) == 1 else some
        yield Advice(
            kind="ties",
            subjects=tuple(tied),
            text=f"Density {found.density:g} keeps {span([t.kept_fraction for t in tied.values()])} of {names}, "
            "because "
            f"{span([t.tie_fraction for t in tied.values()])} of the entries equal the threshold and all of them "
            "are kept. "
            f"`tie_policy: exact_k` keeps {span([t.asked_fraction for t in tied.values()])}.",
        )
    if untrimmed := [e.name for e in found.experts if e.is_untrimmed(found.density) and e.norm]:
        listed = ", ".join(f"'{name}'" for name in untrimmed)
        yield Advice(
            kind="untrimmed",
            subjects=tuple(untrimmed),
            text=f"Density {found.density:g} trims nothing of {listed}: fewer entries differ from the base than it "
            "asks for, and the threshold is 0. `density_of: moved` keeps that share of what differs.",
        )


def _keeps_too_much(trim: Trim) -> bool:
    asked = trim.asked_fraction
    return trim.kept_fraction > asked + TIES_MATTER_FROM and trim.tie_fraction > TIES_MATTER_FROM


def share_of(value: float) -> str:
    """A share as a person reads it."""
    return f"{value:.2%}" if 0 < abs(value) < 0.01 else f"{value:.1%}"


def span(shares: Sequence[float]) -> str:
    """One share, or the smallest and the largest."""
    return " to ".join(dict.fromkeys((share_of(min(shares)), share_of(max(shares)))))
