"""From the integers of a `Tally` to the numbers of an `Analysis`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ties_dist.analysis.figures import (
    Analysis,
    Conflicts,
    ExpertAnalysis,
    Group,
    Interference,
    Magnitudes,
    MeanMagnitudes,
    Share,
    Trim,
)
from ties_dist.analysis.loops import ARMS
from ties_dist.analysis.tally import Buckets, Tally, TensorTally, added, as_floats
from ties_dist.methods.needs import TrimRule
from ties_dist.planning.plan import MergePlan
from ties_dist.recipe.values import find_layer
from ties_dist.thresholds import from_bits, proves

OCTAVE_SHIFT, EIGHTH_SHIFT = 23, 20
BINS = ((0.5, 0.6), (0.6, 0.7), (0.7, 0.8), (0.8, 0.9), (0.9, 1.0), (1.0, 1.0))
"""Of sign agreement, half open but for the last."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked of a plan's deltas. rule: of the trim. bits: of thresholds, per expert and density. densities:
    descending."""

    plan: MergePlan
    rule: TrimRule
    densities: tuple[float, ...]
    density: float
    bits: tuple[tuple[int, ...], ...]

    def rank(self, expert: int, density: int, zeros: int) -> int:
        """Of the exact threshold; 0 where everything is kept. zeros: entries that did not move."""
        entries = self.rule.ranked(expert, self.plan.elements, zeros)
        return self.rule.rank(entries, self.densities[density]) or 0

    @property
    def chosen(self) -> int:
        return self.densities.index(self.density)


def summarise(question: Question, tally: Tally) -> Analysis:
    """The analysis without warnings, notes and costs."""
    plan, totals = question.plan, Totals(question, tally)
    layer_of, kind_of = zip(*(place(t.source) for t in plan.counted), strict=True) if plan.counted else ((), ())
    whole = totals.of(list(tally.tensors))
    return Analysis(
        base=plan.base.name,
        method=plan.method.name,
        elements=plan.elements,
        density=question.density,
        densities=question.densities,
        experts=tuple(whole.expert(i) for i in range(len(plan.experts))),
        conflicts=tuple(
            Conflicts(
                density=density,
                counts=tuple(whole.conflicts(i)[1:]),
                fractions=tuple(share(c, plan.elements) for c in whole.conflicts(i)[1:]),
            )
            for i, density in enumerate(question.densities)
        ),
        cosines=whole.cosines(),
        interference=interference(tally, len(plan.experts)),
        layers=tuple(totals.groups(layer_of, whole)),
        kinds=tuple(totals.groups(kind_of, whole)),
        tensors=tuple(totals.groups([t.source for t in plan.counted], whole, magnitudes=False)),
    )


def share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def place(tensor: str) -> tuple[str, str]:
    """Layer and kind of weight, from a tensor's name: ('layers.3', 'self_attn.q_proj')."""
    layer, rest = find_layer(tensor)
    kind = re.sub(r"(?<=\.)\d+(?=\.)", "*", rest).removesuffix(".weight").removeprefix("model.")
    return layer.removeprefix("model.") or "outside of layers", kind


def interference(tally: Tally, experts: int) -> Interference:
    """The two figures, from the counts by surviving positive and negative deltas."""
    counts, sums = tally.signs.counts, np.array(tally.signs.sums, object).reshape(*tally.signs.counts.shape, ARMS)

    def means(label: str, chosen: Callable[[int, int], bool]) -> MeanMagnitudes:
        cells = [(p, n) for p in range(experts + 1) for n in range(experts + 1 - p) if chosen(p, n)]
        count = sum(int(counts[cell]) for cell in cells)
        totals = as_floats([sum(int(sums[(*cell, arm)]) for cell in cells) for arm in range(ARMS)])
        plain, trimmed, elected = ((float(total) / count if count else None) for total in totals)
        return MeanMagnitudes(label=label, count=count, plain=plain, trimmed=trimmed, elected=elected)

    def agrees(p: int, n: int, low: int) -> bool:
        return p + n > 1 and max(p, n) * 10 // (p + n) == low

    return Interference(
        influence=tuple(means(str(k), lambda p, n, k=k: p + n == k) for k in range(experts + 1)),  # type: ignore[misc]
        agreement=tuple(
            means(f"{low:g}" if low == high else f"{low:g} to {high:g}", lambda p, n, i=i: agrees(p, n, 5 + i))  # type: ignore[misc]
            for i, (low, high) in enumerate(BINS)
        ),
    )


