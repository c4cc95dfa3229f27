"""What a merge did, as numbers: `OUT/.ties_dist/report.json`, `--json`, and the summary table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from ties_dist.output.documents import Name, parse

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class ExpertReport:
    """One expert. Fractions are of d.

    kept_fraction: entries that pass the trim; a zero is never kept. moved_fraction: those that differ from the base's,
    where the density is a share of them. tie_fraction: entries equal to the threshold. threshold: |delta|, where one
    holds for the whole model. density: None where it varies inside the model or nothing is trimmed. untrimmed: tensors
    that have thresholds of their own and this one's is 0, so that all that moved is kept.
    """

    name: str
    weight: float | None
    density: float | None = None
    kept_fraction: float | None = None
    moved_fraction: float | None = None
    tie_fraction: float | None = None
    threshold: float | None = None
    untrimmed: int = 0

    @property
    def asked_fraction(self) -> float | None:
        """What the density asks for, of d."""
        if self.density is None or self.moved_fraction is None:
            return self.density
        return self.density * self.moved_fraction


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """bytes_read: requested, all passes of this run. resumed_units: taken over from an interrupted one.

    peak_rss_bytes: of the largest process. projected_bytes: what the plan said it would be. thresholds_from: 'scan',
    'sample', 'sample and scan' (of some experts each), 'cache', 'journal' (of the interrupted run) or None.
    mispredicted: those of a sample or cache were wrong, and found by a scan.
    counters: what the method counts itself, by its names, over the whole model. tensors: per tensor, shares of its
    entries.
    """

    method: str
    semantics: str
    experts: tuple[ExpertReport, ...]
    conflict_fraction: float | None
    elements: int
    bytes_read: int
    bytes_written: int
    elapsed_seconds: float
    peak_rss_bytes: int
    projected_bytes: int
    units: int
    resumed_units: int
    redone_units: int
    kernel: str
    executor: str
    threads: int
    unit_bytes: int
    output_digest: str
    fingerprint: Name
    majority_sign: int | None = None
    thresholds_from: str | None = None
    mispredicted: bool = False
    phases: Mapping[str, float] = field(default_factory=dict)
    tensors: Mapping[str, Mapping[str, float | list[float]]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    counters: Mapping[str, int] = field(default_factory=dict)
    processor: str = ""
    """What the driver's loops were compiled for."""
    already_done: bool = False
    version: int = VERSION

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> MergeReport:
        """The report a merge wrote; fields that a later version added are passed over. Raises OutputError."""
        return parse(text.encode(), cls, "the report")


TIES_MATTER_FROM = 0.01
"""Of all entries, kept beyond the density: what is less, nobody has to act on."""


def trim_warning(report: MergeReport) -> list[str]:
    """Plain words where a trim keeps clearly more than was asked for, because entries equal the threshold, or less
    moved than was asked for."""
    said = []
    for expert in report.experts:
        if zero := _at_zero(expert):
            said.append(zero)
            continue
        asked, kept = expert.asked_fraction, expert.kept_fraction
        if asked is None or kept is None or kept <= asked + TIES_MATTER_FROM:
            continue
        said.append(
            f"{expert.name}: density {expert.density:g} asked{_of_moved(expert)}, {kept:.1%} kept, because "
            f"{expert.tie_fraction or 0:.1%} of its entries equal the threshold and all ties are kept, as in the "
            f"published code. `tie_policy: exact_k` would keep {asked:.1%}."
        )
    return said


def _at_zero(expert: ExpertReport) -> str | None:
    if expert.threshold == 0:
        found, where = f"its threshold is 0: only {expert.kept_fraction or 0:.2%} of its entries differ", ""
    elif expert.untrimmed:
        found = f"its threshold is 0 in {expert.untrimmed:,} tensors: few of their entries differ"
        where = " there"
    else:
        return None
    asked = "the density asks for" if expert.density is None else f"density {expert.density:g} asks for"
    return (
        f"{expert.name}: {found} from the base, less than {asked}, and nothing of them is trimmed{where}. "
        "`density_of: moved` keeps that share of what differs."
    )


def _of_moved(expert: ExpertReport) -> str:
    return "" if expert.moved_fraction is None else f" of the {expert.moved_fraction:.1%} that differ from the base"
