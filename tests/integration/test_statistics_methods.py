"""Fisher merging and RegMean against closed forms in float64: out of core, in any cut, resumed, with wrong stores."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import ties_dist
from tests.conftest import random_models, write_checkpoint
from tests.integration.command import run
from ties_dist.errors import CheckpointError, NumericError, PlanError, RecipeError, StoppedError
from ties_dist.executors.local import LocalExecutor
from ties_dist.inputs.opening import identify
from ties_dist.statistics.collected import ExpertStatistics, Kind, Origin
from ties_dist.storage.readers import open_reader
from ties_dist.worker.operations import SolveMatrix

SHAPES = {
    "embed.weight": (50, 24),
    "layers.0.up.weight": (40, 24),
    "layers.0.up.bias": (40,),
    "layers.1.down.weight": (24, 40),
    "norm.weight": (24,),
    "scalar": (1,),
}
LINEAR = ("layers.0.up.weight", "layers.1.down.weight")
Arrays = Mapping[str, np.ndarray]


def identity_of(checkpoint: Path) -> str:
    from ties_dist.checkpoints.catalogue import open_checkpoint

    return identify(open_checkpoint(checkpoint, name="it", reader=open_reader))


def write_store(path: Path, kind: Kind, checkpoint: Path, arrays: Arrays, **how: int) -> Path:
    """how: of each array, `rows` or `transposed`."""
    origin = Origin(kind=kind, checkpoint=identity_of(checkpoint), calibration="some", examples=3)
    store = ExpertStatistics(path, origin)
    store.create()
    for name, values in arrays.items():
        store.add(name, values, **how)
    store.finish()
    return path


def fishers(experts: int, *, seed: int = 1) -> list[dict[str, np.ndarray]]:
    draw = np.random.default_rng(seed)
    return [
        {name: (draw.normal(size=shape) ** 2 * 1e-6).astype(np.float32) for name, shape in SHAPES.items()}
        for _ in range(experts)
    ]


def grams(experts: int, *, dead: int | None = None, seed: int = 2) -> list[dict[str, np.ndarray]]:
    """X^T X of random inputs that are correlated; input `dead` is always zero."""
    draw = np.random.default_rng(seed)
    found = []
    for _ in range(experts):
        found.append({})
        for name in LINEAR:
            inputs = SHAPES[name][1]
            x = draw.normal(size=(3 * inputs, inputs)) @ draw.normal(size=(inputs, inputs)) / np.sqrt(inputs)
            if dead is not None:
                x[:, dead] = 0
            found[-1][name] = (x.T @ x).astype(np.float32)
    return found


def write_recipe(
    root: Path, method: str, models: list[dict[str, torch.Tensor]], stores: list[Arrays], **more: Any
) -> Path:
    """models: experts alone; the base is not needed."""
    entries = []
    kind: Kind = "fisher" if method == "fisher" else "gram"
    weights = more.pop("weights", [1.0] * len(models))
    rows = more.pop("rows", [0] * len(models))
    for i, (model, arrays, weight) in enumerate(zip(models, stores, weights, strict=True)):
        folder = write_checkpoint(root / f"m{i}", model, shards=2)
        write_store(root / f"s{i}", kind, folder, arrays, rows=rows[i])
        entries.append({"model": f"m{i}", "statistics": f"s{i}", "parameters": {"weight": weight}})
    path = root / "recipe.yml"
    path.write_text(json.dumps({"merge_method": method, "models": entries, **more}))
    return path


def merged(out: Path) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for file in out.glob("*.safetensors"):
        found |= {name: tensor.double().numpy() for name, tensor in load_file(file).items()}
    return found


def doubles(model: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.double().numpy() for name, tensor in model.items()}


@pytest.mark.parametrize("kernel", ["compiled", "eager"])
def test_fisher_equals_its_closed_form(kernel: str, tmp_path: Path) -> None:
    models = random_models(SHAPES, experts=3)[1:]
    stores, weights = fishers(3), [1.0, 0.5, 2.0]
    stores[0]["norm.weight"][:5] = stores[1]["norm.weight"][:5] = stores[2]["norm.weight"][:5] = 0
    recipe = write_recipe(tmp_path, "fisher", models, stores, weights=weights)
    report = ties_dist.merge(recipe, tmp_path / "out", kernel=kernel)  # type: ignore[arg-type]
    found, theta = merged(tmp_path / "out"), [doubles(m) for m in models]
    for name in SHAPES:
        above = sum(w * f[name].astype(np.float64) * t[name] for w, f, t in zip(weights, stores, theta, strict=True))
        below = sum(w * f[name].astype(np.float64) for w, f in zip(weights, stores, strict=True))
        mean = sum(w * t[name] for w, t in zip(weights, theta, strict=True)) / sum(weights)
        expected = np.where(below > 1e-20, above / np.where(below > 0, below, 1), mean)
        np.testing.assert_allclose(found[name], expected, rtol=2e-6, atol=1e-9)
    assert any("0.16% of the entries have no Fisher information" in note for note in report.notes)  # 5 of 3,185


def test_a_fisher_that_is_the_same_everywhere_gives_the_mean(tmp_path: Path) -> None:
    models = random_models(SHAPES, experts=2)[1:]
    ones = [{name: np.ones(shape, np.float32) for name, shape in SHAPES.items()} for _ in models]
    ties_dist.merge(write_recipe(tmp_path, "fisher", models, ones), tmp_path / "out")
    for name, values in merged(tmp_path / "out").items():
        np.testing.assert_allclose(values, (models[0][name] + models[1][name]).double() / 2, rtol=1e-6)


def closed_form(grams: list[np.ndarray], weights: list[np.ndarray], alpha: float, shares: list[float]) -> np.ndarray:
    """Equation 2 of the paper by numpy's solver; weights (out, in)."""
    scaled = []
    for gram, share in zip(grams, shares, strict=True):
        wide = gram.astype(np.float64) * share
        scaled.append(alpha * wide + (1 - alpha) * np.diag(np.diag(wide)))
    right = sum(g @ w.T for g, w in zip(scaled, weights, strict=True))
    return np.linalg.solve(sum(scaled), right).T