class Totals:
    """Sums over any set of tensors."""

    def __init__(self, question: Question, tally: Tally) -> None:
        self.question, self.tally = question, tally
        self.buckets = [Buckets(bits) for bits in question.bits]
        self.sizes = question.plan.sizes

    def of(self, names: Sequence[str]) -> Total:
        found = [self.tally.tensors[name] for name in names if name in self.tally.tensors]
        return Total(self, found, sum(self.sizes[name] for name in names))

    def groups(self, labels: Sequence[str], whole: Total, *, magnitudes: bool = True) -> Iterator[Group]:
        """One group a label, in natural order. labels: of the counted tensors, in canonical order."""
        members: dict[str, list[str]] = {}
        for label, tensor in zip(labels, self.question.plan.counted, strict=True):
            members.setdefault(label, []).append(tensor.source)
        for label in sorted(members, key=natural):
            total = self.of(members[label])
            conflicts = total.conflicts(self.question.chosen)[-1]
            yield Group(
                name=label,
                tensors=len(members[label]),
                elements=total.elements,
                conflicts=conflicts,
                conflict_fraction=share(conflicts, total.elements),
                experts=tuple(total.share(i, whole, magnitudes) for i in range(len(self.buckets))),
            )


def natural(name: str) -> list[tuple[int, str]]:
    """Sorts layer 10 behind layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


class Total:
    """Sums over some tensors: counts and significands by expert and bucket, conflicts, products."""

    def __init__(self, totals: Totals, tensors: Sequence[TensorTally], elements: int) -> None:
        self.question, self.buckets, self.elements = totals.question, totals.buckets, elements
        experts, width = len(self.buckets), self.buckets[0].count
        self.counts, self.significands = np.zeros((2, experts, width), np.int64)
        self._conflicts = np.zeros((experts, len(self.question.densities) + 1), np.int64)
        gram = [0] * (experts + 1) ** 2
        for tensor in tensors:
            counts, significands = tensor.dense(experts, width)
            self.counts += counts
            self.significands += significands
            self._conflicts += tensor.conflicts
            gram = added(gram, tensor.gram)
        upper = as_floats(gram).reshape(experts + 1, experts + 1)
        self.gram = upper + np.triu(upper, 1).T
        self.masses = [b.masses(s) for b, s in zip(self.buckets, self.significands, strict=True)]

    def above(self, expert: int, bits: int) -> int:
        """The first bucket of patterns from `bits` on, which is a threshold or one more."""
        return int(np.searchsorted(self.buckets[expert].starts, bits))

    def norm(self, expert: int) -> float:
        return float(np.sqrt(self.gram[expert, expert]))

    def kept(self, expert: int, density: int) -> int:
        """A zero is never kept."""
        return int(self.counts[expert, self.above(expert, max(1, self.question.bits[expert][density])) :].sum())

    def ties(self, expert: int, density: int) -> int:
        bits = self.question.bits[expert][density]
        return int(self.counts[expert, self.above(expert, bits) : self.above(expert, bits + 1)].sum())

    def zeros(self, expert: int) -> int:
        return int(self.counts[expert, : self.above(expert, 1)].sum())

    def conflicts(self, density: int) -> list[int]:
        """Among the first expert, the first two, ..., all."""
        return [int(c) for c in self._conflicts[:, density + 1 :].sum(axis=1)]

    def cosines(self) -> tuple[tuple[float | None, ...], ...]:
        norms = np.sqrt(np.diag(self.gram))[:-1]
        return tuple(
            tuple(
                (1.0 if i == j else float(np.clip(self.gram[i, j] / (a * b), -1, 1))) if a and b else None
                for j, b in enumerate(norms)
            )
            for i, a in enumerate(norms)
        )

    def trim(self, expert: int, density: int) -> Trim:
        bits, rank = self.question.bits[expert][density], self.question.rank(expert, density, self.zeros(expert))
        entries = self.question.rule.ranked(expert, self.elements, self.zeros(expert))
        first, after = self.above(expert, bits), self.above(expert, bits + 1)
        kept = self.kept(expert, density)
        above, equal = int(self.counts[expert, after:].sum()), self.ties(expert, density)
        mass = self.masses[expert]
        return Trim(
            density=self.question.densities[density],
            asked_fraction=self.question.densities[density] * share(entries, self.elements),
            rank=rank,
            threshold=from_bits(bits),
            exact=rank == 0 or proves(rank, above, equal),
            above=above,
            equal=equal,
            kept=kept,
            kept_fraction=share(kept, self.elements),
            tie_fraction=share(equal, self.elements),
            mass_fraction=share(float(mass[first:].sum()), float(mass.sum())),
        )

    def expert(self, i: int) -> ExpertAnalysis:
        base, inner = self.gram[-1, -1], self.gram[i, -1]
        own = self.gram[i, i] + 2 * inner + base
        return ExpertAnalysis(
            name=self.question.plan.experts[i].name,
            norm=self.norm(i),
            relative_norm=share(self.norm(i), float(np.sqrt(base))),
            base_cosine=share(float(base + inner), float(np.sqrt(max(own, 0.0) * base))),
            mass=float(self.masses[i].sum()),
            zeros=self.zeros(i),
            zero_fraction=share(self.zeros(i), self.elements),
            of_moved=self.question.rule.is_of_moved(i),
            trims=tuple(self.trim(i, j) for j in range(len(self.question.densities))),
            magnitudes=self.magnitudes(i, EIGHTH_SHIFT),
        )

    def share(self, i: int, whole: Total, magnitudes: bool) -> Share:
        kept, ties = self.kept(i, self.question.chosen), self.ties(i, self.question.chosen)
        return Share(
            norm=self.norm(i),
            relative_norm=share(self.norm(i), float(np.sqrt(self.gram[-1, -1]))),
            zeros=self.zeros(i),
            zero_fraction=share(self.zeros(i), self.elements),
            kept=kept,
            kept_fraction=share(kept, self.elements),
            budget_fraction=share(kept, whole.kept(i, self.question.chosen)),
            ties=ties,
            tie_fraction=share(ties, self.elements),
            mass_fraction=share(float(self.masses[i].sum()), float(whole.masses[i].sum())),
            magnitudes=self.magnitudes(i, OCTAVE_SHIFT) if magnitudes else None,
        )

    def magnitudes(self, i: int, shift: int) -> Magnitudes:
        """In buckets of patterns that agree in the bits from `shift` on: 23 for a factor of two, 20 for an eighth."""
        nonzero = self.above(i, 1)
        group = self.buckets[i].starts[nonzero:] >> shift
        counts = np.zeros(1 << (31 - shift), np.int64)
        masses = np.zeros(counts.size)
        np.add.at(counts, group, self.counts[i, nonzero:])
        np.add.at(masses, group, self.masses[i][nonzero:])
        present = np.flatnonzero(counts)[::-1]
        return Magnitudes(
            starts=tuple(from_bits(max(int(p) << shift, 1)) for p in present),
            counts=tuple(counts[present].tolist()),
            top_entries=tuple(share(c, self.elements) for c in np.cumsum(counts[present]).tolist()),
            top_mass=tuple(share(m, float(masses.sum())) for m in np.cumsum(masses[present]).tolist()),
        )
