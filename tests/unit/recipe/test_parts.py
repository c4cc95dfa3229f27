"""Models listed under `models`, in one slice over whole models, or in modules: one recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ties_dist.errors import RecipeError
from ties_dist.methods import METHODS
from ties_dist.recipe.recipe import Recipe, load_recipe


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("base", "math", "code"):
        (tmp_path / name).mkdir()
    return tmp_path


def load(recipe: dict[str, Any], root: Path, semantics: str | None = None) -> Recipe:
    return load_recipe(recipe, methods=METHODS, semantics=semantics, root=root)


def source(model: str, end: int = 12, **parameters: object) -> dict[str, object]:
    return {"model": model, "layer_range": [0, end], "parameters": parameters}


SOURCES = [source("base"), source("math", density=0.3), source("code", weight=0.5)]
GLOBAL = {"merge_method": "ties", "base_model": "base", "parameters": {"density": 0.2, "lambda": 2}}
MODELS = GLOBAL | {"models": [{"model": s["model"], "parameters": s["parameters"]} for s in SOURCES]}
SLICE = {"sources": SOURCES}


@pytest.mark.parametrize(
    "listed",
    [
        {"slices": [SLICE]},
        {"slices": [SLICE | {"merge_method": "ties", "base_model": "base"}], "base_model": None},
        {"modules": {"default": {"slices": [SLICE]}}},
        {"modules": {"default": {"models": MODELS["models"]}}},
        {"modules": {"text_decoder": {"slices": [SLICE]}, "vision_tower": {"slices": [SLICE]}}},
    ],
)
def test_one_slice_over_whole_models_is_read_as_models(listed: dict[str, Any], root: Path) -> None:
    expected, found = load(MODELS, root), load(GLOBAL | listed, root)
    assert found.canonical() == expected.canonical()
    assert [each.model.path for each in found.experts] == [root / "math", root / "code"]
    assert found.layers == (None if "models" in str(listed) and "slices" not in str(listed) else 12)


def test_a_slices_numbers_stand_between_those_of_a_model_and_those_of_module_and_recipe(root: Path) -> None:
    weights = {"weight": [{"filter": "mlp", "value": 3}]}
    module = {"slices": [SLICE | {"parameters": weights}], "parameters": {"weight": 5, "lambda": 7}}
    found = load(GLOBAL | {"modules": {"default": module}}, root)
    math, code = (each.parameters["weight"] for each in found.experts)
    assert [math.at("layers.0.mlp.weight", 0), math.at("layers.0.norm.weight", 0)] == [3, 5]
    assert code.constant == 0.5
    assert found.parameters["lambda"].constant == 7
    assert [each.parameters["density"].constant for each in found.experts] == [0.3, 0.2]


def test_a_problem_in_a_slice_has_its_key_path(root: Path) -> None:
    wrong = {"sources": [source("math", densty=1), "code"], "parameters": {"lambda": "x"}}
    with pytest.raises(RecipeError, match=r"^3 problems in the recipe:") as caught:
        load(GLOBAL | {"slices": [wrong]}, root)
    assert [line.strip().partition(": ")[0] for line in str(caught.value).splitlines()[1:]] == [
        *("slices[0].sources[1]", "slices[0].parameters.lambda", "slices[0].sources[0].parameters.densty"),
    ]


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ({"slices": [SLICE, SLICE]}, r"slices: 2 of them stack layers .* one slice over all layers"),
        (
            {"slices": [{"sources": [{"model": "math", "layer_range": [2, 8]}]}]},
            r"slices\[0\]: layers \[2, 8\] are a part",
        ),
        ({"slices": [{"sources": [source("math", 8), source("code", 9)]}]}, r"layers \[0, 8\], \[0, 9\] are a part"),
        ({"slices": [{"sources": [{"model": "math"}]}]}, r"sources\[0\]\.layer_range: must be two .* found None"),
        (
            {"slices": [{"sources": [{"model": "math", "layer_range": [4, 4]}]}]},
            r"layer_range: must be two .* \[4, 4\]",
        ),
        ({"slices": [SLICE | {"merge_method": "slerp"}]}, r"slices\[0\]\.merge_method: 'slerp' is not the recipe's"),
        ({"slices": [SLICE | {"sorces": 1}]}, r"slices\[0\]\.sorces: unknown key; did you mean 'sources'\?"),
        ({"slices": "union"}, r"slices: must be a list of entries with a `sources` key, found 'union'"),
        ({"slices": [{"sources": "math"}]}, r"slices\[0\]: must be a mapping with a list of `sources`"),
        ({"slices": [SLICE], "models": [{"model": "math"}]}, r"models and slices: models are listed once"),
        ({"modules": "union"}, r"modules: must be a mapping of names"),
        ({"modules": {"text": 3}}, r"modules\.text: must be a mapping with `slices` or `models`, found 3"),
        ({"modules": {"text": {}}}, r"modules\.text: needs one of `slices` and `models`"),
        (
            {"modules": {"text": {"slices": [SLICE]}, "vision": {"models": [{"model": "math"}]}}},
            r"modules: text, vision are merged in different ways",
        ),
    ],
)
def test_what_is_not_whole_models_is_refused_with_its_place(listed: dict[str, Any], message: str, root: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        load(GLOBAL | listed, root)