@pytest.mark.parametrize("alpha", [0.9, 0.1, 0.0])
def test_regmean_equals_its_closed_form(alpha: float, tmp_path: Path) -> None:
    models, stores, weights = random_models(SHAPES, experts=3)[1:], grams(3), [1.0, 0.5, 2.0]
    recipe = write_recipe(tmp_path, "regmean", models, stores, weights=weights, parameters={"alpha": alpha})
    ties_dist.merge(recipe, tmp_path / "out")
    found, theta = merged(tmp_path / "out"), [doubles(m) for m in models]
    for name in LINEAR:
        expected = closed_form([s[name] for s in stores], [t[name] for t in theta], alpha, weights)
        np.testing.assert_allclose(found[name], expected, rtol=1e-6, atol=1e-8)
    for name in SHAPES.keys() - set(LINEAR):
        mean = sum(w * t[name] for w, t in zip(weights, theta, strict=True)) / sum(weights)
        np.testing.assert_allclose(found[name], mean, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("gram", ["mean", "sum", None])
def test_a_gram_matrix_is_divided_by_its_rows_unless_told(gram: str | None, tmp_path: Path) -> None:
    """The authors' code keeps X^T X / rows, so that one expert's longer texts do not outweigh the others."""
    models, stores, rows = random_models(SHAPES, experts=3)[1:], grams(3), [1000, 40, 0]
    stores[2] = {name: np.zeros_like(values) for name, values in stores[2].items()}  # its layers saw nothing
    more = {"ties_dist": {"gram": gram}} if gram else {}
    recipe = write_recipe(tmp_path, "regmean", models, stores, weights=[1.0, 0.5, 2.0], rows=rows, **more)
    ties_dist.merge(recipe, tmp_path / "out")
    shares = [1.0, 0.5, 0.0] if gram == "sum" else [1 / 1000, 0.5 / 40, 0.0]
    for name in LINEAR:
        weights = [doubles(m)[name] for m in models]
        expected = closed_form([s[name] for s in stores], weights, 0.9, shares)
        np.testing.assert_allclose(merged(tmp_path / "out")[name], expected, rtol=1e-6, atol=1e-8)


def test_how_grams_are_summed_is_part_of_the_merge(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, "regmean", random_models(SHAPES, experts=2)[1:], grams(2), rows=[3, 4])
    given, known = json.loads(recipe.read_text()), set()
    for option in ({}, {"gram": "mean"}, {"gram": "sum"}):
        recipe.write_text(json.dumps({**given, "ties_dist": option}))
        known.add(ties_dist.plan(recipe).fingerprint)
    recipe.write_text(json.dumps(given))
    shutil.rmtree(tmp_path / "s1")
    write_store(tmp_path / "s1", "gram", tmp_path / "m1", grams(2)[1], rows=5)
    assert len(known) == 2 and ties_dist.plan(recipe).fingerprint not in known


def test_an_input_that_was_always_zero_takes_the_mean(tmp_path: Path) -> None:
    models, stores = random_models(SHAPES, experts=2)[1:], grams(2, dead=7)
    recipe = write_recipe(tmp_path, "regmean", models, stores, weights=[1.0, 3.0])
    ties_dist.merge(recipe, tmp_path / "out")
    found, name = merged(tmp_path / "out"), LINEAR[0]
    live = [i for i in range(24) if i != 7]
    expected = closed_form(
        [s[name][np.ix_(live, live)] for s in stores], [doubles(m)[name][:, live] for m in models], 0.9, [1.0, 3.0]
    )
    np.testing.assert_allclose(found[name][:, live], expected, rtol=1e-6, atol=1e-8)
    mean = (doubles(models[0])[name][:, 7] + 3 * doubles(models[1])[name][:, 7]) / 4
    np.testing.assert_allclose(found[name][:, 7], mean, rtol=1e-6)


def test_a_singular_sum_takes_the_mean_and_says_so(tmp_path: Path) -> None:
    models = random_models(SHAPES, experts=2)[1:]
    singular = {name: np.ones((SHAPES[name][1],) * 2, np.float32) for name in LINEAR}
    recipe = write_recipe(tmp_path, "regmean", models, [singular, singular], parameters={"alpha": 1.0})
    report = ties_dist.merge(recipe, tmp_path / "out")
    for name, values in merged(tmp_path / "out").items():
        np.testing.assert_allclose(values, (models[0][name] + models[1][name]).double() / 2, rtol=1e-6)
    assert any("2 matrices had no solution" in note for note in report.notes)


def test_a_weight_that_is_stored_by_inputs_is_merged_as_its_transpose(tmp_path: Path) -> None:
    """GPT-2's Conv1D: (in, out)."""
    models, stores = random_models(SHAPES, experts=2)[1:], grams(2)
    plain, other = tmp_path / "plain", tmp_path / "other"
    ties_dist.merge(write_recipe(plain, "regmean", models, stores), plain / "out")
    turned = [{n: t.T.contiguous() if n in LINEAR else t for n, t in m.items()} for m in models]
    recipe = write_recipe(other, "regmean", turned, stores)
    for i in range(2):
        write_store(other / f"s{i}", "gram", other / f"m{i}", stores[i], transposed=True)
    ties_dist.merge(recipe, other / "out")
    one, two = merged(plain / "out"), merged(other / "out")
    for name in LINEAR:
        assert (two[name] == one[name].T).all()


@pytest.mark.parametrize("method", ["fisher", "regmean"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_bytes_do_not_depend_on_how_the_work_is_cut(
    method: str, dtype: torch.dtype, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shapes = {"a.weight": (1100, 600), "b.weight": (600, 1100), "c": (700, 900)}
    models = random_models(shapes, experts=2, dtype=dtype)[1:]
    draw = np.random.default_rng(0)
    if method == "fisher":
        stores = [{n: draw.random(s, np.float32) for n, s in shapes.items()} for _ in models]
    else:
        stores = []
        for _ in models:
            x = draw.normal(size=(700, 600)).astype(np.float32)
            stores.append({"a.weight": x.T @ x})
    recipe = write_recipe(tmp_path, method, models, stores)
    digests = set()
    for i, (threads, unit, kernel) in enumerate([(1, 1 << 20, "auto"), (2, 2 << 20, "eager"), (2, 16 << 20, "auto")]):
        report = ties_dist.merge(recipe, tmp_path / f"out{i}", threads=threads, unit_size=unit, kernel=kernel)  # type: ignore[arg-type]
        digests.add(report.output_digest)
        assert run(capsys, "verify", tmp_path / f"out{i}", "--sample", "1").status == 0
    assert len(digests) == 1


def test_merged_matrices_are_taken_over_by_the_next_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = {f"l{i}.weight": (300, 300) for i in range(4)}
    models = random_models(shapes, experts=2)[1:]
    draw = np.random.default_rng(0)
    stores = []
    for _ in models:
        x = draw.normal(size=(400, 300)).astype(np.float32)
        stores.append({name: x.T @ x for name in shapes})
    recipe = write_recipe(tmp_path, "regmean", models, stores)
    expected = ties_dist.merge(recipe, tmp_path / "whole").output_digest
    stop = threading.Event()
    solved: list[str] = []
    real = SolveMatrix.__call__

    def counted(self: SolveMatrix, step: Any, tensor: str) -> Any:
        if not step.matrices.intact(tensor):
            solved.append(tensor)
        found = real(self, step, tensor)
        if len(solved) == 2:
            stop.set()
        return found

    monkeypatch.setattr(SolveMatrix, "__call__", counted)
    monkeypatch.setattr(LocalExecutor, "window", 1)
    with pytest.raises(StoppedError, match="everything finished is kept"):
        ties_dist.merge(recipe, tmp_path / "out", threads=1, stop=stop)
    first = len(solved)
    folder = next((tmp_path / "out" / ".ties_dist").glob("*/matrices"))
    damaged = sorted(folder.glob("*.bytes"))[0]
    damaged.write_bytes(b"?" + damaged.read_bytes()[1:])
    assert ties_dist.merge(recipe, tmp_path / "out", threads=1).output_digest == expected
    assert len(solved) == len(shapes) + 1, (first, solved)  # the damaged one twice


def test_a_store_of_another_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = random_models(SHAPES, experts=2)[1:]
    recipe = write_recipe(tmp_path, "fisher", models, fishers(2))
    write_checkpoint(tmp_path / "m1", random_models(SHAPES, experts=1, seed=5)[1], shards=2)
    with pytest.raises(CheckpointError, match=r"s1 was collected from another checkpoint than 'm1', or 'm1' was chang"):
        ties_dist.plan(recipe)
    shown = run(capsys, "merge", recipe, tmp_path / "out")
    assert shown.status == 2 and "ties-dist collect fisher m1" in shown.err and "Traceback" not in shown.err


def test_what_is_wrong_with_stores_is_said(tmp_path: Path) -> None:
    models = random_models(SHAPES, experts=2)[1:]
    recipe = write_recipe(tmp_path, "fisher", models, fishers(2))
    document = json.loads(recipe.read_text())
    document["models"][0].pop("statistics")
    document["models"][1]["statistics"] = "nowhere/at/all"
    missing = r"models\[0\]\.statistics: missing; fisher needs a store made by `ties-dist collect fisher m0"
    with pytest.raises(RecipeError, match=rf"(?s){missing}.*models\[1\]\.statistics"):
        ties_dist.plan(json.dumps(document) + "\n")
    with pytest.raises(RecipeError, match="linear needs no statistics"):
        ties_dist.plan(json.dumps({**json.loads(recipe.read_text()), "merge_method": "linear"}) + "\n")
    (tmp_path / "regmean.yml").write_text(json.dumps({**json.loads(recipe.read_text()), "merge_method": "regmean"}))
    with pytest.raises(CheckpointError, match="holds fisher statistics, gram is needed"):
        ties_dist.plan(tmp_path / "regmean.yml")
    store = ExpertStatistics.open(tmp_path / "s0")
    store.finished = False
    store._save()
    with pytest.raises(CheckpointError, match=r"s0 is not finished \(6 arrays so far\)"):
        ties_dist.plan(recipe)
    (tmp_path / "s0" / "zarr.json").unlink()
    with pytest.raises(CheckpointError, match=r"s0"):
        ties_dist.plan(recipe)


WIDE = {"a.weight": (1100, 1000), "b.weight": (1100, 1000)}
"""Two chunks each, of which the second is not full."""
DAMAGE = {
    "lost": (lambda chunks: chunks[1].unlink(), r"chunk 1 of a\.weight is lost"),
    "flipped": (lambda chunks: flip(chunks[1], 100), r"chunk 1 of a\.weight cannot be read: .*checksum"),
    "flipped behind the end": (lambda chunks: flip(chunks[1], -9), r"chunk 1 of a\.weight cannot be read: .*checksum"),
    "cut short": (lambda chunks: os.truncate(chunks[0], 5000), r"chunk 0 of a\.weight cannot be read"),
    "emptied": (lambda chunks: os.truncate(chunks[0], 0), r"chunk 0 of a\.weight cannot be read"),
    "another array's": (
        lambda chunks: shutil.copy(chunks[0].parents[2] / "b.weight" / "c" / "0", chunks[0]),
        r"chunk 0 of a\.weight is not what was written",
    ),
    "another array": (
        lambda chunks: shutil.copytree(chunks[0].parents[2] / "b.weight", chunks[0].parents[1], dirs_exist_ok=True),
        r"a\.weight is not what was written",
    ),
    "lost array": (lambda chunks: shutil.rmtree(chunks[0].parents[1]), r"a\.weight is lost"),
    "damaged array": (
        lambda chunks: (chunks[0].parents[1] / "zarr.json").write_text("{}"),
        r"a\.weight cannot be opened",
    ),
}


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 64
    file.write_bytes(content)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_store_is_refused_with_how_to_collect_it_again(damage: str, tmp_path: Path) -> None:
    """A lost or flipped chunk used to read as zeros, or as other numbers: exit 0."""
    draw = np.random.default_rng(0)
    stores = [{name: draw.random(shape, np.float32) for name, shape in WIDE.items()} for _ in range(2)]
    recipe = write_recipe(tmp_path, "fisher", random_models(WIDE, experts=2)[1:], stores)
    do, said = DAMAGE[damage]
    do(sorted((tmp_path / "s1" / "a.weight" / "c").iterdir()))
    remedy = r"Collect it again with `ties-dist collect fisher CHECKPOINT --data FILE.jsonl --out \S+/s1 --fresh`"
    with pytest.raises(CheckpointError, match=rf"s1: {said}.*\. {remedy}"):
        ties_dist.merge(recipe, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))
    with pytest.raises(CheckpointError, match=said):
        ExpertStatistics.open(tmp_path / "s1").read("a.weight")


def test_a_damaged_gram_matrix_is_refused(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, "regmean", random_models(SHAPES, experts=2)[1:], grams(2), rows=[5, 5])
    (tmp_path / "s0" / LINEAR[1] / "c" / "0").unlink()
    with pytest.raises(CheckpointError, match=r"chunk 0 of layers.1.down.weight is lost.*ties-dist collect gram"):
        ties_dist.merge(recipe, tmp_path / "out")


def test_a_store_of_the_first_format_is_named_with_what_to_do(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, "fisher", random_models(SHAPES, experts=2)[1:], fishers(2))
    for i in range(2):
        group = json.loads((tmp_path / f"s{i}" / "zarr.json").read_text())
        group["attributes"]["ties_dist"]["origin"]["version"] = 1 + 2 * i
        (tmp_path / f"s{i}" / "zarr.json").write_text(json.dumps(group))
    first = "s0 is a store of format 1, and 2 is needed: a lost or damaged part of it would read as zeros. Collect it"
    with pytest.raises(CheckpointError, match=rf"(?s){first} again.*--out \S+/s0 --fresh`.*s1 is a store of format 3"):
        ties_dist.plan(recipe)


def test_a_fisher_of_other_shapes_is_refused(tmp_path: Path) -> None:
    stores = fishers(2)
    stores[1]["norm.weight"] = stores[1]["norm.weight"][:-1]
    del stores[0]["scalar"]
    recipe = write_recipe(tmp_path, "fisher", random_models(SHAPES, experts=2)[1:], stores)
    other, missing = r"norm\.weight: model 'fisher of m1' has shape \(23,\)", "missing in model 'fisher of m0'"
    with pytest.raises(CheckpointError, match=f"(?s)(?=.*{other}).*{missing}"):
        ties_dist.plan(recipe)


def test_a_matrix_that_does_not_fit_the_budget_is_refused_with_the_numbers(tmp_path: Path) -> None:
    shapes = {"wide.weight": (8, 3000)}
    stores = [{"wide.weight": np.eye(3000, dtype=np.float32)} for _ in range(2)]
    recipe = write_recipe(tmp_path, "regmean", random_models(shapes, experts=2)[1:], stores)
    with pytest.raises(
        PlanError, match=r"'wide.weight' \(8 x 3,000\) is merged whole and needs 13\d\.\dMiB per worker"
    ):
        ties_dist.plan(recipe, memory_budget=64 << 20, threads=1)
    assert ties_dist.plan(recipe, memory_budget=160 << 20, threads=1).projected_bytes > 137 << 20


@pytest.mark.parametrize("where", ["weight", "gram"])
def test_numbers_that_are_not_finite_are_found(where: str, tmp_path: Path) -> None:
    models, stores = random_models(SHAPES, experts=2)[1:], grams(2)
    if where == "weight":
        models[1][LINEAR[0]][0, 0] = torch.nan
    else:
        stores[1][LINEAR[0]][3, 3] = np.inf
    with pytest.raises(NumericError, match=r"layers.0.up.weight: 1 NaN or Inf in 'm1' or its Gram matrix"):
        ties_dist.merge(write_recipe(tmp_path, "regmean", models, stores), tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))
