"""`ties-dist check` as a person runs it, and what only the models can tell of a slice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import ties_dist
from tests.conftest import Checkpoints, random_models
from tests.integration.command import run
from ties_dist.errors import RecipeError

RECIPE = """
merge_method: task_arithmetic
base_model: org/base
models: [{model: ./math, parameters: {weight: [0, 1]}}]
"""
TENSOR = "model.layers.1.mlp.weight"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "recipe.yml").write_text(RECIPE)
    return tmp_path / "recipe.yml"


def test_a_valid_recipe_ends_with_0_and_needs_no_model(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = run(capsys, "check", recipe, "--tensor", TENSOR)
    assert (told.status, told.err) == (0, "")
    assert "is valid: task_arithmetic, semantics paper" in told.out
    assert "mergekit would do its arithmetic in the type that the models are stored in, not in float32" in told.out
    assert "by layer: give --layers" in told.out
    assert "models[0].parameters.weight, gradient of 2 points" in told.out


def test_an_invalid_one_ends_with_2_and_all_its_problems(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe.write_text(RECIPE + "dtype: float9\nparameters: {lambda: x, normalise: true}\n")
    told = run(capsys, "check", recipe)
    assert told.status == 2
    assert [line.split(":")[0].strip() for line in told.out.splitlines()] == [
        *("3 problems in recipe '" + str(recipe) + "'", "dtype", "parameters.lambda", "parameters.normalise"),
    ]
    document = run(capsys, "check", recipe, "--json")
    assert (document.status, document.document["valid"], len(document.document["problems"])) == (2, False, 3)


def test_the_document_says_all_of_it(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = run(capsys, "check", recipe, "--json", "--layers", 5, "--tensor", TENSOR, "--semantics", "mergekit")
    document = told.document
    assert (told.status, document["valid"], document["semantics"], document["base"]) == (
        0,
        True,
        "mergekit",
        "org/base",
    )
    (tensor,) = document["tensors"]
    assert (tensor["tensor"], tensor["depth"]) == (TENSOR, 0.25)
    assert tensor["numbers"][0] == {
        "model": "./math",
        "parameter": "weight",
        "value": 0.25,
        "set_by": "models[0].parameters.weight",
        "filter": None,
        "points": [0.0, 1.0],
    }


def test_the_layers_of_a_model_may_be_asked_for(
    recipe: Path, merge_job: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merge_job(
        random_models({f"model.layers.{i}.mlp.weight": (4, 4) for i in range(3)}, experts=0), folder=tmp_path / "like"
    )
    told = run(capsys, "check", recipe, "--json", "--like", tmp_path / "like/base", "--tensor", TENSOR)
    assert told.document["tensors"][0]["numbers"][0]["value"] == 0.5
    wrong = run(capsys, "check", recipe, "--like", tmp_path / "like/base", "--tensor", "model.layers.1.mpl.weight")
    assert wrong.status == 2
    assert "did you mean 'model.layers.1.mlp.weight'?" in wrong.err
    assert run(capsys, "check", recipe, "--like", tmp_path / "like/base", "--layers", 3).status == 2


def sliced(recipe: Path, end: int) -> Path:
    document = json.loads(recipe.read_text())
    sources = [{**entry, "layer_range": [0, end]} for entry in document["models"]]
    path = recipe.with_name(f"slice-{end}.yml")
    path.write_text(json.dumps(document | {"models": None, "slices": [{"sources": sources}]}))
    return path


def test_a_slice_merges_as_models_and_must_end_where_the_models_do(merge_job: Checkpoints, tmp_path: Path) -> None:
    models = random_models({f"model.layers.{i}.mlp.weight": (8, 8) for i in range(3)}, experts=2)
    recipe = merge_job(models, config={"model_type": "llama", "num_hidden_layers": 3})
    whole = ties_dist.merge(recipe, tmp_path / "whole")
    assert ties_dist.merge(sliced(recipe, 3), tmp_path / "sliced").output_digest == whole.output_digest
    for end in (2, 4):
        with pytest.raises(RecipeError, match=rf"layer_range ends at {end}, but .*\n.*its config.json says 3"):
            ties_dist.plan(sliced(recipe, end))


def test_a_multimodal_models_layers_are_those_of_any_of_its_parts(merge_job: Checkpoints) -> None:
    models = random_models({f"model.layers.{i}.mlp.weight": (8, 8) for i in range(3)}, experts=1)
    parts = {"text_config": {"num_hidden_layers": 3}, "vision_config": {"num_hidden_layers": 7}}
    recipe = merge_job(models, config={"model_type": "llava", **parts})
    ties_dist.plan(sliced(recipe, 3))
    with pytest.raises(RecipeError, match=r"layer_range ends at 5"):
        ties_dist.plan(sliced(recipe, 5))


def test_mergekits_flags_are_answered_and_a_seed_is_taken(
    merge_job: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = merge_job(
        random_models({"a.weight": (64, 64)}, experts=1), method="dare_linear", parameters={"density": 0.5}
    )
    flags = ("--lazy-unpickle", "--allow-crimes", "--out-shard-size", "5B", "--copy-tokenizer")
    merged = []
    for seed in (0, 1, 1):
        out = tmp_path / f"out-{len(merged)}"
        told = run(capsys, "merge", recipe, out, *flags, "--random-seed", seed)
        assert told.status == 0
        assert "note: --allow-crimes has no effect" in told.err
        merged.append((out / "model.safetensors").read_bytes())
    assert merged[0] != merged[1] == merged[2]
    written = tmp_path / "seeded.yml"
    written.write_text(json.dumps(json.loads(recipe.read_text()) | {"parameters": {"density": 0.5, "seed": 1}}))
    ties_dist.merge(written, tmp_path / "seeded")
    assert (tmp_path / "seeded" / "model.safetensors").read_bytes() == merged[1]
