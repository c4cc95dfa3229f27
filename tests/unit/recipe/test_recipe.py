"""The recipe: mergekit's dialect read strictly, and the values that come out of it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal, get_type_hints

import pytest
import yaml
from huggingface_hub.utils import filter_repo_objects

from ties_dist.errors import RecipeError
from ties_dist.methods import known
from ties_dist.recipe.document import read_document
from ties_dist.recipe.options import OptionKeywords
from ties_dist.recipe.recipe import MethodSpec, Options, Parameter, Recipe, Setting, layer_depths, load_recipe
from ties_dist.recipe.references import Location


@dataclass(frozen=True, kw_only=True)
class FakeMethod:
    """What the recipe knows of a method."""

    parameters: tuple[Parameter, ...]
    operand: Literal["delta", "weight", "both"] = "delta"
    fewest: int = 1
    most: int | None = None
    statistics: str | None = None
    options: frozenset[str] = frozenset()


DENSITY = Parameter(
    name="density",
    per_model=True,
    per_tensor=True,
    minimum=0.0,
    maximum=1.0,
    note="share of each delta kept",
)
WEIGHT = Parameter(name="weight", default=1.0, per_model=True, per_tensor=True)
LAMBDA = Parameter(name="lambda", default=1.0)
INT8_MASK = Parameter(name="int8_mask", kind="bool", default=False, ignored=True, note="masks are never stored")


def normalize(default: bool) -> Parameter:
    return Parameter(name="normalize", kind="bool", default=default)


METHODS: dict[str, MethodSpec] = {
    "ties": FakeMethod(
        parameters=(DENSITY, WEIGHT, LAMBDA, normalize(True), INT8_MASK),
        options=frozenset(
            ("trim_scope", "tie_policy", "elect", "elect_from", "zero_sign", "weight_before_elect", "aggregate")
        ),
    ),
    "task_arithmetic": FakeMethod(parameters=(WEIGHT, LAMBDA, normalize(False), INT8_MASK)),
    "linear": FakeMethod(parameters=(WEIGHT, normalize(True)), operand="weight"),
    "slerp": FakeMethod(parameters=(Parameter(name="t", per_tensor=True),), operand="both", most=1),
    "model_stock": FakeMethod(
        parameters=(Parameter(name="filter_wise", kind="bool", default=False, only_default=True, note="by row"),),
        operand="both",
        fewest=2,
    ),
}

Load = Callable[..., Recipe]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with four models; the working directory is another, empty one."""
    for name in ("base", "math", "code", "chat"):
        (tmp_path / "models" / name).mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "models"


@pytest.fixture
def load(root: Path) -> Load:
    def load(source: Path | str | Mapping[str, object], semantics: str | None = None) -> Recipe:
        return load_recipe(source, methods=METHODS, semantics=semantics, root=root)

    return load


TIES = """
merge_method: ties
base_model: base
models:
  - model: math
    parameters: {density: 0.2}
  - model: code
    parameters: {density: 0.4, weight: 0.5}
"""


def ties(**changes: object) -> dict[str, object]:
    """TIES of two experts with one density, as a mapping; None removes a key."""
    recipe: dict[str, object] = {
        "merge_method": "ties",
        "base_model": "base",
        "models": [{"model": "math"}, {"model": "code"}],
        "parameters": {"density": 0.2},
    }
    return {key: value for key, value in (recipe | changes).items() if value is not None}


def linear(*weights: float, **changes: object) -> dict[str, object]:
    models = [{"model": m, "parameters": {"weight": w}} for m, w in zip(("math", "code"), weights, strict=False)]
    return {"merge_method": "linear", "models": models} | changes


def problems(load: Load, source: object, **arguments: object) -> list[str]:
    """The problems listed by the one error of a recipe."""
    with pytest.raises(RecipeError, match=r"^\d+ problems? in ") as caught:
        load(source, **arguments)
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


# --- A recipe and its values ----------------------------------------------------------------------------------------


def test_a_recipe_becomes_values_in_recipe_order(load: Load, root: Path) -> None:
    recipe = load(TIES)
    assert recipe.method == "ties"
    assert recipe.base is not None and (recipe.base.name, recipe.base.path) == ("base", root / "base")
    assert [e.model.name for e in recipe.experts] == ["math", "code"]
    assert [e.parameters["density"].constant for e in recipe.experts] == [0.2, 0.4]
    assert [e.parameters["weight"].constant for e in recipe.experts] == [1.0, 0.5]
    assert {name: s.constant for name, s in recipe.parameters.items()} == {
        "lambda": 1.0,
        "normalize": True,
        "int8_mask": False,
    }
    assert recipe.elect_from is None and recipe.output_dtype is None


def test_a_global_parameter_stands_for_every_model_that_gives_none(load: Load) -> None:
    recipe = load(ties(models=[{"model": "math", "parameters": {"density": 0.5}}, {"model": "code"}]))
    assert [e.parameters["density"].constant for e in recipe.experts] == [0.5, 0.2]


def test_a_recipe_file_finds_models_beside_itself(root: Path) -> None:
    (root / "merge.yml").write_text(TIES)
    assert load_recipe(root / "merge.yml", methods=METHODS).experts[0].model.path == root / "math"


def test_the_same_recipe_as_file_text_and_mapping_has_one_canonical_form(load: Load, root: Path) -> None:
    (root / "merge.yml").write_text(TIES)
    mapping = ties(
        models=[
            {"model": root / "math", "parameters": {"density": 0.2}},
            {"model": root / "code", "parameters": {"density": 0.4, "weight": 0.5}},
        ],
        parameters=None,
    )
    assert load(TIES).canonical() == load(root / "merge.yml").canonical() == load(mapping).canonical()


def test_keys_left_empty_are_keys_not_given(load: Load) -> None:
    recipe = load(TIES + "parameters:\ndtype:\nties_dist:\ntokenizer_source:\n")
    assert recipe.canonical() == load(TIES).canonical()


# --- mergekit's published examples ----------------------------------------------------------------------------------

MERGEKIT_TIES = """
models:
  - model: psmathur/orca_mini_v3_13b
    parameters:
      density: [1, 0.7, 0.1] # density gradient
      weight: 1.0
  - model: garage-bAInd/Platypus2-13B
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1] # weight gradient
  - model: WizardLM/WizardMath-13B-V1.0
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: TheBloke/Llama-2-13B-fp16
parameters:
  normalize: true
  int8_mask: true
dtype: float16
"""

MERGEKIT_BASE_AMONG_MODELS = """
models:
  - model: mistralai/Mistral-7B-v0.1
    # no parameters necessary for base model
  - model: OpenPipe/mistral-ft-optimized-1218
    parameters:
      density: 0.5
      weight: 0.5
  - model: mlabonne/NeuralHermes-2.5-Mistral-7B
    parameters:
      density: 0.5
      weight: 0.3
merge_method: ties
base_model: mistralai/Mistral-7B-v0.1
parameters:
  normalize: true
  int8_mask: true
dtype: float16
"""

MERGEKIT_LINEAR = """
models:
  - model: psmathur/orca_mini_v3_13b
    parameters:
      weight: 1.0
  - model: WizardLM/WizardLM-13B-V1.2
    parameters:
      weight: 0.3
  - model: garage-bAInd/Platypus2-13B
    parameters:
      weight: 0.5
merge_method: linear
dtype: float16
"""


@pytest.fixture
def hub(root: Path) -> None:
    """Folders that stand in for hub models."""
    for name in (
        *("psmathur/orca_mini_v3_13b", "garage-bAInd/Platypus2-13B", "WizardLM/WizardMath-13B-V1.0"),
        *("TheBloke/Llama-2-13B-fp16", "WizardLM/WizardLM-13B-V1.2", "mistralai/Mistral-7B-v0.1"),
        *("OpenPipe/mistral-ft-optimized-1218", "mlabonne/NeuralHermes-2.5-Mistral-7B"),
    ):
        (root / name).mkdir(parents=True)


