"""`analyze` against a NumPy computation over whole models, its invariances, its warnings, and its page in a browser."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import ties_dist
from tests.conftest import Checkpoints, random_models
from tests.drills.forked import Forge
from tests.integration.command import Outcome, contents, run
from ties_dist.analysis.tally import Tally

Run = Callable[..., Outcome]
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
SHAPES = {
    "model.embed_tokens.weight": (600, 512),
    "model.layers.0.mlp.up_proj.weight": (700, 512),
    "model.layers.0.norm.weight": (512,),
    "model.layers.1.mlp.up_proj.weight": (700, 512),
    "model.layers.1.norm.weight": (512,),
    "model.scalar": (1,),
}
"""Some 2 MB in 16 bits: several units of 1 MiB, with tensors that are cut."""
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Run:
    return lambda *arguments: run(capsys, *arguments)


def fine_tunes(dtype: torch.dtype, experts: int = 4) -> list[dict[str, Tensor]]:
    return random_models(SHAPES, experts=experts, dtype=dtype)


def deltas_of(models: Sequence[dict[str, Tensor]], names: Sequence[str]) -> np.ndarray:
    """(experts, entries) float32, of some tensors behind each other."""
    flat = [np.concatenate([m[n].float().numpy().ravel() for n in names]) for m in models]
    return np.stack([expert - flat[0] for expert in flat[1:]])


# -- counts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_counts_equal_a_computation_over_the_whole_model(dtype: str, merge_job: Checkpoints, tmp_path: Path) -> None:
    models = fine_tunes(DTYPES[dtype])
    recipe = merge_job(models, shards=2)
    found = ties_dist.analyze(recipe, unit_size=1 << 20, threads=2)
    names = sorted(SHAPES)
    deltas = deltas_of(models, names)
    wide, sizes = deltas.astype(np.float64), np.abs(deltas)
    count, elements = deltas.shape
    base = np.concatenate([models[0][n].float().numpy().ravel() for n in names]).astype(np.float64)
    assert found.elements == elements and found.density == 0.2 and found.run.cached is False

    for i, expert in enumerate(found.experts):
        assert expert.zeros == (deltas[i] == 0).sum()
        assert expert.norm == pytest.approx(np.linalg.norm(wide[i]), rel=1e-12)
        assert expert.relative_norm == pytest.approx(np.linalg.norm(wide[i]) / np.linalg.norm(base), rel=1e-12)
        own = base + wide[i]
        cosine = own @ base / np.linalg.norm(own) / np.linalg.norm(base)
        assert expert.base_cosine == pytest.approx(cosine, rel=1e-12)
        assert expert.mass == pytest.approx(np.abs(wide[i]).sum(), rel=1e-12)
        for trim in expert.trims:
            threshold = np.float32(trim.threshold)
            assert trim.above == (sizes[i] > threshold).sum()
            assert trim.equal == (sizes[i] == threshold).sum()
            assert trim.kept == ((sizes[i] >= threshold) & (deltas[i] != 0)).sum()
            assert trim.asked_fraction == trim.density
            kept_mass = np.abs(wide[i])[sizes[i] >= threshold].sum() / np.abs(wide[i]).sum()
            assert trim.mass_fraction == pytest.approx(kept_mass, rel=1e-12)
            k = int(elements * trim.density)
            if k < elements:  # the published rule: the (d - k)-th smallest
                right = np.sort(sizes[i])[elements - k - 1]
                assert trim.exact == (right == threshold)
                assert abs(trim.kept_fraction - ((sizes[i] >= right) & (sizes[i] > 0)).mean()) < 0.01
        # The buckets of the distribution share the upper eleven bits.
        upper = np.bincount(sizes[i][sizes[i] > 0].view(np.uint32) >> 20, minlength=2048)
        present = np.flatnonzero(upper)[::-1]
        assert expert.magnitudes.counts == tuple(upper[present])
        assert expert.magnitudes.top_entries[-1] == (deltas[i] != 0).sum() / elements
        assert expert.magnitudes.top_mass[-1] == 1.0

    for row in found.conflicts:
        at = found.densities.index(row.density)
        kept = np.stack([sizes[i] >= np.float32(found.experts[i].trims[at].threshold) for i in range(count)])
        positive, negative = kept & (deltas > 0), kept & (deltas < 0)
        assert row.counts == tuple(
            (positive[:n].any(axis=0) & negative[:n].any(axis=0)).sum() for n in range(2, count + 1)
        )
    norms = np.linalg.norm(wide, axis=1)
    assert np.allclose(np.array(found.cosines, float), wide @ wide.T / np.outer(norms, norms), rtol=1e-10)
    check_interference(found, deltas)
    for groups, members in ((found.layers, layers_of(names)), (found.kinds, kinds_of(names)), (found.tensors, None)):
        for group in groups:
            check_group(group, found, deltas_of(models, members[group.name] if members else [group.name]))


def layers_of(names: Sequence[str]) -> dict[str, list[str]]:
    inside = {f"layers.{i}": [n for n in names if f"layers.{i}." in n] for i in (0, 1)}
    return inside | {"outside of layers": [n for n in names if "layers." not in n]}


def kinds_of(names: Sequence[str]) -> dict[str, list[str]]:
    kinds = ("embed_tokens", "mlp.up_proj", "norm", "scalar")
    return {kind: [n for n in names if kind in n] for kind in kinds}


def thresholds_of(found: ties_dist.Analysis) -> np.ndarray:
    """(experts, 1) float32, at the density of the figures."""
    at = found.densities.index(found.density)
    return np.array([[e.trims[at].threshold] for e in found.experts], np.float32)


def check_group(group: Any, found: ties_dist.Analysis, deltas: np.ndarray) -> None:
    kept = (np.abs(deltas) >= thresholds_of(found)) & (deltas != 0)
    conflicts = (kept & (deltas > 0)).any(axis=0) & (kept & (deltas < 0)).any(axis=0)
    assert (group.elements, group.conflicts) == (deltas.shape[1], conflicts.sum())
    for i, share in enumerate(group.experts):
        whole = found.experts[i].trims[found.densities.index(found.density)].kept
        assert (share.zeros, share.kept) == ((deltas[i] == 0).sum(), kept[i].sum())
        assert share.ties == (np.abs(deltas[i]) == thresholds_of(found)[i]).sum()
        assert share.budget_fraction == kept[i].sum() / whole
        assert share.norm == pytest.approx(np.linalg.norm(deltas[i].astype(np.float64)), rel=1e-12)


def check_interference(found: ties_dist.Analysis, deltas: np.ndarray) -> None:
    """Both figures of the paper, by loops over masks."""
    wide, survives = deltas.astype(np.float64), (np.abs(deltas) >= thresholds_of(found)) & (deltas != 0)
    trimmed = np.where(survives, wide, 0)
    survivors = survives.sum(axis=0)
    plain = np.abs(wide.mean(axis=0))
    mean = np.abs(trimmed.sum(axis=0)) / np.maximum(survivors, 1)
    sign = np.where(trimmed.sum(axis=0) >= 0, 1, -1)
    agree = survives & (np.sign(wide) == sign)
    elected = np.abs(np.where(agree, wide, 0).sum(axis=0)) / np.maximum(agree.sum(axis=0), 1)

    def check(row: Any, mask: np.ndarray) -> None:
        assert row.count == mask.sum()
        for value, arm in ((row.plain, plain), (row.trimmed, mean), (row.elected, elected)):
            assert value == (pytest.approx(arm[mask].mean(), rel=1e-9) if mask.any() else None)

    for k, row in enumerate(found.interference.influence):
        check(row, survivors == k)
    commoner = np.maximum((survives & (wide > 0)).sum(axis=0), (survives & (wide < 0)).sum(axis=0))
    for i, row in enumerate(found.interference.agreement):
        # In integers: 0.6 is not below 3/5.
        inside = (10 * commoner >= (5 + i) * survivors) & ((10 * commoner < (6 + i) * survivors) | (i == 5))
        check(row, inside & (survivors > 1))


# -- invariances and cost ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_nothing_depends_on_units_threads_or_reads(
    dtype: str, merge_job: Checkpoints, tmp_path: Path, cli: Run
) -> None:
    recipe = merge_job(fine_tunes(DTYPES[dtype], experts=3), shards=2)
    seen = []
    for number, options in enumerate(
        [("--threads", 1), ("--threads", 3, "--unit-size", "1MiB"), ("--unit-size", "2MiB", "--read-backend", "pread")]
    ):
        ended = cli("analyze", recipe, "--json", "-q", "--cache-dir", tmp_path / f"cache-{number}", *options)
        assert ended.status == 0
        document = ended.document
        assert document.pop("run")["cached"] is False
        seen.append(document)
    assert seen[0] == seen[1] == seen[2]


def test_the_inputs_are_read_at_most_one_and_a_half_times(merge_job: Checkpoints) -> None:
    found = ties_dist.analyze(merge_job(fine_tunes(torch.bfloat16)))
    assert found.run.input_bytes <= found.run.bytes_read <= 1.5 * found.run.input_bytes


def test_the_second_analysis_reads_nothing_until_an_input_changes(merge_job: Checkpoints, tmp_path: Path) -> None:
    recipe = merge_job(fine_tunes(torch.bfloat16, experts=2))
    first, second = ties_dist.analyze(recipe), ties_dist.analyze(recipe)
    assert second.run.cached and second.run.bytes_read == 0
    assert second.experts == first.experts and second.tensors == first.tensors
    os.utime(tmp_path / "expert-0" / "model.safetensors", (1, 1))
    assert not ties_dist.analyze(recipe).run.cached
    assert not ties_dist.analyze(recipe, density=0.3).run.cached


def test_thresholds_of_an_earlier_merge_are_used_and_exact(merge_job: Checkpoints, tmp_path: Path) -> None:
    recipe = merge_job(fine_tunes(torch.float32, experts=2))
    report = ties_dist.merge(recipe, tmp_path / "out", threshold_pass="scan")
    found = ties_dist.analyze(recipe)
    assert found.run.thresholds_from == "cache and sample"
    for expert, merged in zip(found.experts, report.experts, strict=True):
        trim = next(t for t in expert.trims if t.density == 0.2)
        assert trim.exact and (trim.threshold, trim.kept_fraction) == (merged.threshold, merged.kept_fraction)


def test_a_damaged_kept_analysis_is_made_again(merge_job: Checkpoints, statistics_cache: Path) -> None:
    recipe = merge_job(fine_tunes(torch.bfloat16, experts=2))
    first = ties_dist.analyze(recipe)
    for kept in (statistics_cache / "analyses").iterdir():
        kept.write_text(kept.read_text()[:-10])
    again = ties_dist.analyze(recipe)
    assert not again.run.cached and again.experts == first.experts


@pytest.mark.slow
@pytest.mark.alone
def test_peak_memory_stays_within_the_projection(merge_job: Checkpoints) -> None:
    """Inputs of 4 x 120 MB, budget 100 MiB."""
    shapes = {f"layers.{i}.weight": (3000, 4000) for i in range(4)} | {"embed.weight": (24000, 500)}
    recipe = merge_job(random_models(shapes, experts=3, dtype=torch.bfloat16), shards=2)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "ties_dist", "analyze", str(recipe), "--json", "-q", "--read-backend", "pread"),
            *("--memory-budget", "100MiB", "--unit-size", "1MiB"),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    run = json.loads(done.stdout)["run"]
    assert run["peak_rss_bytes"] <= 1.15 * run["projected_bytes"]
    assert run["bytes_read"] <= 1.5 * run["input_bytes"]


# -- what it says -----------------------------------------------------------------------------------------------------


def test_an_unrelated_model_among_the_experts_is_named(merge_job: Checkpoints, cli: Run) -> None:
    models = fine_tunes(torch.float32, experts=2)
    models[2] = random_models(SHAPES, experts=1, seed=5)[0]
    ended = cli("analyze", merge_job(models))
    assert ended.status == 0
    assert "warning: 'expert-1' is probably no fine-tune of 'base'" in ended.out
    assert "'expert-0' is probably no fine-tune" not in ended.out


def test_an_expert_that_dominates_is_named_with_a_weight(merge_job: Checkpoints) -> None:
    models = fine_tunes(torch.float32, experts=3)
    for name, tensor in models[0].items():
        for number, scale in ((1, 1e-2), (3, 1e-2), (2, 1.0)):
            models[number][name] = tensor + (models[number][name] - tensor) * scale
    warnings = ties_dist.analyze(merge_job(models)).warnings
    assert [(w.kind, w.subjects[0]) for w in warnings] == [("dominating", "expert-1")]
    assert re.search(r"100 times .* A `weight` of about 0\.01 ", warnings[0].text)


def test_ties_that_keep_more_than_asked_are_said_on_bf16(merge_job: Checkpoints, cli: Run) -> None:
    draw = torch.Generator().manual_seed(0)
    base = torch.randn(400_000, generator=draw) * 0.02
    models = [{"a.weight": base.bfloat16()}]
    models += [{"a.weight": (base + 1e-4 * torch.randn(base.shape, generator=draw)).bfloat16()} for _ in range(2)]
    recipe = merge_job(models)
    assert "of the entries equal the threshold and all of them are kept" in cli("analyze", recipe).out
    assert {w["kind"] for w in cli("analyze", recipe, "--json").document["warnings"]} == {"ties"}
    cut = merge_job(models, options={"tie_policy": "exact_k"})
    assert cli("analyze", cut, "--json").document["warnings"] == []


def test_an_empty_delta_and_a_twin_are_named(merge_job: Checkpoints) -> None:
    models = fine_tunes(torch.bfloat16, experts=3)
    models[2], models[3] = models[0], models[1]
    warnings = ties_dist.analyze(merge_job(models)).warnings
    assert {(w.kind, w.subjects[0]) for w in warnings if w.kind != "ties"} == {
        ("empty", "expert-1"),
        ("twin", "expert-2"),
    }


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "dare_ties"])
def test_other_methods_with_a_base_are_analysed_too(method: str, merge_job: Checkpoints, cli: Run) -> None:
    parameters = {"density": 0.5} if method == "dare_ties" else {}
    recipe = merge_job(fine_tunes(torch.bfloat16, experts=2), method=method, parameters={"weight": 0.5, **parameters})
    document = cli("analyze", recipe, "--json").document
    assert (document["method"], document["density"]) == (method, 0.2)
    assert cli("analyze", recipe, "--density", "0.4", "--json").document["density"] == 0.4


def test_one_expert_has_no_conflicts(merge_job: Checkpoints, tmp_path: Path, cli: Run) -> None:
    recipe = merge_job(fine_tunes(torch.bfloat16, experts=1))
    ended = cli("analyze", recipe, "--out", tmp_path / "page")
    assert ended.status == 0 and "sign conflicts" not in ended.out.split("kind of weight")[0]
    assert "Between experts" not in (tmp_path / "page" / "report.html").read_text()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_smallest_models_are_analysed_too(size: int, merge_job: Checkpoints, tmp_path: Path) -> None:
    base = torch.arange(1, size + 1, dtype=torch.float32)
    recipe = merge_job([{"a": base}, {"a": base + 0.5}, {"a": base - base / 4}])
    found = ties_dist.analyze(recipe, tmp_path / "page")
    assert (found.elements, found.conflicts[0].counts) == (size, (size,))
    assert found.experts[0].norm == pytest.approx(0.5 * size**0.5)
    assert found.cosines[0][1] == pytest.approx(
        -sum(range(size + 1)) / (size * sum(i * i for i in range(size + 1))) ** 0.5
    )


def test_the_table_shows_layers_and_tensors_when_asked(merge_job: Checkpoints, cli: Run) -> None:
    recipe = merge_job(fine_tunes(torch.bfloat16, experts=2))
    plain, verbose = cli("analyze", recipe), cli("analyze", recipe, "-v")
    assert "mlp.up_proj" in plain.out and "model.layers.1.mlp.up_proj.weight" not in plain.out
    assert "model.layers.1.mlp.up_proj.weight" in verbose.out and "layers.1 " in verbose.out
    assert cli("analyze", recipe, "-q").out == ""


# -- mistakes ---------------------------------------------------------------------------------------------------------


def refused(ended: Outcome, *words: str) -> None:
    assert (ended.status, ended.out) == (2, "")
    assert "Traceback" not in ended.err
    for word in words:
        assert word in ended.err


def test_a_recipe_without_a_base_is_refused(merge_job: Checkpoints, cli: Run) -> None:
    recipe = merge_job(fine_tunes(torch.bfloat16, experts=2), method="linear")
    document = json.loads(recipe.read_text())
    del document["base_model"]
    recipe.write_text(json.dumps(document))
    refused(cli("analyze", recipe), "no `base_model`", "name the experts' base")


def test_nan_is_refused_by_name_before_anything_is_written(merge_job: Checkpoints, tmp_path: Path, cli: Run) -> None:
    models = fine_tunes(torch.float32, experts=2)
    models[2]["model.layers.1.norm.weight"][7] = float("nan")
    refused(cli("analyze", merge_job(models), "--out", tmp_path / "page"), "model.layers.1.norm.weight", "'expert-1'")
    assert contents(tmp_path / "page") == {}


def test_mistakes_on_the_command_line_are_said_without_a_traceback(
    merge_job: Checkpoints, tmp_path: Path, cli: Run
) -> None:
    recipe = merge_job(fine_tunes(torch.bfloat16, experts=2))
    refused(cli("analyze"), "Missing argument 'RECIPE'")
    refused(cli("analyze", tmp_path / "gone.yml"), "gone.yml")
    refused(cli("analyze", recipe, "--density", "1.5"), "--density")
    refused(cli("analyze", recipe, "--density", "0"), "--density")
    (tmp_path / "file").write_text("")
    refused(cli("analyze", recipe, "--out", tmp_path / "file"), "cannot be made", "--out")
    refused(cli("analyze", recipe, "--memory-budget", "1MiB"), "--memory-budget")


# -- interruptions ----------------------------------------------------------------------------------------------------


def stopped(recipe: Path, after: int, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """An analysis on one thread that is told to stop when so many units are counted."""
    stop, counted, add = threading.Event(), [0], Tally.add

    def counting(self: Tally, other: Tally) -> None:
        add(self, other)
        counted[0] += 1
        if counted[0] == after:
            stop.set()

    with monkeypatch.context() as patched:
        patched.setattr(Tally, "add", counting)
        with pytest.raises(ties_dist.StoppedError, match=r"goes on from the counts that are kept"):
            ties_dist.analyze(recipe, threads=1, stop=stop, **{"unit_size": 1 << 20, **options})


@pytest.mark.parametrize("unit_size", [1 << 20, 2 << 20])
@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_an_analysis_that_is_stopped_goes_on_to_the_same_figures(
    dtype: str,
    unit_size: int,
    merge_job: Checkpoints,
    tmp_path: Path,
    statistics_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = merge_job(fine_tunes(DTYPES[dtype]), shards=2)
    undisturbed = ties_dist.analyze(recipe, cache_dir=tmp_path / "other")
    stopped(recipe, 1, monkeypatch)
    stopped(recipe, 1, monkeypatch)
    found = ties_dist.analyze(recipe, unit_size=unit_size)
    spared = (undisturbed.run.bytes_read - found.run.bytes_read) / found.run.input_bytes
    assert 0.25 < spared == pytest.approx(found.run.resumed_fraction, abs=0.01)  # headers are of the output alone
    assert replace(found, run=undisturbed.run) == undisturbed
    assert [p.suffix for p in (statistics_cache / "analyses").iterdir()] == [".json"]
    assert ties_dist.analyze(recipe).run.resumed_fraction == 0


@pytest.mark.parametrize("change", ["cut", "flipped", "foreign", "density", "input", "shards", "dtype"])
def test_counts_that_are_damaged_or_of_something_else_are_not_taken(
    change: str, merge_job: Checkpoints, tmp_path: Path, statistics_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = merge_job(fine_tunes(torch.bfloat16))
    stopped(recipe, 2, monkeypatch)
    (kept,) = (statistics_cache / "analyses").iterdir()
    if change == "cut":
        os.truncate(kept, kept.stat().st_size // 2)
    elif change == "flipped":  # a header of numpy's, on which zip has no check that reading makes
        content = bytearray(kept.read_bytes())
        content[content.index(b"'<i8'") + 1] ^= 2
        kept.write_bytes(content)
    elif change == "foreign":
        np.savez(kept, facts=np.zeros(3))
        kept.with_suffix(".partial.npz").replace(kept)
    elif change == "input":
        os.utime(tmp_path / "expert-0" / "model.safetensors", (1, 1))
    elif change == "dtype":  # byte ranges of other files: of float32
        recipe.write_text(json.dumps(json.loads(recipe.read_text()) | {"dtype": "float32"}))
    options = {"density": {"density": 0.3}, "shards": {"max_shard_size": 1 << 20}}.get(change, {})
    found = ties_dist.analyze(recipe, **options)
    assert found.run.resumed_fraction == 0
    assert found.experts == ties_dist.analyze(recipe, cache_dir=tmp_path / "other", **options).experts
    assert found.experts[0].zeros + sum(found.experts[0].magnitudes.counts) == found.elements


def test_thresholds_that_a_merge_has_proven_since_are_counted_from_the_start(
    merge_job: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On float32 a sample's are not the exact ones, and counts at both do not add up."""
    recipe = merge_job(fine_tunes(torch.float32, experts=2))
    stopped(recipe, 2, monkeypatch)
    ties_dist.merge(recipe, tmp_path / "out", threshold_pass="scan")
    found = ties_dist.analyze(recipe)
    assert found.run.resumed_fraction == 0 and found.run.thresholds_from == "cache and sample"


