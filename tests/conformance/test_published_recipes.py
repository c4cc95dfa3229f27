"""Recipes that people published for mergekit: each tensor's numbers are those that mergekit 0.1.5 resolves.

mergekit's own configuration, search and interpolation run in its environment, as its planner calls them; where tensors
stand among the layers is said here, since it would need models for that.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conformance.test_mergekit import OFFLINE, find_mergekit
from ties_dist.methods import METHODS
from ties_dist.recipe.checking import check_recipe

RECIPES: dict[str, dict[str, Any]] = yaml.safe_load(
    (Path(__file__).parents[1] / "unit" / "recipe" / "published.yml").read_text()
)
LAYERS = 5
"""Of recipes that list whole models."""
PARTS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm")
RESOLVE = """
import json, sys
from mergekit import merge_methods
from mergekit.config import ConfigReader, InputSliceDefinition, MergeConfiguration, OutputSliceDefinition
from mergekit.parameter_resolver import resolve_parameters

def resolve(recipe, tensors):
    config = MergeConfiguration.model_validate(recipe)
    module = next(iter(config.modules.values())) if config.modules else None
    models = config.models or (module and module.models)
    if models:  # as MergePlanner.normalize_config
        listed = [InputSliceDefinition(model=m.model, layer_range=(0, 1), parameters=m.parameters) for m in models]
        if config.base_model and config.base_model not in [m.model for m in models]:
            listed.append(InputSliceDefinition(model=config.base_model, layer_range=(0, 1)))
        slices = [OutputSliceDefinition(sources=listed)]
    else:
        slices = module.slices if module else config.slices
    reader = ConfigReader(config=config, t=0, slice_out=slices[0], module=module)
    method = merge_methods.get(config.merge_method)
    method.validate_inputs([s.model for s in slices[0].sources], reader.base_model)
    found = {}
    for name, depth in tensors.items():
        at = reader.with_t(depth)
        shared, own = resolve_parameters(
            method.spec, tensor_name=name, inputs={s.model: name for s in slices[0].sources},
            sources=at.parameter_sources, base_model=at.base_model, t=depth)
        found[name] = {"": shared} | {str(model): numbers for model, numbers in own.items()}
    return found

print(json.dumps({name: resolve(*job) for name, job in json.load(sys.stdin).items()}))
"""


def layers_of(recipe: dict[str, Any]) -> int:
    listed = [recipe, *recipe.get("modules", {}).values()]
    ends = [source["layer_range"][1] for each in listed for s in each.get("slices", []) for source in s["sources"]]
    return ends[0] if ends else LAYERS


def tensors_of(recipe: dict[str, Any]) -> dict[str, float]:
    """Name and depth, as MergePlanner.plan_slice has it."""
    last = layers_of(recipe) - 1
    inner = {f"model.layers.{i}.{part}.weight": i / last for i in range(last + 1) for part in PARTS}
    return {"model.embed_tokens.weight": 0.0, **inner, "model.norm.weight": 0.0, "lm_head.weight": 0.0}


@pytest.fixture(scope="session")
def resolved() -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """Recipe, tensor, model, parameter: the number. What holds for the whole merge is under the model ``."""
    executable = find_mergekit()
    if executable is None:
        pytest.skip("mergekit is not installed: see test_mergekit.py")
    jobs = {name: [recipe, tensors_of(recipe)] for name, recipe in RECIPES.items()}
    done = subprocess.run(
        [str(executable.resolve().parent / "python"), "-c", RESOLVE],
        input=json.dumps(jobs), text=True, capture_output=True, env=os.environ | OFFLINE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("name", RECIPES)
def test_every_number_is_mergekits(name: str, resolved: dict[str, Any]) -> None:
    recipe = RECIPES[name]
    tensors = tensors_of(recipe)
    found = check_recipe(recipe, methods=METHODS, semantics="mergekit", tensors=list(tensors), layers=layers_of(recipe))
    assert found.problems == ()
    assert [each for each in found.mergekit if each.startswith("refuse")] == []
    compared = 0
    for each in found.tensors:
        assert each.depth == tensors[each.tensor]
        for number in each.numbers:
            theirs = resolved[name][each.tensor][number.model or ""]
            if number.parameter != "seed":  # theirs is a flag
                assert theirs[number.parameter] == number.value, (each.tensor, number)
                compared += 1
    assert compared >= 2 * len(tensors)