@pytest.mark.usefixtures("hub")
def test_mergekits_ties_example_runs_with_tensor_scope(load: Load) -> None:
    recipe = load(MERGEKIT_TIES + "ties_dist: {trim_scope: tensor}")
    assert [e.model.name for e in recipe.experts] == ["orca_mini_v3_13b", "Platypus2-13B", "WizardMath-13B-V1.0"]
    orca, platypus, wizard = (e.parameters for e in recipe.experts)
    middle = "model.layers.20.mlp.up_proj.weight"
    assert (orca["density"].at(middle, 0.5), platypus["density"].at(middle, 0.5)) == (0.7, 0.5)
    assert platypus["weight"].at(middle, 0.5) == pytest.approx(0.5)
    assert wizard["weight"].at(middle, 0.5) == 0.5
    assert wizard["weight"].at("model.layers.20.self_attn.q_proj.weight", 0.5) == 0
    assert (recipe.dtype, recipe.output_dtype) == ("float16", "float16")
    assert "arithmetic stays float32" in " ".join(recipe.notes)
    assert "parameters.int8_mask has no effect: masks are never stored." in recipe.notes


@pytest.mark.usefixtures("hub")
def test_mergekits_ties_example_falls_back_to_tensor_scope_and_says_so(load: Load) -> None:
    recipe = load(MERGEKIT_TIES)
    assert (recipe.options.trim_scope, recipe.options.tie_policy) == ("tensor", "keep_all")
    assert (
        "models[0].parameters.density varies inside the model, so every tensor is trimmed by itself (`trim_scope: "
        "tensor`): a threshold of the whole model has one density."
    ) in recipe.notes
    assert problems(load, MERGEKIT_TIES + "ties_dist: {trim_scope: model}") == [
        "models[0].parameters.density: varies inside the model, but `trim_scope: model` has one threshold per expert; "
        "give one number, or set `ties_dist: {trim_scope: tensor}`"
    ]


@pytest.mark.usefixtures("hub")
def test_a_base_among_the_models_is_left_out_and_said(load: Load) -> None:
    recipe = load(MERGEKIT_BASE_AMONG_MODELS)
    assert [e.model.name for e in recipe.experts] == ["mistral-ft-optimized-1218", "NeuralHermes-2.5-Mistral-7B"]
    assert "models[0]: the base has no difference to itself; the entry is left out." in recipe.notes


@pytest.mark.usefixtures("hub")
def test_mergekits_linear_example_needs_no_base(load: Load) -> None:
    recipe = load(MERGEKIT_LINEAR)
    assert recipe.base is None
    assert [e.parameters["weight"].constant for e in recipe.experts] == [1.0, 0.3, 0.5]


def test_a_base_among_the_models_loses_its_parameters_too(load: Load) -> None:
    models = [{"model": "./base", "parameters": {"density": 0.9}}, {"model": "math"}]
    recipe = load(ties(models=models))
    assert [e.model.name for e in recipe.experts] == ["math"]
    assert "the entry and its parameters is left out" in " ".join(recipe.notes)


def test_a_base_among_the_models_counts_for_linear(load: Load) -> None:
    recipe = load(linear(base_model="base", models=[{"model": "base"}, {"model": "math"}]))
    assert recipe.base is not None
    assert [e.model.name for e in recipe.experts] == ["base", "math"]
    assert recipe.experts[0].model == recipe.base
    assert recipe.notes == ()


def test_a_base_that_linear_does_not_average_is_said(load: Load) -> None:
    assert load(linear(1, 1, base_model="base")).notes == (
        "base_model gives linear layout and dtypes only: it is not among `models`.",
    )


def test_mergekit_averages_a_base_that_is_not_listed_with_the_global_weight(load: Load) -> None:
    given = linear(0.9, 0.4, base_model="base", parameters={"weight": 0.35})
    recipe = load(given, semantics="mergekit")
    assert [(e.model.name, e.parameters["weight"].constant) for e in recipe.experts][-1] == ("base", 0.35)
    assert recipe.base is not None and recipe.experts[-1].model == recipe.base and len(recipe.experts) == 3
    said = "base_model is merged, too, with the global weight, as mergekit does with one outside `models`."
    assert recipe.notes == (said,)
    assert load(recipe.to_yaml()).experts[-1].model.path == recipe.base.path  # said once, it stays
    (paper,) = load(given).notes
    assert "layout and dtypes only" in paper and "; `--semantics mergekit` merges it, too, with the" in paper
    assert len(load(given).experts) == 2
    without = load(linear(0.9, 0.4, base_model="base"), semantics="mergekit")  # nobody gave it a weight
    assert len(without.experts) == 2 and "layout and dtypes only" in without.notes[0]


# --- Gradients and filters ------------------------------------------------------------------------------------------


def weight_of(load: Load, value: object) -> Setting:
    recipe = {"merge_method": "linear", "models": [{"model": "math", "parameters": {"weight": value}}]}
    return load(recipe).experts[0].parameters["weight"]


@pytest.mark.parametrize(
    ("gradient", "depth", "expected"),
    [
        ([1, 0.5], 0.0, 1.0),
        ([1, 0.5], 1.0, 0.5),
        ([1, 0.5], 0.5, 0.75),
        ([0, 1, 0], 0.25, 0.5),
        ([0, 1, 0], 0.75, 0.5),
        ([0.25], 0.3, 0.25),
    ],
)
def test_gradients_interpolate_between_their_points(
    load: Load, gradient: list[float], depth: float, expected: float
) -> None:
    assert weight_of(load, gradient).at("model.layers.1.weight", depth) == expected


def test_gradients_have_the_bits_of_mergekits_formula(load: Load) -> None:
    # Layers 1, 9 and 30 of 32, by mergekit 0.1.5's evaluate_setting. `a + f * (b - a)` differs in the last place.
    setting = weight_of(load, [0.8, 0.3, 0.1])
    assert [setting.at("x", layer / 31) for layer in (1, 9, 30)] == [
        0.7677419354838712,
        0.5096774193548387,
        0.11290322580645161,
    ]


def test_the_first_matching_filter_wins_and_may_hold_a_gradient(load: Load) -> None:
    setting = weight_of(load, [{"filter": "mlp", "value": [0, 1]}, {"filter": "layers.3", "value": 5}, {"value": 2}])
    assert setting.at("model.layers.3.mlp.weight", 0.5) == 0.5
    assert setting.at("model.layers.3.attn.weight", 0.5) == 5
    assert setting.at("model.norm.weight", 0.0) == 2
    assert setting.constant is None
    assert setting.unmatched(["a.mlp.weight"]) == ("layers.3",)


@pytest.mark.parametrize("everything", [None, "*", ""])
def test_a_filter_for_everything_is_no_filter(load: Load, everything: str | None) -> None:
    assert weight_of(load, {"filter": everything, "value": 3}).constant == 3


def test_tensors_that_no_filter_matches_take_the_global_value_then_the_default(load: Load) -> None:
    models = [{"model": "math", "parameters": {"weight": {"filter": "mlp", "value": 3}}}]
    shared = {"weight": [{"filter": "attn", "value": 2}]}
    setting = load(linear(models=models, parameters=shared)).experts[0].parameters["weight"]
    assert [setting.at(name, 0) for name in ("mlp", "attn", "norm")] == [3, 2, 1]


def test_a_filter_list_without_an_end_is_an_error_only_where_nothing_matches(load: Load) -> None:
    recipe = load(ties(parameters={"density": [{"filter": "mlp", "value": 0.5}]}, ties_dist={"trim_scope": "tensor"}))
    setting = recipe.experts[0].parameters["density"]
    assert setting.at("a.mlp.b", 0) == 0.5
    with pytest.raises(RecipeError, match=r"parameters\.density: no filter matches 'norm' and there is no default"):
        setting.at("norm", 0)


def test_values_that_agree_everywhere_are_one_number(load: Load) -> None:
    assert weight_of(load, [{"filter": "mlp", "value": 2}, {"value": 2}]).constant == 2
    assert weight_of(load, [{"filter": "mlp", "value": 1}]).constant == 1  # the default covers the rest


def test_layer_depths_come_from_the_leftmost_layer_index() -> None:
    assert layer_depths(
        [
            "model.embed_tokens.weight",
            "model.layers.0.mlp.weight",
            "model.layers.4.mlp.experts.7.weight",
            "model.layers.1.weight",
            "model.norm.weight",
            "lm_head.weight",
        ]
    ) == {
        "model.embed_tokens.weight": 0.0,
        "model.layers.0.mlp.weight": 0.0,
        "model.layers.4.mlp.experts.7.weight": 1.0,
        "model.layers.1.weight": 0.25,
        "model.norm.weight": 0.0,
        "lm_head.weight": 0.0,
    }