def test_nan_that_was_counted_before_an_interruption_is_refused_after_it(
    merge_job: Checkpoints, statistics_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = fine_tunes(torch.bfloat16)
    models[2]["model.embed_tokens.weight"][0, 0] = torch.nan
    recipe = merge_job(models)
    stopped(recipe, 1, monkeypatch)
    with pytest.raises(ties_dist.NumericError, match=r"embed_tokens"):
        ties_dist.analyze(recipe)
    assert list((statistics_cache / "analyses").iterdir()) == []


@pytest.mark.slow
def test_an_analysis_that_is_killed_goes_on(merge_job: Checkpoints, tmp_path: Path) -> None:
    recipe = merge_job(fine_tunes(torch.bfloat16), shards=2)
    command = ("analyze", recipe, "--json", "--threads", "1", "--unit-size", "1MiB", "--cache-dir", tmp_path / "cache")
    with Forge() as forge:
        settings = {"ties_dist.storage.snapshot:SNAPSHOT_SECONDS": -1.0}
        die = ("ties_dist.analysis.tally:Tally.add", 3)
        ended = forge.start(*command, log=tmp_path / "killed.log", settings=settings, die=die)
        assert ended.wait() == -signal.SIGKILL
        ended = forge.start(*command, log=tmp_path / "resumed.log")
        assert ended.wait() == 0, ended.log.read_text()
    text = ended.log.read_text()
    found = json.loads(text[text.index("{") :])
    assert found["run"]["resumed_fraction"] > 0.25
    undisturbed = json.loads(ties_dist.analysis.analyzing.to_json(ties_dist.analyze(recipe)))
    del found["run"], undisturbed["run"]
    assert found == undisturbed


def test_a_cache_that_cannot_be_written_is_said_and_stops_nobody(
    merge_job: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("ties_dist.storage.snapshot.SNAPSHOT_SECONDS", -1.0)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "analyses").write_text("a file where a folder should be")
    found = ties_dist.analyze(merge_job(fine_tunes(torch.float32)), cache_dir=tmp_path / "cache", unit_size=1 << 20)
    assert found.experts and caplog.text.count("cannot keep counts") == 1


def test_without_the_charting_library_only_the_page_is_refused(
    merge_job: Checkpoints, tmp_path: Path, cli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = merge_job(fine_tunes(torch.bfloat16, experts=2))
    import importlib.util

    known = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "matplotlib" else known(name, *more)
    )
    refused(cli("analyze", recipe, "--out", tmp_path / "page"), "pip install 'ties-dist[report]'")
    assert not (tmp_path / "page").exists()
    assert cli("analyze", recipe).status == 0 and cli("analyze", recipe, "--json").document["elements"]


# -- the page ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def page(merge_job: Checkpoints, tmp_path: Path, cli: Run) -> Path:
    """Of eight experts with long names, some of which do not belong here."""
    models = fine_tunes(torch.bfloat16, experts=8)
    models[8] = random_models(SHAPES, experts=1, seed=9, dtype=torch.bfloat16)[0]
    recipe = merge_job(models)
    document = json.loads(recipe.read_text())
    for i, entry in enumerate(document["models"]):
        name = f"a-fine-tune-with-a-long-name-and-<b>markup</b>-{i}".replace("/", "")
        (tmp_path / entry["model"]).rename(tmp_path / name)
        entry["model"] = name
    recipe.write_text(json.dumps(document))
    assert cli("analyze", recipe, "--out", tmp_path / "page", "-q").status == 0
    return tmp_path / "page" / "report.html"


def test_the_page_needs_nothing_else(page: Path) -> None:
    text = page.read_text()
    assert not re.search(r"https?:|//\w|<script|@import|url\((?!#)", text)
    assert re.findall(r'(?:src|href)="?([^"\s>]*)', re.sub(r'xlink:href="#[^"]*"', "", text)) == ["data:,"]
    assert len(text.encode()) < 2 << 20
    assert "<b>markup" not in text and "&lt;b&gt;markup" in text
    assert sorted(p.name for p in page.parent.iterdir()) == ["analysis.json", "report.html"]
    assert json.loads((page.parent / "analysis.json").read_text())["elements"] == sum(map(np.prod, SHAPES.values()))


MEASURE = """
<!doctype html><meta charset=utf-8><body><script>
const text = %s, widths = [390, 1280];
Promise.all(widths.map(width => new Promise(done => {
  const frame = document.createElement("iframe");
  frame.style.cssText = `width:${width}px;height:900px;border:0`;
  frame.onload = () => {
    const page = frame.contentDocument, root = page.documentElement, view = frame.contentWindow;
    for (const closed of page.querySelectorAll("details")) closed.open = true;
    const over = [...page.querySelectorAll("body *")].filter(
      e => !e.closest("svg") && e.getBoundingClientRect().right > view.innerWidth + 1 && !e.closest(".scroll table"));
    const drawn = [...page.querySelectorAll("svg")].map(svg => svg.getBoundingClientRect());
    done({
      width: view.innerWidth, scroll: root.scrollWidth, over: over.map(e => e.outerHTML.slice(0, 80)),
      charts: drawn.length, narrowest: Math.min(...drawn.map(r => r.width)),
      text: Math.min(...[...page.querySelectorAll("svg text")].map(t => t.getBoundingClientRect().height)),
      title: page.querySelector("h1").innerText,
    });
  };
  frame.srcdoc = text;
  document.body.append(frame);
}))).then(found => { document.body.innerHTML = "<pre>MEASURED" + JSON.stringify(found) + "DONE</pre>"; });
</script>
"""


@pytest.mark.slow
def test_the_page_reads_well_in_a_browser_at_phone_and_desktop_width(page: Path, tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    wrapper = tmp_path / "wrapper.html"
    wrapper.write_text(MEASURE % json.dumps(page.read_text()).replace("</", "<\\/"))
    done = subprocess.run(
        [
            *(browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"),
            *(f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,1000", "--virtual-time-budget=20000"),
            *("--dump-dom", wrapper.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    measured = re.search(r"MEASURED(.*)DONE", done.stdout)
    assert measured, done.stderr
    for found in json.loads(measured[1]):
        assert found["scroll"] <= found["width"] and found["over"] == []
        assert found["charts"] == 10 and found["narrowest"] >= 300
        assert found["text"] >= 8
        assert found["title"] == "8 experts of base"


def test_the_same_analysis_is_the_same_page(page: Path) -> None:
    from ties_dist.analysis.analyzing import to_json
    from ties_dist.analysis.page import page as build

    found = ties_dist.analyze(page.parent.parent / "recipe.yml")
    assert build(found) == build(found) == page.read_text()
    assert json.loads(to_json(found))["warnings"]
    assert any(w.kind == "unrelated" for w in found.warnings)
