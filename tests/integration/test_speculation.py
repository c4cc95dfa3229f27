"""Speculate, verify, redo: whatever a sample predicts, the counts decide, and the bytes are those of a scan."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

import ties_dist
from tests.conftest import Checkpoints, random_models
from tests.drills.jobs import late_majority, write_job
from ties_dist.engine import passes
from ties_dist.engine.scan import Scan
from ties_dist.output.report import MergeReport
from ties_dist.planning.prepare import prepare
from ties_dist.planning.sample import sample_slices
from ties_dist.thresholds import ModelCut, Prediction, Threshold, Window, to_bits
from ties_dist.values.items import WorkItem
from ties_dist.values.observation import Observation
from ties_dist.worker.merging import Worker

SHAPES = {f"layers.{i}.weight": (700, 901) for i in range(4)} | {"norm.weight": (701,)}


def merged(recipe: Path, out: Path, threshold_pass: str) -> MergeReport:
    return ties_dist.merge(
        recipe, out, threshold_pass=threshold_pass, unit_size=1 << 20, cache_dir=out / "../c" / out.name
    )  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_speculated_merge_has_the_bytes_of_a_scanned_one(
    dtype: torch.dtype, merge_job: Checkpoints, tmp_path: Path
) -> None:
    recipe = merge_job(random_models(SHAPES, experts=3, dtype=dtype))
    reports = {way: merged(recipe, tmp_path / way, way) for way in ("scan", "speculate", "auto")}
    assert len({r.output_digest for r in reports.values()}) == 1
    thresholds = [[e.threshold for e in r.experts] for r in reports.values()]
    assert thresholds[0] == thresholds[1] == thresholds[2]
    if dtype == torch.bfloat16:
        assert reports["auto"].thresholds_from == "sample"
        assert reports["auto"].bytes_read < reports["scan"].bytes_read
    else:  # a float32 threshold is no atom: a prediction is off, and `auto` does not try
        assert reports["auto"].thresholds_from == "scan"
        assert reports["speculate"].thresholds_from == "scan"
        assert reports["speculate"].mispredicted


@pytest.mark.parametrize("factor", [0.0, 0.5, 0.99, 1.01, 2.0, 1e9])
def test_a_planted_wrong_prediction_is_found_and_repaired(
    factor: float, merge_job: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = merge_job(random_models(SHAPES, experts=2, dtype=torch.bfloat16))
    honest = merged(recipe, tmp_path / "honest", "scan")
    real, told = Scan.whole_model, []

    def planted(
        self: Scan, *, speculate: bool | None = False, proven: Mapping[int, Threshold] | None = None
    ) -> tuple[ModelCut, ...]:
        found = real(self, speculate=speculate, proven=proven)
        told.append(sorted(proven or {}))
        if speculate is False:
            return found
        self.source = "sample"
        first = Threshold(to_bits(found[0].threshold.value * factor), 1, 1)
        return (ModelCut(first), *found[1:])

    monkeypatch.setattr(passes.Scan, "whole_model", planted)
    report = merged(recipe, tmp_path / "planted", "speculate")
    assert report.mispredicted
    assert report.redone_units > 0
    assert report.output_digest == honest.output_digest
    assert told == [[], [1]]  # the other expert's prediction was proven: only the base and this one are read again


def test_the_majority_sign_is_guessed_before_the_first_unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The units merged first have the minority's sign; a sample of the whole model is not fooled by them."""
    recipe = write_job(tmp_path, late_majority(9 * 64 * 4608))
    monkeypatch.setattr("ties_dist.planning.sample.SAMPLE_SLICES", 64)
    monkeypatch.setattr("ties_dist.engine.passes.SIGNS_FROM", 1e9)
    blind = merged(recipe, tmp_path / "blind", "speculate")
    monkeypatch.setattr("ties_dist.engine.passes.SIGNS_FROM", 1)
    guessed = merged(recipe, tmp_path / "guessed", "speculate")
    assert blind.majority_sign == guessed.majority_sign == -1
    assert blind.redone_units > 0 and guessed.redone_units == 0
    assert blind.output_digest == guessed.output_digest


def test_only_experts_whose_rank_the_sample_cannot_tell_are_scanned(
    merge_job: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = merge_job(random_models(SHAPES, experts=3, dtype=torch.bfloat16))
    honest = merged(recipe, tmp_path / "honest", "scan")
    likely, asked, observed = Scan._is_likely, [], []
    observe = Worker.observe

    def unsure_of_the_second(self: Scan, p: Prediction, rank: int) -> bool:
        asked.append(p)
        return len(asked) % 3 != 2 and likely(self, p, rank)

    def noted(self: Worker, unit: WorkItem, windows: Mapping[int, Window], into: Observation) -> None:
        observed.append(sorted(windows))
        observe(self, unit, windows, into)

    monkeypatch.setattr(Scan, "_is_likely", unsure_of_the_second)
    monkeypatch.setattr(Worker, "observe", noted)
    report = merged(recipe, tmp_path / "auto", "auto")
    assert report.thresholds_from == "sample and scan"
    assert observed and all(experts == [1] for experts in observed)
    assert report.output_digest == honest.output_digest


def test_a_larger_sample_halves_the_error(merge_job: Checkpoints, tmp_path: Path) -> None:
    job = prepare(merge_job(random_models({"a.weight": (2000, 4096)}, experts=1, dtype=torch.bfloat16)))
    slices = [sample_slices(job.plan, times) for times in (1, 4)]
    assert [sum(stop - start for _, start, stop in taken) for taken, _ in slices] == [
        pytest.approx(1024 * 2048, rel=0.3), pytest.approx(4096 * 2048, rel=0.4),
    ]  # fmt: skip
    for taken, weights in slices:  # both stand for the whole model
        lengths = [stop - start for _, start, stop in taken]
        assert sum(w * n for w, n in zip(weights, lengths, strict=True)) == pytest.approx(2000 * 4096)


def test_clustered_deltas_do_not_fool_the_proof(merge_job: Checkpoints, tmp_path: Path) -> None:
    """All large deltas sit in one small corner that a sample may miss."""
    base, expert = random_models(SHAPES, experts=1, dtype=torch.bfloat16)
    expert = {name: base[name].clone() for name in base}
    expert["layers.2.weight"][:3, :37] += 1.0
    recipe = merge_job([base, expert], parameters={"density": 1e-5})
    reports = [merged(recipe, tmp_path / way, way) for way in ("scan", "speculate")]
    assert reports[0].output_digest == reports[1].output_digest
    assert reports[0].experts[0].threshold == reports[1].experts[0].threshold
