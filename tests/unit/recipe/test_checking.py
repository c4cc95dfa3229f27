"""A recipe read without its models: valid or not, numbers and who set them, what mergekit would do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from ties_dist.errors import RecipeError
from ties_dist.methods import METHODS
from ties_dist.recipe.checking import Checked, Effective, check_recipe

PUBLISHED: dict[str, dict[str, Any]] = yaml.safe_load((Path(__file__).parent / "published.yml").read_text())
RECIPE = """
merge_method: ties
base_model: org/base
models:
  - model: ./math
    parameters: {density: [{filter: mlp, value: 0.3}, {value: 0.6}]}
  - model: org/code
    parameters: {weight: [0, 1, 3]}
parameters: {density: 0.2, lambda: 1.5}
"""
UP, NORM = "model.layers.2.mlp.up_proj.weight", "model.norm.weight"


def check(recipe: Any = RECIPE, **given: Any) -> Checked:
    return check_recipe(recipe, methods=METHODS, **given)


def numbers(found: Checked, tensor: int = 0) -> list[tuple[object, ...]]:
    return [(n.model, n.parameter, n.value, n.set_by) for n in found.tensors[tensor].numbers]


def test_every_number_of_a_tensor_is_told_with_what_set_it() -> None:
    found = check(tensors=[UP, NORM], layers=5)
    assert found.valid
    assert [(each.tensor, each.depth) for each in found.tensors] == [(UP, 0.5), (NORM, 0.0)]
    assert numbers(found) == [
        ("./math", "density", 0.3, "models[0].parameters.density[0]"),
        ("./math", "weight", 1.0, "default of ties"),
        ("org/code", "density", 0.2, "parameters.density"),
        ("org/code", "weight", 1.0, "models[1].parameters.weight"),
        (None, "lambda", 1.5, "parameters.lambda"),
        (None, "normalize", True, "default of ties"),
    ]
    assert numbers(found, 1)[:1] == [("./math", "density", 0.6, "models[0].parameters.density[1]")]
    assert found.tensors[0].numbers[0].filter == "mlp"
    assert found.tensors[0].numbers[3].points == (0, 1, 3)


def test_a_gradient_has_no_value_in_a_model_of_unknown_depth() -> None:
    (tensor,) = check(tensors=[UP]).tensors
    assert tensor.depth is None
    assert tensor.numbers[3] == Effective(
        model="org/code", parameter="weight", value=None, set_by="models[1].parameters.weight", points=(0, 1, 3)
    )
    assert tensor.numbers[0].value == 0.3


def test_a_slice_says_how_many_layers_there_are() -> None:
    sources = [{"model": "a", "layer_range": [0, 9], "parameters": {"weight": [0, 1]}}]
    found = check({"merge_method": "linear", "slices": [{"sources": sources}]}, tensors=[UP])
    assert numbers(found) == [
        ("a", "weight", 0.25, "slices[0].sources[0].parameters.weight"),
        (None, "normalize", True, "default of linear"),
    ]


def test_a_number_that_no_filter_gives_is_told_as_none() -> None:
    models = [{"model": "a", "parameters": {"scale": [{"filter": "mlp", "value": 2}]}}]
    found = check({"merge_method": "passthrough", "models": models}, tensors=[NORM])
    assert numbers(found) == [("a", "scale", 1.0, "default of passthrough")]
    ties = RECIPE.replace("{value: 0.6}", "{filter: attn, value: 0.6}").replace("density: 0.2, ", "")
    found = check(ties.replace("weight: [0", "density: 1, weight: [0"), tensors=[NORM])
    assert numbers(found)[0] == ("./math", "density", None, "models[0].parameters.density: no filter fits")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"layers": 2}, r"'model.layers.2.mlp.up_proj.weight' is of layer 2, and 2 layers end at 1"),
        ({"like": [NORM, "model.layers.0.mlp.up_proj.weight"]}, r"no tensor 'model.layers.2.*did you mean"),
    ],
)
def test_a_tensor_that_the_models_lack_is_an_error(given: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        check(tensors=[UP], **given)


def test_a_models_own_tensors_say_where_a_layer_stands() -> None:
    like = [NORM, *(f"model.layers.{i}.mlp.up_proj.weight" for i in range(9))]
    assert check(tensors=[UP], like=like).tensors[0].depth == 0.25


def test_all_problems_are_told_at_once_and_no_model_is_missed() -> None:
    found = check("merge_method: ties\nbase_model: b\nmodels: [{model: x, parameters: {densty: 1}}]\ndtype: f8\n")
    assert [problem.partition(":")[0] for problem in found.problems] == [
        *("dtype", "models[0].parameters.densty", "models[0].parameters.density"),
    ]
    assert not found.valid


@pytest.mark.parametrize("recipe", ["a: [1,\n", "merge_method: a\n---\nmerge_method: b\n"])
def test_what_cannot_be_read_is_a_problem_too(recipe: str) -> None:
    assert len(check(recipe).problems) == 1


def test_models_that_are_neither_here_nor_the_hubs_are_named() -> None:
    assert check().notes[-1] == "not here, nor named as on the hub: ./math; `merge` needs them."


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_that_people_published_are_valid_as_mergekit_reads_them(name: str) -> None:
    assert check(PUBLISHED[name], semantics="mergekit").problems == ()


DARE = {
    "merge_method": "dare_ties",
    "base_model": "b",
    "models": [{"model": "m", "parameters": {"weight": 1}}],
    "parameters": {"density": 0.5},
}
RANDOM = "draw other random numbers, and other ones each time unless `--random-seed` is given"
L1 = "rescale what is left of a tensor to the sum of magnitudes it had, not by 1/density"


def one_of(method: str, *models: str, **top: Any) -> dict[str, Any]:
    return {"merge_method": method, "models": [{"model": m, "parameters": {"weight": 1}} for m in models]} | top


@pytest.mark.parametrize(
    ("recipe", "semantics", "expected"),
    [
        (one_of("linear", "a", "b", dtype="float32"), None, []),
        (one_of("linear", "a", dtype="bfloat16"), None, ["do its arithmetic in bfloat16, not in float32"]),
        (one_of("linear", "a"), None, ["do its arithmetic in the type that the models are stored in, not in float32"]),
        (DARE | {"dtype": "float32"}, None, [RANDOM, L1]),
        (DARE | {"dtype": "float32"}, "mergekit", [RANDOM]),  # rescales so, too
        (DARE | {"dtype": "float32", "parameters": {"density": 0.5, "rescale": False}}, None, [RANDOM]),
        (
            one_of("ties", "m", base_model="b", dtype="float32", parameters={"density": 0.5}),
            "mergekit",
            [],
        ),
        (
            one_of(
                "ties", "m", base_model="b", dtype="float32", parameters={"density": 0.5},
                ties_dist={"trim_scope": "tensor", "elect": "count", "exclude": ["x*"]},
            ),
            None,
            [
                "keep exactly the share asked for, cutting through equal values",
                "elect + where the experts cancel exactly",
                "elect the sign of the sum",
                "read over `ties_dist:` (elect, exclude, trim_scope)",
            ],
        ),
        (
            one_of("linear", "a", dtype="float32", base_model="b"),
            None,
            ["merge base_model, too, with the global weight, and refuse it where there is none"],
        ),
    ],
)  # fmt: skip
def test_what_mergekit_would_do_otherwise(recipe: Any, semantics: str | None, expected: Sequence[str]) -> None:
    found = check(recipe, semantics=semantics)
    assert found.problems == ()
    assert list(found.mergekit) == expected


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ({"merge_method": "linear", "models": [{"model": "a"}]}, "models[0] has no weight, which it requires"),
        (one_of("linear", "a", "a"), "models[1] is listed before, and it takes a model once"),
        (one_of("passthrough", "a", base_model="b"), "it takes base_model for one more model, and passthrough has one"),
        (
            {"merge_method": "nearswap", "base_model": "b", "parameters": {"t": 1}}
            | {"slices": [{"sources": [{"model": "a", "layer_range": [0, 3]}]}]},
            "the slice does not list its base_model",
        ),
    ],
)
def test_what_mergekit_would_refuse(recipe: Any, expected: str) -> None:
    found = check(recipe)
    assert found.problems == ()
    assert f"refuse it: {expected}" in found.mergekit
