"""What a merge did, as numbers: `OUT/.ties_dist/report.json`, `--json`, and the summary table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from ties_dist.output.documents import parse

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class ExpertReport:
    """One expert. Fractions are of d.

    kept_fraction: entries that pass the trim rule. tie_fraction: entries equal to the threshold. threshold: |delta|,
    where one holds for the whole model. density: None where it varies inside the model or nothing is trimmed.
    """

    name: str
    weight: float | None
    density: float | None = None
    kept_fraction: float | None = None
    kept_nonzero_fraction: float | None = None
    tie_fraction: float | None = None
    threshold: float | None = None


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """bytes_read: requested, all passes of this run. resumed_units: taken over from an interrupted one.

    peak_rss_bytes: of the largest process. projected_bytes: what the plan said it would be. thresholds_from: 'scan',
    'sample', 'sample and scan' (of some experts each), 'cache', 'journal' (of the interrupted run) or None.
    mispredicted: those of a sample or cache were wrong, and found by a scan.
    tensors: per tensor, shares of its entries.
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
    fingerprint: str
    majority_sign: int | None = None
    thresholds_from: str | None = None
    mispredicted: bool = False
    phases: Mapping[str, float] = field(default_factory=dict)
    tensors: Mapping[str, Mapping[str, float | list[float]]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
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


def tie_warning(report: MergeReport) -> list[str]:
    """Plain words where ties make a trim keep clearly more than was asked for (semantics.md: the trap on bf16)."""
    said = []
    for expert in report.experts:
        if expert.density is None or expert.kept_fraction is None or expert.kept_fraction <= expert.density * 1.02:
            continue
        said.append(
            f"{expert.name}: density {expert.density:g} asked, {expert.kept_fraction:.1%} kept, because "
            f"{expert.tie_fraction or 0:.1%} of its entries equal the threshold and all ties are kept, as in the "
            f"published code. `tie_policy: exact_k` would keep {expert.density:.1%}."
        )
    return said