@pytest.mark.parametrize(
    "pattern",
    [
        "transformer.h.{}.attn.weight",
        "h.{}.attn.weight",
        "visual.blocks.{}.attn.weight",
        "bert.encoder.layer.{}.attention.self.query.weight",
        "decoder.block.{}.layer.0.SelfAttention.q.weight",
        "resblocks.{}.ln.bias",
    ],
)
def test_layer_depths_know_the_usual_names(pattern: str) -> None:
    names = [pattern.format(i) for i in range(3)]
    assert list(layer_depths(names).values()) == [0.0, 0.5, 1.0]


def test_stacks_of_layers_have_depths_of_their_own_and_a_single_layer_is_the_last() -> None:
    names = ["encoder.layers.0.w", "encoder.layers.1.w", "encoder.layers.2.w", "decoder.layers.1.w", "one.h.0.w"]
    assert list(layer_depths(names).values()) == [0.0, 0.5, 1.0, 1.0, 1.0]


# --- Numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("written", "number"), [("1e-4", 1e-4), ("2.5e3", 2500.0), ("-1E+2", -100.0), ("3", 3.0)])
def test_scientific_notation_that_yaml_leaves_as_text_is_a_number(load: Load, written: str, number: float) -> None:
    text = (
        f"merge_method: task_arithmetic\nbase_model: base\nmodels: [{{model: math}}]\nparameters: {{weight: {written}}}"
    )
    assert load(text).experts[0].parameters["weight"].constant == number


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("0.5", r"weight: must be a number, found '0\.5' \(a number in quotes is text: drop the quotes\)"),
        ("half", r"weight: must be a number, found 'half'"),
        (True, r"weight: must be a number, found True"),
        (None, r"weight: has no value; must be a number"),
        (float("nan"), r"weight: must be finite"),
        (float("inf"), r"weight: must be finite"),
        (1e39, r"weight: must be finite \(and fit float32\), found 1e\+39"),
        (10**400, r"weight: must be finite"),
        ([], r"weight: an empty list"),
        ([1, {"value": 2}], r"weight: mixes numbers and"),
        ([0.5, "x"], r"weight\[1\]: must be a number, found 'x'"),
        ([{"filter": "mlp"}], r"weight\[0\]: has no `value`"),
        ([{"filter": 3, "value": 1}], r"weight\[0\]\.filter: must be part of a tensor's name"),
        ([{"filtre": "mlp", "value": 1}], r"weight\[0\]\.filtre: unknown key; did you mean 'filter'\?"),
        ([{"value": []}], r"weight\[0\]\.value: an empty list"),
        ([{"value": 1}, {"filter": "mlp", "value": 2}], r"weight\[1\]: never reached"),
    ],
)
def test_wrong_numbers_are_refused_with_their_place(load: Load, value: object, message: str) -> None:
    with pytest.raises(RecipeError, match=r"models\[0\]\.parameters\." + message):
        weight_of(load, value)


@pytest.mark.parametrize(("value", "suggestion"), [(20, "0.2"), (100, "1"), (33.3, "0.333")])
def test_a_density_in_percent_is_refused_with_the_share_that_was_meant(
    load: Load, value: float, suggestion: str
) -> None:
    message = rf"density: {value} is out of range: density is a share in \[0, 1\], .* did you mean {suggestion}\?"
    with pytest.raises(RecipeError, match=message):
        load(ties(parameters={"density": value}))


@pytest.mark.parametrize("value", [-0.5, 200, 1.2])
def test_a_density_that_is_no_share_is_refused(load: Load, value: float) -> None:
    with pytest.raises(RecipeError, match=r"is out of range: density is a share in \[0, 1\]$"):
        load(ties(parameters={"density": value}))


def test_every_point_of_a_gradient_is_in_range(load: Load) -> None:
    with pytest.raises(RecipeError, match=r"parameters\.density\[1\]: 7 is out of range"):
        load(ties(parameters={"density": [1, 7]}, ties_dist={"trim_scope": "tensor"}))


@pytest.mark.parametrize("value", [1, 1.0, 0, 0.0])
def test_one_and_zero_are_true_and_false_as_in_mergekit(load: Load, value: float) -> None:
    recipe = load(ties(parameters={"density": 0.2, "normalize": value}))
    assert recipe.options.aggregate == ("mean" if value else "sum")


@pytest.mark.parametrize("value", [2, 0.5, "true", "yes", None])
def test_booleans_are_true_or_false(load: Load, value: object) -> None:
    with pytest.raises(RecipeError, match=r"parameters\.normalize: .*must be true or false"):
        load(ties(parameters={"density": 0.2, "normalize": value}))


def test_a_global_parameter_is_one_value(load: Load) -> None:
    with pytest.raises(RecipeError, match=r"parameters\.lambda: lambda is one value for the whole merge"):
        load(ties(parameters={"density": 0.2, "lambda": [1, 2]}))


# --- Semantics ------------------------------------------------------------------------------------------------------


def test_an_option_that_a_preset_would_change_is_in_the_copy_of_the_recipe(root: Path) -> None:
    document = ties(
        models=[{"model": "math", "parameters": {"weight": 1.0}}],
        ties_dist={"semantics": "mergekit", "density_of": "auto"},
    )
    recipe = load_recipe(document, methods=known.METHODS, root=root)
    again = load_recipe(recipe.to_yaml(), methods=known.METHODS, root=root)
    assert (again.options.density_of, again.canonical()) == ("auto", recipe.canonical())


def test_presets_fill_what_is_not_given(load: Load) -> None:
    weighted = {"density": 0.2, "weight": 1}
    paper, mergekit, peft = (
        load(ties(parameters=weighted, ties_dist={"semantics": name})).options for name in ("paper", "mergekit", "peft")
    )
    assert paper == Options()
    assert (paper.trim_scope, paper.tie_policy, paper.zero_sign) == ("model", "keep_all", "majority")
    assert (mergekit.trim_scope, mergekit.tie_policy, mergekit.zero_sign) == ("tensor", "exact_k", "positive")
    assert (peft.trim_scope, peft.tie_policy, peft.zero_sign) == ("tensor", "exact_k", "positive")
    assert [o.weight_before_elect for o in (paper, mergekit, peft)] == [True, True, False]


def test_a_given_option_wins_over_its_preset(load: Load) -> None:
    options = load(ties(ties_dist={"semantics": "peft", "trim_scope": "model", "elect": "count"})).options
    assert (options.trim_scope, options.elect, options.tie_policy) == ("model", "count", "exact_k")


def test_the_semantics_argument_overrides_the_recipe_and_says_so(load: Load) -> None:
    recipe = load(ties(ties_dist={"semantics": "paper", "tie_policy": "keep_all"}), semantics="peft")
    assert (recipe.options.semantics, recipe.options.trim_scope) == ("peft", "tensor")
    assert recipe.options.tie_policy == "keep_all"
    assert recipe.notes == ("--semantics peft overrides `semantics: paper` of the recipe.",)


def test_no_semantics_means_paper_and_one_note_says_what_mergekit_would_do(load: Load) -> None:
    recipe = load(TIES)
    assert recipe.options.semantics == "paper"
    (note,) = recipe.notes
    assert note.startswith("No semantics named, so `paper`; `--semantics mergekit` would trim every tensor by itself")
    assert "\n" not in note


def test_the_note_on_semantics_leaves_out_what_the_recipe_decides(load: Load) -> None:
    (note,) = load(ties(ties_dist={"trim_scope": "tensor", "zero_sign": "positive"})).notes
    assert "every tensor" not in note and "cancel" not in note and "exactly the share" in note


def test_no_note_on_semantics_where_they_are_named_or_mean_nothing(load: Load) -> None:
    assert load(ties(ties_dist={"semantics": "paper"})).notes == ()
    assert load(ties(), semantics="paper").notes == ()
    assert load(linear(1, 1)).notes == ()


def test_paper_requires_a_density_and_defaults_the_weight(load: Load) -> None:
    assert problems(load, ties(parameters=None)) == [
        "parameters.density: missing; ties requires it (share of each delta kept)"
    ]


def test_one_missing_density_is_named_with_its_model(load: Load) -> None:
    models = [{"model": "math", "parameters": {"density": 0.2}}, {"model": "code"}]
    assert problems(load, ties(models=models, parameters=None)) == [
        "models[1].parameters.density: missing; ties requires it (share of each delta kept)"
    ]


