"""One parameter under several names, from files to files: the same numbers however a model stores it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import ties_dist
from tests import oracle
from tests.conftest import random_models, write_checkpoint
from tests.integration.command import run
from ties_dist.errors import CheckpointError

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SHAPES = {EMBED: (30, 8), "model.layers.0.mlp.weight": (40, 8), "model.norm.weight": (8,)}
Model = Mapping[str, Tensor]


def once(model: Model) -> dict[str, Tensor]:
    return dict(model)


def twice(model: Model) -> dict[str, Tensor]:
    return {**model, HEAD: model[EMBED].clone()}


def head_alone(model: Model) -> dict[str, Tensor]:
    return {HEAD if name == EMBED else name: tensor for name, tensor in model.items()}


def merged(root: Path, models: Sequence[Model], config: object = None, **recipe: Any) -> dict[str, Tensor]:
    for i, model in enumerate(models):
        write_checkpoint(root / f"m{i}", model, shards=2, config=config)  # type: ignore[arg-type]
    document = {
        "merge_method": "ties",
        "base_model": str(root / "m0"),
        "models": [{"model": str(root / f"m{i}")} for i in range(1, len(models))],
        "parameters": {"density": 0.2},
        **recipe,
    }
    ties_dist.merge(document, root / "out")
    found: dict[str, Tensor] = {}
    for file in (root / "out").glob("*.safetensors"):
        found |= load_file(file)
    return found


def equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [None, {}, {"tie_word_embeddings": True}, {"architectures": ["LlamaForCausalLM"]}])
def test_the_numbers_do_not_depend_on_how_often_a_parameter_is_stored(
    config: dict[str, object] | None, dtype: torch.dtype, tmp_path: Path
) -> None:
    models = random_models(SHAPES, experts=2, dtype=dtype)
    base, *experts = ({n: oracle.from_torch(t) for n, t in m.items()} for m in models)
    expected = {n: oracle.to_torch(t) for n, t in oracle.ties(base, experts, density=0.2).tensors.items()}
    for i, store in enumerate(itertools.product((once, twice), (once, twice, head_alone), (twice,))):
        found = merged(tmp_path / str(i), [s(m) for s, m in zip(store, models, strict=True)], config)
        assert found.keys() == store[0](models[0]).keys()
        assert all(equal(tensor, expected[EMBED if name == HEAD else name]) for name, tensor in found.items())


@pytest.mark.parametrize(
    "recipe",
    [
        {"ties_dist": {"tie_policy": "exact_k"}, "parameters": {"density": 0.21}},
        {"ties_dist": {"semantics": "mergekit"}, "parameters": {"density": 0.3, "weight": 1.0}},
        {"merge_method": "dare_linear", "parameters": {"density": 0.5, "weight": 1.0, "seed": 3}},
        {"merge_method": "task_arithmetic", "parameters": {}},
        {"parameters": {"density": 0.3, "weight": [{"filter": "embed_tokens", "value": 0.25}, {"value": 1.0}]}},
    ],
    ids=json.dumps,
)
def test_cuts_of_ties_random_draws_and_filters_go_by_the_canonical_name(recipe: Any, tmp_path: Path) -> None:
    models = [{n: (t * 64).round() / 64 for n, t in m.items()} for m in random_models(SHAPES, experts=2)]
    models = [{n: t + (i * (torch.arange(t.numel()).reshape(t.shape) % 3 - 1)) / 64 for n, t in m.items()}
              for i, m in enumerate(models)]  # fmt: skip
    wanted = merged(tmp_path / "once", models, **recipe)
    for i, store in enumerate([(twice, twice, twice), (twice, head_alone, once)]):
        found = merged(tmp_path / str(i), [s(m) for s, m in zip(store, models, strict=True)], **recipe)
        assert all(equal(tensor, wanted[EMBED if name == HEAD else name]) for name, tensor in found.items())
    llama = {"architectures": ["LlamaForCausalLM"]}
    alone = merged(tmp_path / "alone", [head_alone(m) for m in models], llama, **recipe)
    assert equal(alone[HEAD], wanted[EMBED])


def test_state_dicts_have_each_parameter_once(tmp_path: Path) -> None:
    models = random_models(SHAPES, experts=2)
    wanted = ties_dist.merge_state_dicts(models[0], models[1:], parameters={"density": 0.2})
    found = ties_dist.merge_state_dicts(
        twice(models[0]), [twice(m) for m in models[1:]], parameters={"density": 0.2}
    )  # fmt: skip
    assert found.keys() == twice(models[0]).keys()
    assert all(equal(tensor, wanted[EMBED if name == HEAD else name]) for name, tensor in found.items())


def test_two_different_tensors_are_two_parameters_whatever_the_config_says(tmp_path: Path) -> None:
    """T5 v1.1 and FLAN-T5, as transformers 5 saves them."""
    models = random_models({"shared.weight": (30, 8), HEAD: (30, 8)}, experts=2)
    found = merged(tmp_path, models, {"model_type": "t5", "tie_word_embeddings": True})
    base, *experts = ({n: oracle.from_torch(t) for n, t in m.items()} for m in models)
    expected = oracle.ties(base, experts, density=0.2).tensors
    assert oracle.same_bytes({n: oracle.from_torch(t) for n, t in found.items()}, expected) == []


def test_another_number_for_another_name_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i, model in enumerate(random_models(SHAPES, experts=1)):
        write_checkpoint(tmp_path / f"m{i}", twice(model))
    recipe = {
        "merge_method": "ties", "base_model": "m0", "models": [{"model": "m1"}],
        "parameters": {"density": 0.2, "weight": [{"filter": "lm_head", "value": 0.25}, {"value": 1.0}]},
    }  # fmt: skip
    (tmp_path / "recipe.yml").write_text(json.dumps(recipe))
    ended = run(capsys, "plan", tmp_path / "recipe.yml")
    assert ended.status == 0
    assert f"{HEAD} has 1, as {EMBED}, and not 0.25" in ended.err.replace("\n", " ")


# -- what plan says ----------------------------------------------------------------------------------------------------


def large(root: Path, *, changed: bool = False) -> Path:
    """A recipe of models whose embeddings are larger than 64 pages."""
    for i, model in enumerate(random_models({EMBED: (3000, 64), "model.norm.weight": (64,)}, experts=1)):
        stored = twice(model)
        if changed and i:
            stored[HEAD][1234, 5] += 1
        write_checkpoint(root / f"m{i}", stored)
    recipe = {
        "merge_method": "ties", "base_model": "m0", "models": [{"model": "m1"}], "parameters": {"density": 0.2},
    }  # fmt: skip
    (root / "recipe.yml").write_text(json.dumps(recipe))
    return root / "recipe.yml"


def test_plan_says_on_what_d_depends_until_a_merge_has_proven_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = large(tmp_path)
    before = ties_dist.plan(recipe)
    assert before.elements == 3000 * 64 + 64
    assert before.fingerprint is None
    assert (before.unproven, before.proof_bytes) == ((f"{HEAD} is {EMBED}",), 2 * 2 * 3000 * 64 * 4)
    table = " ".join(run(capsys, "plan", recipe).out.replace("│", " ").split())
    assert f"192,064 if {HEAD} is {EMBED}, which the merge proves (reads 2.93MiB)" in table
    assert "known once that is proven" in table
    report = ties_dist.merge(recipe, tmp_path / "out")
    after = ties_dist.plan(recipe)
    assert (after.fingerprint, after.elements) == (report.fingerprint, report.elements)
    assert (after.unproven, after.proof_bytes) == ((), 0)


def test_a_merge_finds_the_one_number_that_differs(tmp_path: Path) -> None:
    recipe = large(tmp_path, changed=True)
    with pytest.raises(CheckpointError, match=r"expert 'm1': model\.embed_tokens\.weight and lm_head\.weight differ"):
        ties_dist.merge(recipe, tmp_path / "out")


def test_models_without_other_names_are_planned_as_before(tmp_path: Path) -> None:
    for i, model in enumerate(random_models(SHAPES, experts=1)):
        write_checkpoint(tmp_path / f"m{i}", model)
    recipe = {"merge_method": "ties", "base_model": str(tmp_path / "m0"), "models": [{"model": str(tmp_path / "m1")}]}
    found = ties_dist.plan({**recipe, "parameters": {"density": 0.2}})
    assert found.fingerprint is not None
    assert found.elements == sum(int(np.prod(shape)) for shape in SHAPES.values())
