"""A sweep's outputs are those of their own merges, from one read; whatever stops it, the same command goes on."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import ties_dist
from tests.conftest import Checkpoints, random_models
from tests.drills.jobs import late_majority, write_job
from ties_dist.errors import OutputError, RecipeError, StoppedError
from ties_dist.storage.local import LocalWriter
from ties_dist.sweeping.sweeping import parse_values, variants
from ties_dist.worker.merging import MergeStep

MIB = 1 << 20
SHAPES = {f"layers.{i}.weight": (700, 901) for i in range(4)} | {"norm.weight": (701,)}


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0.2", [0.2]),
        ("0.1,0.2,0.3", [0.1, 0.2, 0.3]),
        ("0.8:1.6:0.2", [0.8, 1.0, 1.2, 1.4, 1.6]),
        ("0.1:0.25:0.1", [0.1, 0.2]),
        ("1, 0.5:1:0.25", [1.0, 0.5, 0.75]),
        ("1:1:1", [1.0]),
    ],
)
def test_values_are_numbers_and_ranges_with_both_ends(text: str, values: list[float]) -> None:
    assert parse_values(text, "lambda") == values


@pytest.mark.parametrize("text", ["", "a", "1:2", "1:2:0", "2:1:0.1", "0:1:0.001", "nan", "1:inf:1", "0.1,,0.2"])
def test_what_is_no_value_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="--lambda"):
        parse_values(text, "lambda")


def test_too_many_outputs_and_none_are_refused() -> None:
    assert len(variants({"density": [0.1, 0.2], "lambda": [1.0, 2.0, 3.0]})) == 6
    for values in ({"density": [], "lambda": []}, {"density": [i / 100 for i in range(1, 10)], "lambda": range(1, 9)}):
        with pytest.raises(RecipeError, match="1 to 64 outputs"):
            variants(values)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="too close"):
        variants({"density": [0.1, 0.10000001], "lambda": []})


def own_merges(recipe: Path, folder: Path, values: list[dict[str, float]], **options: Any) -> list[str]:
    """Digests of ordinary merges of the same recipe with these parameters in it."""
    document, digests = json.loads(recipe.read_text()), []
    for i, chosen in enumerate(values):
        path = recipe.parent / f"own-{i}.yml"
        path.write_text(json.dumps(document | {"parameters": document["parameters"] | chosen}))
        report = ties_dist.merge(path, folder / str(i), cache_dir=folder / f"cache-{i}", unit_size=MIB, **options)
        digests.append(report.output_digest)
    return digests


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("options", [{}, {"tie_policy": "exact_k"}, {"trim_scope": "tensor"}], ids=str)
def test_every_output_is_that_of_its_own_merge(
    dtype: torch.dtype, options: dict[str, str], merge_job: Checkpoints, tmp_path: Path
) -> None:
    recipe = merge_job(random_models(SHAPES, experts=3, dtype=dtype), options=options)
    values = [{"density": d, "lambda": m} for d in (0.1, 0.3) for m in (1.0, 1.5)]
    expected = own_merges(recipe, tmp_path / "own", values)
    done = ties_dist.sweep(
        recipe, tmp_path / "out", density=[0.1, 0.3], lam=[1.0, 1.5], cache_dir=tmp_path / "cache", unit_size=MIB
    )
    assert [s.report.output_digest for s in done] == expected
    assert len(set(expected)) == 4
    assert [s.path.name for s in done] == [
        "density-0.1_lambda-1", "density-0.1_lambda-1.5", "density-0.3_lambda-1", "density-0.3_lambda-1.5",
    ]  # fmt: skip
    assert all((s.path / "model.safetensors").is_file() for s in done)


def test_the_inputs_are_read_once_for_all(merge_job: Checkpoints, tmp_path: Path) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        (tmp_path / str(dtype)).mkdir()
        models = random_models(SHAPES, experts=3, dtype=dtype)
        recipe = write_job(tmp_path / str(dtype), models, density=0.2)
        size = sum(t.numel() * t.element_size() for model in models for t in model.values())
        one = ties_dist.merge(recipe, tmp_path / f"one-{dtype}", cache_dir=tmp_path / f"c-{dtype}", unit_size=MIB)
        done = ties_dist.sweep(
            recipe, tmp_path / f"out-{dtype}", density=[0.1, 0.2, 0.3], cache_dir=tmp_path / f"cache-{dtype}",
            unit_size=MIB,
        )  # fmt: skip
        samples = 4 * 1024 * 2048 * dtype.itemsize  # at most, of four models
        read = sum(s.report.bytes_read - s.report.redone_units * 4 * MIB for s in done)
        assert read <= one.bytes_read + 3 * samples
        scans = [s.report.thresholds_from for s in done]
        assert scans == (["sample"] * 3 if dtype == torch.bfloat16 else ["scan", "cache", "cache"])
        assert size <= read


def test_a_model_with_a_density_of_its_own_is_refused(merge_job: Checkpoints, tmp_path: Path) -> None:
    recipe = merge_job(random_models({"a.weight": (30, 10)}, experts=2))
    document = json.loads(recipe.read_text())
    document["models"][1]["parameters"] = {"density": 0.5}
    recipe.write_text(json.dumps(document))
    with pytest.raises(RecipeError, match=r"models\[1\] sets density itself"):
        ties_dist.sweep(recipe, tmp_path / "out", density=[0.1, 0.2])
    assert len(ties_dist.sweep(recipe, tmp_path / "out", lam=[1.0, 2.0])) == 2


def test_a_slice_with_a_lambda_of_its_own_is_refused(merge_job: Checkpoints, tmp_path: Path) -> None:
    document = json.loads(merge_job(random_models({"a.weight": (30, 10)}, experts=1)).read_text())
    sources = [{"model": "expert-0", "layer_range": [0, 2]}]
    document["slices"] = [{"sources": sources, "parameters": {"lambda": 2}}]
    (tmp_path / "slices.yml").write_text(json.dumps(document | {"models": None}))
    with pytest.raises(RecipeError, match=r"slices\[0\]\.parameters sets lambda itself"):
        ties_dist.sweep(tmp_path / "slices.yml", tmp_path / "out", lam=[1.0, 2.0])


def test_a_stopped_sweep_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ties_dist.engine.passes.COMMIT_SECONDS", -1.0)
    recipe, out = write_job(tmp_path, late_majority(6 * 9 * 64 * 4608)), tmp_path / "out"
    values = [{"lambda": 0.5}, {"lambda": 1.0}, {"lambda": 2.0}]
    expected = own_merges(recipe, tmp_path / "own", values)
    stop, calls, write = threading.Event(), [0], LocalWriter.write

    def stopping(self: LocalWriter, *arguments: Any) -> None:
        calls[0] += 1
        if calls[0] == 10:
            stop.set()
        write(self, *arguments)

    with monkeypatch.context() as patched, pytest.raises(StoppedError, match="Run the same command again"):
        patched.setattr(LocalWriter, "write", stopping)
        ties_dist.sweep(recipe, out, lam=[0.5, 1.0, 2.0], unit_size=MIB, stop=stop)
    assert not list(out.glob("*/*.safetensors"))
    done = ties_dist.sweep(recipe, out, lam=[0.5, 1.0, 2.0], unit_size=MIB)
    assert [s.report.output_digest for s in done] == expected
    assert sum(s.report.resumed_units for s in done) >= 3
    again = ties_dist.sweep(recipe, out, lam=[0.5, 1.0, 2.0, 3.0], unit_size=MIB)  # one more: the others are there
    assert [s.report.already_done for s in again] == [True, True, True, False]


def test_a_failing_output_is_named_and_the_rest_can_be_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, out = write_job(tmp_path, late_majority(9 * 64 * 4608)), tmp_path / "out"
    write = LocalWriter.write

    def failing(self: LocalWriter, name: str, start: int, block: memoryview) -> None:
        if "lambda-2" in str(self.root) and start >= 2 * MIB:
            raise OutputError("the disk is full")
        write(self, name, start, block)

    with monkeypatch.context() as patched, pytest.raises(OutputError, match="lambda-2: the disk is full"):
        patched.setattr(LocalWriter, "write", failing)
        ties_dist.sweep(recipe, out, lam=[1.0, 2.0], unit_size=MIB)
    done = ties_dist.sweep(recipe, out, lam=[1.0, 2.0], unit_size=MIB)
    assert [s.report.output_digest for s in done] == own_merges(
        recipe, tmp_path / "own", [{"lambda": 1.0}, {"lambda": 2.0}]
    )


def test_a_unit_is_loaded_once_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, calls = write_job(tmp_path, late_majority(9 * 64 * 4608)), {"load": 0, "compute": 0}
    load, compute = MergeStep.load, MergeStep.compute

    def counted_load(self: MergeStep, *arguments: Any) -> Any:
        calls["load"] += 1
        return load(self, *arguments)

    def counted_compute(self: MergeStep, *arguments: Any) -> Any:
        calls["compute"] += 1
        return compute(self, *arguments)

    monkeypatch.setattr(MergeStep, "load", counted_load)
    monkeypatch.setattr(MergeStep, "compute", counted_compute)
    monkeypatch.setattr("ties_dist.engine.passes.SIGNS_FROM", 1e9)
    done = ties_dist.sweep(recipe, tmp_path / "out", lam=[1.0, 2.0, 3.0], unit_size=MIB, cache_dir=tmp_path / "c")
    units, redone = done[0].report.units, [s.report.redone_units for s in done]
    assert redone[0] > 0 and len(set(redone)) == 1
    assert calls == {"load": units + redone[0], "compute": 3 * (units + redone[0])}


@pytest.mark.slow
def test_the_command_prints_a_row_for_each_output(merge_job: Checkpoints, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from ties_dist.cli.commands import cli

    recipe = merge_job(random_models({"a.weight": (300, 100)}, experts=2))
    arguments = ["sweep", str(recipe), str(tmp_path / "out"), "--density", "0.1:0.3:0.1"]
    ended = CliRunner().invoke(cli, [*arguments, "--json"])
    assert ended.exit_code == 0, ended.output
    documents = json.loads(ended.stdout)
    assert [d["values"] for d in documents] == [{"density": 0.1}, {"density": 0.2}, {"density": 0.3}]
    said = CliRunner().invoke(cli, arguments).stdout
    assert all(d["report"]["output_digest"][:16] in said for d in documents)
    assert "3 outputs, 3 of them there already" in said