def test_mergekit_requires_a_weight_and_defaults_the_density(load: Load) -> None:
    recipe = load(ties(parameters={"weight": 0.5}), semantics="mergekit")
    assert [e.parameters["density"].constant for e in recipe.experts] == [1.0, 1.0]
    assert problems(load, ties(), semantics="mergekit") == [
        "parameters.weight: missing; semantics 'mergekit' requires it for every expert"
    ]


@pytest.mark.parametrize("semantics", ["paper", "peft"])
def test_negative_weights_are_refused_pointing_to_task_arithmetic(load: Load, semantics: str) -> None:
    recipe = ties(parameters={"density": 0.2, "weight": [1, -0.5]})
    assert problems(load, recipe, semantics=semantics) == [
        f"parameters.weight: -0.5 is negative, which semantics '{semantics}' refuses; "
        "to subtract an expert use `merge_method: task_arithmetic`"
    ]


def test_negative_weights_are_welcome_elsewhere_and_zero_everywhere(load: Load) -> None:
    negative = ties(parameters={"density": 0.2, "weight": -0.5})
    assert load(negative, semantics="mergekit").experts[0].parameters["weight"].constant == -0.5
    arithmetic = ties(merge_method="task_arithmetic", parameters={"weight": -1})
    assert load(arithmetic).experts[0].parameters["weight"].constant == -1
    assert load(ties(parameters={"density": 0.2, "weight": 0})).experts[0].parameters["weight"].constant == 0


def test_weights_that_cancel_are_refused_for_a_mean(load: Load) -> None:
    with pytest.raises(RecipeError, match=r"models: the weights sum to 0; a weighted mean needs a sum away from 0"):
        load(linear(0.5, -0.5))
    assert load(linear(0.5, -0.5, parameters={"normalize": False})).parameters["normalize"].constant is False


def test_a_filtered_density_means_tensor_scope(load: Load) -> None:
    varying = {"density": [{"filter": "mlp", "value": 0.1}, {"value": 0.2}]}
    assert load(ties(parameters=varying)).options.trim_scope == "tensor"
    with pytest.raises(RecipeError, match=r"parameters\.density: varies inside the model.*trim_scope: tensor"):
        load(ties(parameters=varying, ties_dist={"trim_scope": "model"}))


def test_weights_may_vary_under_model_scope(load: Load) -> None:
    assert load(ties(parameters={"density": 0.2, "weight": [0, 1]})).options.trim_scope == "model"


def test_normalize_false_is_an_alias_of_aggregate_sum(load: Load) -> None:
    alias = load(ties(parameters={"density": 0.2, "normalize": False}))
    named = load(ties(ties_dist={"aggregate": "sum"}))
    assert alias.options.aggregate == named.options.aggregate == "sum"
    assert alias.parameters["normalize"].constant is named.parameters["normalize"].constant is False
    assert alias.canonical() == named.canonical()


@pytest.mark.parametrize(
    ("given", "aggregate", "message"),
    [
        (True, "sum", r"normalize: true contradicts `aggregate: sum`"),
        (False, "max", r"normalize: false means `aggregate: sum`, not 'max'"),
    ],
)
def test_normalize_and_aggregate_must_agree(load: Load, given: bool, aggregate: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load(ties(parameters={"density": 0.2, "normalize": given}, ties_dist={"aggregate": aggregate}))


def test_normalize_is_a_parameter_of_its_own_in_task_arithmetic(load: Load) -> None:
    recipe = load(ties(merge_method="task_arithmetic", parameters={"normalize": True}))
    assert recipe.parameters["normalize"].constant is True
    assert recipe.canonical()["parameters"] == {"lambda": 1.0, "normalize": True}


def test_elect_from_is_a_model_like_the_others(load: Load, root: Path) -> None:
    recipe = load(ties(ties_dist={"elect_from": "chat", "elect": "count", "semantics": "paper"}))
    assert recipe.elect_from is not None
    assert (recipe.elect_from.name, recipe.elect_from.path) == ("chat", root / "chat")
    assert recipe.notes == ("ties_dist.elect has no effect: elect_from gives the signs.",)


def test_elect_from_an_expert_is_that_expert(load: Load) -> None:
    recipe = load(ties(ties_dist={"elect_from": "code"}))
    assert recipe.elect_from == recipe.experts[1].model


def test_elect_from_the_base_is_refused(load: Load) -> None:
    with pytest.raises(RecipeError, match=r"ties_dist\.elect_from: the base has no signs to give"):
        load(ties(ties_dist={"elect_from": "base"}))


# --- Strictness -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"merge_methd": "ties"}, r"merge_methd: unknown key; did you mean 'merge_method'\?"),
        ({"density": 0.2}, r"density: unknown key; it belongs under `parameters`"),
        ({"trim_scope": "tensor"}, r"trim_scope: unknown key; it belongs in the top-level block `ties_dist:`"),
        ({"parameters": {"densty": 0.2}}, r"parameters\.densty: unknown key; did you mean 'density'\?"),
        ({"parameters": {"density": 0.2, "elect": "mass"}}, r"parameters\.elect: .* block `ties_dist:`"),
        ({"parameters": {"density": 0.2, "dtype": "float32"}}, r"parameters\.dtype: .* at the top level"),
        ({"parameters": [1]}, r"parameters: must be a mapping of keys to values, found \[1\]"),
        ({"models": [{"modle": "math"}]}, r"models\[0\]\.modle: unknown key; did you mean 'model'\?"),
        ({"models": [{"model": "math", "weight": 1}]}, r"models\[0\]\.weight: .* it belongs under `parameters`"),
        ({"models": [{"parameters": {}}]}, r"models\[0\]\.model: missing"),
        ({"models": ["math"]}, r"models\[0\]: must be a mapping with a `model` key, found 'math'"),
        ({"models": [{"model": 3}]}, r"models\[0\]\.model: must be a path or a hub id, as text; found 3"),
        ({"models": {"math": 1}}, r"models: must be a list of entries"),
        ({"models": []}, r"models: no experts to merge"),
        ({"models": None}, r"models: no experts to merge"),
        ({"models": [{"model": "base"}]}, r"models: no experts to merge"),
        ({"base_model": None}, r"base_model: missing; ties merges differences to a base"),
        ({"merge_method": None}, r"merge_method: missing; known: ties, task_arithmetic, linear"),
        ({"merge_method": "tis"}, r"merge_method: no method 'tis'; did you mean 'ties'\?"),
        ({"merge_method": ["ties"]}, r"merge_method: no method \['ties'\]"),
        ({"dtype": "float23"}, r"dtype: no dtype 'float23'; did you mean 'float32'\?"),
        ({"out_dtype": 16}, r"out_dtype: no dtype 16; known: float32, float16, bfloat16"),
        ({"dtype": "int64"}, r"dtype: no dtype 'int64'; known: float32, float16, bfloat16"),
        ({"dtype": "float64"}, r"dtype: no dtype 'float64'; known: float32, float16, bfloat16"),
        ({"ties_dist": "paper"}, r"ties_dist: must be a mapping"),
        ({"ties_dist": {"semantics": "papr"}}, r"ties_dist\.semantics: no value 'papr'; did you mean 'paper'\?"),
        ({"ties_dist": {"tie_polcy": "exact_k"}}, r"ties_dist\.tie_polcy: unknown key; did you mean 'tie_policy'\?"),
        ({"ties_dist": {"elect": None}}, r"ties_dist\.elect: no value None; did you mean 'none'"),
        ({"ties_dist": {"density": 0.2}}, r"ties_dist\.density: unknown key; it belongs under `parameters`"),
        ({"ties_dist": {"weight_before_elect": 1}}, r"weight_before_elect: must be true or false, found 1"),
        ({"ties_dist": {"exclude": "*.bias"}}, r"ties_dist\.exclude: must be a list of name patterns"),
        ({"ties_dist": {"exclude": ["a", 3]}}, r"ties_dist\.exclude\[1\]: must be text, found 3"),
        ({"ties_dist": {"exclude": [""]}}, r"ties_dist\.exclude\[0\]: String should have at least 1 character"),
    ],
)
def test_what_is_wrong_is_named_with_its_key_path(load: Load, changes: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load(ties(**changes))


def test_keys_that_are_not_text_are_unknown_keys(load: Load) -> None:
    with pytest.raises(RecipeError, match=r"True: unknown key"):
        load(TIES + "on: 1\n")


def test_parameters_of_another_method_are_said_to_have_no_effect(load: Load) -> None:
    for name in ("density", "epsilon", "t"):  # of ties; of methods that mergekit has
        said = f"parameters.{name} has no effect: linear has no such parameter, other methods have."
        assert said in load(linear(1, 1, parameters={name: 0.2})).notes
    with pytest.raises(RecipeError, match=r"parameters\.wieght: unknown key; did you mean 'weight'"):
        load(linear(1, 1, parameters={"wieght": 1}))


def test_a_global_parameter_under_a_model_is_sent_to_its_place(load: Load) -> None:
    models = [{"model": "math", "parameters": {"lambda": 2}}]
    with pytest.raises(RecipeError, match=r"models\[0\]\.parameters\.lambda: .*move it to the top-level `parameters`"):
        load(ties(models=models))


def test_an_option_the_method_does_not_understand_is_refused(load: Load) -> None:
    with pytest.raises(RecipeError, match=r"ties_dist\.trim_scope: linear has no such option"):
        load(linear(1, 1, ties_dist={"trim_scope": "tensor"}))


def test_options_of_every_method_are_understood_by_every_method(load: Load) -> None:
    block = {"exclude": ["*.bias"], "vocab": "base", "non_float": "base", "semantics": "mergekit"}
    options = load(linear(1, 1, ties_dist=block)).options
    assert (options.exclude, options.vocab, options.non_float) == (("*.bias",), "base", "base")


def test_what_was_called_truncate_is_read_as_base_and_said(load: Load) -> None:
    recipe = load(linear(1, 1, ties_dist={"vocab": "truncate"}))
    assert recipe.options.vocab == "base"
    assert any("`vocab: truncate` is called `base` now" in note for note in recipe.notes)


def test_allowed_words_are_kept_in_the_recipe_and_change_no_bytes(load: Load) -> None:
    recipe = load(ties(ties_dist={"allow": ["hidden_act"]})).allowing(["tokenizer", "hidden_act"])
    assert recipe.options.allow == ("hidden_act", "tokenizer")
    assert "allow: [hidden_act, tokenizer]" in recipe.to_yaml()
    assert recipe.canonical() == load(ties()).canonical()


@pytest.mark.parametrize("key", ["tokenizer_source", "tokenizer", "chat_template"])
def test_mergekit_features_not_supported_yet_are_refused_by_name(load: Load, key: str) -> None:
    with pytest.raises(RecipeError, match=rf"{key}: a mergekit feature that ties_dist does not support yet"):
        load(ties(**{key: "union"}))


@pytest.mark.parametrize("key", ["tokenizer_source", "tokenizer"])
def test_the_bases_tokenizer_may_be_asked_for(load: Load, key: str) -> None:
    said = f"{key}: the base's tokenizer is what the output has anyhow."
    assert said in load(ties(**{key: "base"})).notes
    assert said in load(ties(**{key: {"source": "base"}})).notes
    for value in ({"source": "base", "tokens": {}}, {"source": "union"}):
        with pytest.raises(RecipeError, match=rf"{key}: a mergekit feature"):
            load(ties(**{key: value}))
    with pytest.raises(RecipeError, match=rf"{key}: a mergekit feature"):
        load(linear(1, 1, **{key: "base"}))


def test_what_other_tools_write_into_a_recipe_is_said_and_read_over(load: Load) -> None:
    notes = load(ties(name="mine", output_dir="/somewhere")).notes
    for key in ("name", "output_dir"):
        assert f"{key} has no effect: it says nothing of how models are merged." in notes
    with pytest.raises(RecipeError, match=r"outputs_of: unknown key"):
        load(ties(outputs_of=1))


@pytest.mark.parametrize("method", ["nuslerp", "della_linear", "della", "breadcrumbs", "karcher"])
def test_mergekit_methods_not_supported_yet_are_refused_by_name(load: Load, method: str) -> None:
    message = rf'merge_method "{method}" is a mergekit method that ties_dist does not support yet'
    with pytest.raises(RecipeError, match=message):
        load(ties(merge_method=method))


def slerp(*models: str, **changes: object) -> dict[str, object]:
    listed = [{"model": model} for model in models]
    return {"merge_method": "slerp", "base_model": "base", "models": listed, "parameters": {"t": 0.5}} | changes


@pytest.mark.parametrize("listed", [("base", "math"), ("math", "base"), ("math",)])
def test_a_base_among_the_models_of_a_method_that_takes_it_is_nothing_to_say(
    listed: tuple[str, ...], load: Load
) -> None:
    recipe = load(slerp(*listed))
    assert ([e.model.name for e in recipe.experts], recipe.base and recipe.base.name) == (["math"], "base")
    assert recipe.notes == ()


def test_parameters_of_that_base_have_no_effect_and_are_said(load: Load) -> None:
    models = [{"model": "base", "parameters": {"weight": 1.0}}, {"model": "math"}]
    assert load(slerp(models=models)).notes == ("models[0]: the base's own parameters have no effect.",)


def test_a_method_of_two_models_takes_no_third_and_one_of_several_no_single_one(load: Load) -> None:
    assert problems(load, slerp("math", "code")) == ["models: slerp merges 1 besides the base; 2 listed"]
    stock = slerp("math", merge_method="model_stock", parameters={})
    assert problems(load, stock) == ["models: model_stock merges at least 2 besides the base; 1 listed"]
    assert problems(load, slerp("base")) == ["models: no experts to merge; list at least one"]


def test_a_method_that_needs_a_base_is_not_for_adapters_among_themselves(load: Load) -> None:
    found = problems(load, slerp("math", ties_dist={"output": "adapter"}))
    assert found == ["ties_dist.output: slerp needs a base; adapters merged with each other have none"]
    assert problems(load, slerp("math", base_model=None)) == ["base_model: missing; slerp merges with a base"]


def test_a_value_of_mergekit_s_that_is_not_there_yet_is_refused(load: Load) -> None:
    stock = slerp("math", "code", merge_method="model_stock")
    assert load(stock | {"parameters": {"filter_wise": False}}).parameters["filter_wise"].constant is False
    assert problems(load, stock | {"parameters": {"filter_wise": True}}) == [
        "parameters.filter_wise: a mergekit feature that ties_dist does not support yet (by row)"
    ]


def test_a_plus_means_an_adapter(load: Load) -> None:
    with pytest.raises(
        RecipeError, match=r"models\[0\]\.model: 'math\+lora' is read as model\+adapter, but 'lora' is not"
    ):
        load(ties(models=[{"model": "math+lora"}]))


def test_an_unknown_semantics_argument_names_the_nearest(load: Load) -> None:
    with pytest.raises(RecipeError, match=r"--semantics: no semantics 'mergkit'; did you mean 'mergekit'\?"):
        load(ties(), semantics="mergkit")


def test_all_problems_of_a_recipe_come_in_one_error(load: Load) -> None:
    text = """
    merge_method: ties
    base_model: base
    tokenizer_source: union
    models:
      - {model: math, parameters: {densty: 0.2}}
      - {model: nowhere, paramters: {}}
    parameters: {density: 20, normalize: 2}
    dtype: float8
    ties_dist: {elect: mas}
    """
    found = problems(load, text)
    assert [line.split(": ")[0] for line in found] == [
        *("tokenizer_source", "dtype", "ties_dist.elect", "models[1].paramters", "models[1].model"),
        *("parameters.density", "parameters.normalize", "models[0].parameters.densty"),
    ]


def test_a_misspelt_option_is_not_followed_by_conclusions_from_its_default(load: Load) -> None:
    recipe = ties(parameters={"density": [0.1, 0.2]}, ties_dist={"trim_scop": "tensor"})
    assert problems(load, recipe) == ["ties_dist.trim_scop: unknown key; did you mean 'trim_scope'?"]


@pytest.mark.parametrize(
    ("written", "name"),
    [("float32", "float32"), ("torch.bfloat16", "bfloat16"), ("fp16", "float16"), ("bf16", "bfloat16")],
)
def test_dtypes_have_the_names_of_torch(load: Load, written: str, name: str) -> None:
    recipe = load(linear(1, 1, dtype=written))
    assert recipe.dtype == recipe.output_dtype == name
    assert bool(recipe.notes) == (name != "float32")


def test_out_dtype_wins_over_dtype(load: Load) -> None:
    recipe = load(linear(1, 1, dtype="bfloat16", out_dtype="float32"))
    assert (recipe.dtype, recipe.out_dtype, recipe.output_dtype) == ("bfloat16", "float32", "float32")
    assert recipe.notes == ("dtype bfloat16 is the output's type only: arithmetic stays float32.",)


# --- YAML and files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"the recipe is empty"),
        ("# only a comment\n", r"the recipe is empty"),
        ("- a\n- b\n", r"must be a mapping of keys to values, found \['a', 'b'\]"),
        ("merge.yml", r"must be a mapping .* \(to read a file, pass a Path\)"),
        ("a: [1,\n", r"line 2, column 1: .*while parsing a flow node, expected the node"),
        ("a: 1\nb: 2\na: 3\n", r"line 3, column 1: key 'a' is given twice"),
        ("parameters:\n  weight: 1\n  'weight': 2\n", r"line 3, column 3: key 'weight' is given twice"),
        ("a: &a [*b]", r"undefined alias"),
        ("? [1, 2]\n: 3\n", r"unhashable key"),
        ("a: 2024-99-99", r"not valid YAML: month must be in 1\.\.12"),
        ("a: \x00", r"not valid YAML"),
        ("a: 1\n---\nb: 2\n", r"the recipe holds 2 recipes, and one is merged at a time"),
        ("[" * 3000, r"nested too deeply"),
    ],
)
def test_text_that_is_no_recipe_is_refused_with_its_place(load: Load, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load(text)


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)
)
MERGED = "a0: &a0 {k0: 1}\n" + "".join(f"a{i}: &a{i} {{k{i}: 1, <<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 40))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, r"is not a recipe: it has more than 25,000 values, each alias counted as what it stands for"),
        (MERGED, r"more than 25,000 values"),
        (f"parameters: {{density: [{', '.join(['0.1'] * 100_000)}]}}", r"more than 25,000 values"),
        ("models:\n" + "- model: a\n" * 100_000, r"more than 25,000 values"),
        ("models:\n" + "- model: a\n" * 8_000, r"models: 8,000 entries; at most 1,000 are merged at once"),
        ("a: &a [*a]", r"`\*a` stands for what it is itself in"),
        ("a: 1" + ":59" * 1_000_000, r"a value has 3,000,001 characters"),
        ("[" * 1_000_000, r"nested too deeply"),
        ("- " * 1_000_000, r"nested too deeply"),
    ],
    ids=["aliases", "merge keys", "list", "long models", "models", "cycle", "number", "brackets", "dashes"],
)
def test_what_would_take_minutes_to_read_is_refused_in_a_moment(load: Load, text: str, message: str) -> None:
    began = time.process_time()
    with pytest.raises(RecipeError, match=message):
        load(text)
    assert time.process_time() - began < 1.5


def test_the_longest_gradients_that_tools_write_are_read(load: Load) -> None:
    cases = [{"filter": f"layers.{i}.{kind}", "value": 0.5} for i in range(80) for kind in "qkvogud"] + [{"value": 1}]
    experts = [{"model": name, "parameters": {"weight": cases}} for name in ("math", "code")] * 4
    recipe = load(json.dumps({"merge_method": "ties", "base_model": "base", "models": experts,
                              "parameters": {"density": 0.2}}))  # fmt: skip
    assert len(recipe.experts) == 8


def test_yaml_tags_are_refused_and_never_run(load: Load, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    with pytest.raises(RecipeError, match=r"line 1, column 4: .*tag.*python/object/apply.*tags are refused and never"):
        load(f"a: !!python/object/apply:pathlib.Path.touch [{victim}]")
    assert not victim.exists()


def test_merge_keys_may_be_overridden(load: Load) -> None:
    text = """
    merge_method: ties
    base_model: base
    models:
      - model: math
        parameters: &shared {density: 0.2, weight: 0.5}
      - model: code
        parameters: {<<: *shared, weight: 0.7}
    """
    assert [e.parameters["weight"].constant for e in load(text).experts] == [0.5, 0.7]


@pytest.mark.parametrize(
    "use",
    [
        *(
            "merge_method: *z",
            "dtype: *z",
            "models: *z",
            "models: [{model: *z}]",
            "ties_dist: {elect: *z}",
            "base_model: *z",
        ),
        *("parameters: {density: *z}", "parameters: {density: [{value: *z}]}", "? *z\n: 1", "{*z : 1}"),
    ],
)
def test_aliases_that_explode_cost_neither_time_nor_space(load: Load, use: str) -> None:
    names = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    doublings = [f"{new}: &{new} [*{old}, *{old}]" for old, new in pairwise(names)]
    with pytest.raises(RecipeError, match=r"the recipe") as caught:
        load("\n".join(["a: &a [x, x]", *doublings, use]))
    assert len(str(caught.value)) < 20_000


def test_aliases_that_contain_themselves_are_refused(load: Load) -> None:
    with pytest.raises(RecipeError, match=r"`\*d` stands for what it is itself in"):
        load("merge_method: ties\nbase_model: base\nmodels: [{model: math}]\nparameters: {density: &d [*d]}\n")


def test_a_base_that_is_not_there_is_one_problem_wherever_it_is_listed(load: Load) -> None:
    models = [{"model": "lost"}, {"model": "math", "parameters": {"density": 0.2}}]
    found = problems(load, ties(base_model="lost", models=models, parameters=None))
    assert [line.split(": ")[0] for line in found] == ["base_model", "models[0].model"]


def test_files_that_are_no_recipe_are_refused(tmp_path: Path) -> None:
    def read(path: Path) -> Recipe:
        return load_recipe(path, methods=METHODS)

    with pytest.raises(RecipeError, match=r"recipe '.*missing\.yml' does not exist"):
        read(tmp_path / "missing.yml")
    with pytest.raises(RecipeError, match=r"cannot be read: Is a directory"):
        read(tmp_path)
    (tmp_path / "latin.yml").write_bytes("merge_method: tiés".encode("latin-1"))
    with pytest.raises(RecipeError, match=r"latin\.yml' is not UTF-8 text \(byte 16\)"):
        read(tmp_path / "latin.yml")
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(RecipeError, match=r"1,073,741,824 bytes long: that is not a recipe"):
        read(tmp_path / "model.safetensors")


def test_problems_name_the_recipe_file(root: Path) -> None:
    (root / "merge.yml").write_text("merge_method: ties\n")
    with pytest.raises(RecipeError, match=r"2 problems in recipe '.*merge\.yml':\n  base_model: missing"):
        load_recipe(root / "merge.yml", methods=METHODS)


# --- Models ---------------------------------------------------------------------------------------------------------


def test_a_model_is_looked_up_beside_the_recipe_then_in_the_working_directory(load: Load, tmp_path: Path) -> None:
    (tmp_path / "elsewhere" / "extra").mkdir()
    models = [{"model": "math"}, {"model": "extra"}, {"model": "../models/code"}]
    paths = [e.model.path for e in load(linear(models=models)).experts]
    assert paths[:2] == [tmp_path / "models" / "math", tmp_path / "elsewhere" / "extra"]
    assert paths[2].resolve() == tmp_path / "models" / "code"
    assert all(path.is_absolute() for path in paths)


def test_a_model_in_both_places_is_ambiguous_unless_it_is_the_same(
    load: Load, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere" / "math").mkdir()
    with pytest.raises(
        RecipeError, match=r"models\[0\]\.model: 'math' is ambiguous: .*models/math and .*elsewhere/math"
    ):
        load(linear(1))
    monkeypatch.chdir(root)
    assert load(linear(1)).experts[0].model.path == root / "math"


def test_absolute_paths_and_home_folders_are_understood(
    load: Load, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(root))
    recipe = load(linear(models=[{"model": str(root / "math")}, {"model": "~/code"}]))
    assert [e.model.path for e in recipe.experts] == [root / "math", root / "code"]


def test_a_single_file_is_a_model_named_after_itself_or_its_folder(load: Load, root: Path) -> None:
    for name in ("solo.safetensors", "math/model.safetensors", "notes.bin"):
        (root / name).touch()
    recipe = load(linear(models=[{"model": "solo.safetensors"}, {"model": "math/model.safetensors"}]))
    assert [e.model.name for e in recipe.experts] == ["solo", "math"]
    with pytest.raises(RecipeError, match=r"'notes\.bin' is neither a folder nor a \.safetensors file"):
        load(linear(models=[{"model": "notes.bin"}]))


def test_names_are_short_and_unique(load: Load, root: Path) -> None:
    for name in ("x/final", "y/final"):
        (root / name).mkdir(parents=True)
    recipe = load(ties(base_model="x/final", models=[{"model": "y/final/"}, {"model": "math"}]))
    assert recipe.base is not None
    assert [recipe.base.name, *(e.model.name for e in recipe.experts)] == ["final", "final#2", "math"]


def test_the_same_expert_twice_is_allowed_and_said(load: Load) -> None:
    recipe = load(linear(models=[{"model": "math"}, {"model": "code"}, {"model": "./math"}]))
    assert [e.model.name for e in recipe.experts] == ["math", "code", "math#2"]
    assert recipe.experts[0].model.path.samefile(recipe.experts[2].model.path)
    assert recipe.notes == ("models[2]: the same expert as models[0]; it counts once more.",)


def test_a_path_with_a_plus_that_exists_is_no_adapter(load: Load, root: Path) -> None:
    (root / "a+b").mkdir()
    assert load(linear(models=[{"model": "a+b"}])).experts[0].model.name == "a+b"


@pytest.mark.parametrize("text", ["nowhere", "./org/name", "/org/name", "a/b/c", "org/name@", "org/model.safetensors"])
def test_what_is_neither_a_path_nor_a_hub_id_is_said_without_asking_the_hub(
    load: Load, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(RecipeError, match=r"models\[0\]\.model: '.*' is not there .* and it is not a hub id"):
        load(linear(models=[{"model": text}]))


@pytest.fixture
def offline_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """huggingface_hub offline, with one model in its cache: org/tuned at main and at tag v1."""
    cache = tmp_path / "cache"
    repository = cache / "models--org--tuned"
    for revision, commit in (("main", "a" * 40), ("v1", "b" * 40)):
        (repository / "snapshots" / commit).mkdir(parents=True)
        (repository / "snapshots" / commit / "model.safetensors").touch()
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    yield repository / "snapshots"


def test_hub_ids_come_from_the_cache_when_offline(load: Load, offline_hub: Path) -> None:
    recipe = load(linear(models=[{"model": "org/tuned"}, {"model": "org/tuned@v1"}]))
    assert [e.model.path for e in recipe.experts] == [offline_hub / ("a" * 40), offline_hub / ("b" * 40)]
    assert [(e.model.name, e.model.revision) for e in recipe.experts] == [("tuned", None), ("tuned#2", "v1")]
    assert [e.model.text for e in recipe.experts] == ["org/tuned", "org/tuned@v1"]


@pytest.mark.usefixtures("offline_hub")
def test_hub_models_that_cannot_be_had_are_all_named_with_both_interpretations(load: Load) -> None:
    found = problems(load, ties(models=[{"model": "org/lost"}, {"model": "org/tuned@v9"}]))
    assert len(found) == 2
    assert found[0].startswith("models[0].model: 'org/lost' is neither a local path (no ")
    assert "models/org/lost" in found[0] and "LocalEntryNotFoundError" in found[0]
    assert "'org/tuned' at revision 'v9' be fetched from the Hugging Face hub" in found[1]


def test_nothing_is_downloaded_for_a_recipe_with_problems(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(RecipeError, match=r"1 problem in the recipe:\n  parameters\.density: 20 is out of range"):
        load(ties(models=[{"model": "org/name"}], parameters={"density": 20}))


def test_a_download_takes_weights_and_companions_once(load: Load, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def snapshot_download(repository: str, **arguments: object) -> str:
        calls.append((repository, arguments))
        return str(root / "math")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    load(linear(models=[{"model": "org/name@abc"}, {"model": "org/name@abc"}]))
    ((repository, arguments),) = calls
    assert (repository, arguments["revision"]) == ("org/name", "abc")
    unwanted = [str(pattern) for pattern in arguments["ignore_patterns"]]  # type: ignore[attr-defined]
    wanted = ["model-00001-of-00002.safetensors", "2_Dense/model.safetensors", "1_Pooling/config.json",
              "tokenizer.json", "additional_chat_templates/tool.jinja", "source.spm", "bpe.codes",
              "LICENSE"]  # fmt: skip
    left = ["pytorch_model.bin", "onnx/model.onnx", "model.gguf", "unet/model.safetensors", "consolidated.safetensors"]
    assert list(filter_repo_objects([*wanted, *left], ignore_patterns=unwanted)) == wanted


# --- Canonical form and resolved recipe -----------------------------------------------------------------------------


def test_the_canonical_form_is_json_without_paths_or_names(load: Load, root: Path) -> None:
    text = json.dumps(load(ties(ties_dist={"elect_from": "chat"})).canonical())
    assert not any(word in text for word in (str(root), "math", "code", "chat", '"base"'))


def test_companions_are_in_the_resolved_recipe_and_not_in_the_canonical_form(load: Load) -> None:
    plain, more = load(ties()), load(ties(ties_dist={"companions": ["onnx/*", "big.dat"]}))
    assert plain.canonical() == more.canonical()
    assert more.options.companions == ("onnx/*", "big.dat")
    assert load(yaml.safe_load(more.to_yaml())).options.companions == more.options.companions


def test_the_canonical_form_ignores_how_a_value_was_written(load: Load) -> None:
    one = load(ties(parameters={"density": 0.2, "weight": 1, "lambda": 1, "int8_mask": True, "normalize": True}))
    other = load(
        ties(
            models=[{"model": "./math", "parameters": {"density": "2e-1"}}, {"model": "code"}],
            parameters={"density": [{"filter": "*", "value": [0.2]}], "weight": 1.0},
            ties_dist={"aggregate": "mean", "semantics": "paper"},
        )
    )
    assert json.dumps(one.canonical(), sort_keys=True) == json.dumps(other.canonical(), sort_keys=True)


@pytest.mark.parametrize(
    "changes",
    [
        {"parameters": {"density": 0.3}},
        {"parameters": {"density": 0.2, "weight": 2}},
        {"parameters": {"density": 0.2, "weight": [1, 2]}},
        {"parameters": {"density": 0.2, "lambda": 2}},
        {"parameters": {"density": 0.2, "normalize": False}},
        {"models": [{"model": "math"}]},
        {"models": [{"model": "math"}, {"model": "code", "parameters": {"weight": 2}}]},
        {"dtype": "float16"},
        {"out_dtype": "float16"},
        {"ties_dist": {"semantics": "peft"}},
        {"ties_dist": {"trim_scope": "tensor"}},
        {"ties_dist": {"tie_policy": "exact_k"}},
        {"ties_dist": {"elect": "count"}},
        {"ties_dist": {"elect_from": "chat"}},
        {"ties_dist": {"zero_sign": "drop"}},
        {"ties_dist": {"weight_before_elect": False}},
        {"ties_dist": {"aggregate": "max"}},
        {"ties_dist": {"exclude": ["*.bias"]}},
        {"ties_dist": {"vocab": "base"}},
        {"ties_dist": {"non_float": "base"}},
        {"merge_method": "task_arithmetic", "parameters": None},
    ],
)
def test_everything_that_changes_bytes_changes_the_canonical_form(load: Load, changes: dict[str, object]) -> None:
    assert load(ties(**changes)).canonical() != load(ties()).canonical()


def test_the_order_of_experts_counts_and_of_exclusions_does_not(load: Load) -> None:
    assert load(linear(1, 2)).canonical() != load(linear(2, 1)).canonical()
    one, other = ({"exclude": patterns} for patterns in (["a", "b"], ["b", "a", "b"]))
    assert load(ties(ties_dist=one)).canonical() == load(ties(ties_dist=other)).canonical()


@pytest.mark.parametrize(
    ("source", "semantics"),
    [
        (TIES, None),
        (TIES, "peft"),
        (ties(parameters={"density": 0.2, "normalize": False, "int8_mask": True}), None),
        (ties(parameters={"weight": [1, {"x": 1}][:1]}), "mergekit"),
        (ties(ties_dist={"elect_from": "chat", "exclude": ["*.bias", "lm_head.*"]}, dtype="bf16"), None),
        (ties(parameters={"density": [{"filter": "mlp", "value": [0.1, 1e-5]}, {"filter": "ü", "value": 1}]},
              ties_dist={"trim_scope": "tensor"}), None),
        (ties(merge_method="task_arithmetic", parameters={"lambda": 0.4, "normalize": True}), None),
        (linear(1, 1e-12, out_dtype="float16"), None),
    ],
)  # fmt: skip
def test_the_resolved_recipe_loads_to_the_same(load: Load, source: object, semantics: str | None) -> None:
    recipe = load(source, semantics=semantics)
    again = load(recipe.to_yaml())
    assert again.canonical() == recipe.canonical()
    assert again.to_yaml() == recipe.to_yaml()
    assert "No semantics named" not in " ".join(again.notes)


def test_the_resolved_recipe_keeps_models_as_written(load: Load, root: Path) -> None:
    text = load(TIES).to_yaml()
    assert "model: math" in text and str(root) not in text
    assert "semantics: paper" in text and "tie_policy: keep_all" in text and "weight: 1.0" in text


def test_importing_the_recipe_loads_nothing_heavy() -> None:
    heavy = "('torch', 'huggingface_hub', 'numpy', 'zarr', 'ray', 'transformers')"
    script = f"import sys, ties_dist.recipe.recipe; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert done.stdout.strip() == "[]"


REPOSITORY = Path(__file__).resolve().parents[3]


def test_keywords_of_merge_state_dicts_are_the_options_of_the_block() -> None:
    fields = {name: field.annotation for name, field in Options.model_fields.items()}
    apart = {"semantics", "elect_from"}  # keywords of their own
    hints = get_type_hints(OptionKeywords)
    assert hints.keys() == fields.keys() - apart
    assert {name for name in hints if hints[name] != fields[name]} == {
        "exclude",
        "allow",
        "companions",
    }  # of which a list will do


# --- as people write it ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "written",
    [
        *("~/math", "$HOME/math", "${HOME}//math", "math/", ".//math"),
        *(
            {"model": {"path": "math"}},
            {"path": "math"},
            {"model": "math"},
            {"model": {"path": "~/math"}, "lora": None},
        ),
    ],
)
def test_a_model_is_found_however_it_is_spelt(
    load: Load, root: Path, monkeypatch: pytest.MonkeyPatch, written: object
) -> None:
    monkeypatch.setenv("HOME", str(root))
    (expert,) = load(ties(models=[{"model": written}])).experts
    assert (expert.model.path.resolve(), expert.model.name) == (root / "math", "math")


def test_a_base_in_the_long_form_is_the_same_base(load: Load) -> None:
    recipe = load(ties(base_model={"model": {"path": "base"}}, models=[{"model": "base"}, {"model": "math"}]))
    assert [each.model.name for each in recipe.experts] == ["math"]


def test_the_long_form_has_a_revision_and_an_adapter(root: Path) -> None:
    wanted = []

    def fetch(location: Location) -> Path:
        wanted.append((location.identity, location.adapter and location.adapter.identity))
        return root / "math"

    long = {"model": {"path": "org//name", "revision": "v1"}, "lora": {"path": "org/lora/"}}
    with pytest.raises(RecipeError, match=r"'org/lora/' is no PEFT adapter"):
        load_recipe(linear(1) | {"models": [{"model": long}]}, methods=METHODS, root=root, fetch=fetch)
    assert wanted[0] == (("org/name", "v1"), ("org/lora", None))


@pytest.mark.parametrize("written", [{"model": {"pth": "math"}}, {}, {"path": "math", "revision": 3}, 7])
def test_what_is_no_model_is_refused(load: Load, written: object) -> None:
    with pytest.raises(RecipeError, match=r"models\[0\]\.model: must be a path or a hub id, as text; found"):
        load(ties(models=[{"model": written}]))


def test_density_0_alone_leaves_the_expert_out_and_says_so(load: Load) -> None:
    recipe = load(ties(models=[{"model": "math", "parameters": {"density": 0}}, {"model": "code"}]))
    assert [each.model.name for each in recipe.experts] == ["code"]
    assert "models[0]: density 0 keeps nothing of it; the entry is left out." in recipe.notes
    with pytest.raises(RecipeError, match=r"parameters\.density: 0 for every expert, so that nothing is left to merge"):
        load(ties(parameters={"density": 0}))


def test_density_0_in_a_gradient_is_a_number_like_any_other(load: Load) -> None:
    (math, _) = load(ties(parameters={"density": [0, 1]})).experts
    assert [math.parameters["density"].at("w", depth) for depth in (0.0, 0.5)] == [0, 0.5]


def test_under_mergekit_keys_that_nobody_knows_are_said_and_read_over(load: Load) -> None:
    weighted = {"weight": 1, "lamda": 2, "dtype": "float32"}
    recipe = load(ties(parameters=weighted, dype="float32", normalize=True), semantics="mergekit")
    assert [note for note in recipe.notes if "nor has it in mergekit" in note] == [
        "dype has no effect, nor has it in mergekit; did you mean 'dtype'?",
        "normalize has no effect, nor has it in mergekit; it belongs under `parameters`",
        "parameters.lamda has no effect, nor has it in mergekit; did you mean 'lambda'?",
        "parameters.dtype has no effect, nor has it in mergekit; it belongs at the top level",
    ]
    with pytest.raises(RecipeError, match=r"parameters\.lamda: unknown key; did you mean 'lambda'\?"):
        load(ties(parameters=weighted | {"density": 0.2}))


def test_a_seed_of_the_command_line_wins_where_there_is_one(root: Path) -> None:
    seed = Parameter(name="seed", kind="int", default=0)
    methods = {**METHODS, "random": FakeMethod(parameters=(WEIGHT, seed))}
    for written in ({}, {"seed": 3}):
        recipe = load_recipe(ties(merge_method="random", parameters=written), methods=methods, root=root, seed=7)
        assert recipe.parameters["seed"].constant == 7
    recipe = load_recipe(ties(), methods=methods, root=root, seed=7)
    assert "--random-seed has no effect: ties draws no random numbers." in recipe.notes


def test_a_method_takes_as_many_models_as_it_says(root: Path) -> None:
    for fewest, most, wanted in ((1, 1, "1"), (3, None, "at least 3"), (3, 4, "3 to 4")):
        methods = {"some": FakeMethod(parameters=(), fewest=fewest, most=most)}
        with pytest.raises(RecipeError, match=f"models: some merges {wanted} besides the base; 2 listed"):
            load_recipe(ties(merge_method="some", parameters=None), methods=methods, root=root)


@pytest.mark.parametrize("listed", [["math"], ["base", "math"], ["math", "base"]])
def test_a_base_that_is_merged_with_is_no_expert_wherever_it_is_listed(root: Path, listed: list[str]) -> None:
    methods = {"pair": FakeMethod(parameters=(), operand="both", most=1)}
    recipe = ties(merge_method="pair", parameters=None, models=[{"model": name} for name in listed])
    assert [each.model.name for each in load_recipe(recipe, methods=methods, root=root).experts] == ["math"]
    with pytest.raises(RecipeError, match=r"base_model: missing; pair merges with a base"):
        load_recipe({**recipe, "base_model": None}, methods=methods, root=root)


SEVERAL = """# a family
name: first
merge_method: linear
models: [{model: a}, {model: b}]
---
name: first
merge_method: linear
models: [{model: first}]
...
---
merge_method: ties
"""


def test_several_recipes_in_a_file_are_named_with_how_to_run_them(tmp_path: Path) -> None:
    (tmp_path / "my family.yml").write_text(SEVERAL)
    with pytest.raises(RecipeError, match=r"holds 3 recipes, and one is merged at a time") as caught:
        read_document(tmp_path / "my family.yml")
    steps = [line.strip().partition(" && ") for line in str(caught.value).splitlines()[1:]]
    assert [merge for _, _, merge in steps] == [
        "ties-dist merge first.yml first",
        "ties-dist merge first-2.yml first-2",
        "ties-dist merge recipe-3.yml recipe-3",
    ]
    for split, _, merge in steps:  # what is advised is done
        subprocess.run(split, shell=True, check=True, cwd=tmp_path)
        assert read_document(tmp_path / merge.split()[2])[0]["merge_method"] in ("linear", "ties")
    assert read_document(tmp_path / "first-2.yml")[0]["models"] == [{"model": "first"}]


@pytest.mark.parametrize("text", ["---\na: 1\n", "a: 1\n---\n", "---\n---\na: 1\n...\n"])
def test_one_recipe_between_lines_of_dashes_is_one(text: str) -> None:
    assert read_document(text)[0] == {"a": 1}
