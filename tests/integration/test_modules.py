"""Embedding models as sentence-transformers saves them: modules in folders of their own, some with weights.

The expected model is restated here: modules.json lists the modules, each is loaded from the folder of its `path`, and
every tensor is merged by the oracle under the name it has there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import ties_dist
from tests import oracle
from tests.conftest import random_models, write_checkpoint
from ties_dist.errors import CheckpointError

SHAPES = {"": {"embeddings.weight": (40, 16), "encoder.layer.0.weight": (16, 16)},
          "2_Dense": {"linear.weight": (8, 16)}, "3_Dense": {"linear.weight": (8, 8), "linear.bias": (8,)}}  # fmt: skip
MODULES = ("", "1_Pooling", "2_Dense", "3_Dense", "4_Normalize")
Model = Mapping[str, Mapping[str, Tensor]]
"""By module folder."""


def embedding_models(experts: int = 2) -> list[Model]:
    parts = {
        folder: random_models(shapes, experts=experts, seed=i) for i, (folder, shapes) in enumerate(SHAPES.items())
    }
    return [{folder: models[i] for folder, models in parts.items()} for i in range(experts + 1)]


def save(folder: Path, model: Model, *, first: str = "", shards: int = 1) -> None:
    """As sentence-transformers does. first: the folder of the first module; older versions gave it one."""
    paths = [first, *MODULES[1:]]
    modules = [{"idx": i, "name": str(i), "path": p, "type": f"x.Module{i}"} for i, p in enumerate(paths)]
    folder.mkdir(parents=True)
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode": "cls"}')
    for at, tensors in model.items():
        place = folder / (at or first)
        write_checkpoint(place, tensors, shards=1 if at else shards, config={"dtype": "float32", "of": at})
    (folder / (first or ".") / "tokenizer.json").write_text("{}")


def loaded(folder: Path) -> Model:
    """What the loader makes of a folder: for every module that has weights, its tensors."""
    paths = [module["path"] for module in json.loads((folder / "modules.json").read_text())]
    found = {}
    for i, path in enumerate(paths):
        files = sorted((folder / path).glob("*.safetensors"))
        if files:
            found[path if i else ""] = {n: t for file in files for n, t in load_file(file).items()}
    return found


def expected(models: list[Model], density: float = 0.2) -> Model:
    named = [
        {f"{at}/{n}" if at else n: oracle.from_torch(t) for at, ts in model.items() for n, t in ts.items()}
        for model in models
    ]
    merged = oracle.ties(named[0], named[1:], density=density).tensors
    return {
        at: {n: torch.from_numpy(merged[f"{at}/{n}" if at else n]) for n in tensors}
        for at, tensors in models[0].items()
    }


def write_all(root: Path, models: list[Model], **how: object) -> Path:
    names = ["base", *(f"expert-{i}" for i in range(len(models) - 1))]
    for name, model in zip(names, models, strict=True):
        save(root / name, model, **how)  # type: ignore[arg-type]
    recipe = root / "recipe.yml"
    recipe.write_text(json.dumps({
        "merge_method": "ties", "base_model": "base", "models": [{"model": n} for n in names[1:]],
        "parameters": {"density": 0.2},
    }))  # fmt: skip
    return recipe


def assert_same(found: Model, wanted: Model) -> None:
    assert found.keys() == wanted.keys()
    for at, tensors in wanted.items():
        assert found[at].keys() == tensors.keys()
        assert all(torch.equal(found[at][n], t) for n, t in tensors.items()), at


@pytest.mark.parametrize("first", ["", "0_Transformer"])
@pytest.mark.parametrize("shards", [1, 2])
def test_weights_of_all_modules_are_merged_and_written_back_where_they_were(
    first: str, shards: int, tmp_path: Path
) -> None:
    models = embedding_models()
    recipe = write_all(tmp_path, models, first=first, shards=shards)
    planned = ties_dist.plan(recipe)
    assert planned.elements == sum(t.numel() for tensors in models[0].values() for t in tensors.values())
    assert planned.companions.keys() >= {"modules.json", "1_Pooling/config.json", "2_Dense/config.json"}
    ties_dist.merge(recipe, tmp_path / "out")
    assert_same(loaded(tmp_path / "out"), expected(models))
    copied = [p.relative_to(tmp_path / "base") for p in (tmp_path / "base").rglob("*") if p.suffix == ".json"]
    for name in copied:
        if name.name != "model.safetensors.index.json":
            assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "base" / name).read_bytes()
    index = tmp_path / "out" / first / "model.safetensors.index.json"
    assert index.exists() == (shards == 2)
    if shards == 2:
        assert json.loads(index.read_text())["weight_map"].keys() == models[0][""].keys()
    assert ties_dist.merge(recipe, tmp_path / "out").already_done


def test_models_of_old_and_new_layout_merge(tmp_path: Path) -> None:
    models = embedding_models()
    recipe = write_all(tmp_path, models)
    (tmp_path / "expert-0").rename(tmp_path / "moved")
    save(tmp_path / "expert-0", models[1], first="0_Transformer")
    ties_dist.merge(recipe, tmp_path / "out")
    assert_same(loaded(tmp_path / "out"), expected(models))


def test_modules_keep_their_folders_whatever_the_shards_and_config_follows_the_dtype(tmp_path: Path) -> None:
    recipe = write_all(tmp_path, embedding_models())
    document = json.loads(recipe.read_text()) | {"out_dtype": "bfloat16"}
    recipe.write_text(json.dumps(document))
    ties_dist.merge(recipe, tmp_path / "out", max_shard_size=600)
    shards = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.safetensors"))
    assert shards == ["2_Dense/model.safetensors", "3_Dense/model.safetensors",
                      "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]  # fmt: skip
    assert '"dtype": "bfloat16"' in (tmp_path / "out" / "config.json").read_text()
    assert loaded(tmp_path / "out")["2_Dense"]["linear.weight"].dtype == torch.bfloat16


def test_another_merge_leaves_nothing_of_modules_that_it_lacks(tmp_path: Path) -> None:
    models = embedding_models()
    recipe = write_all(tmp_path, models)
    ties_dist.merge(recipe, tmp_path / "out")
    plain = [dict(model[""]) for model in models]
    for name, tensors in zip(("base", "expert-0", "expert-1"), plain, strict=True):
        write_checkpoint(tmp_path / "plain" / name, tensors, config={})
    (tmp_path / "plain" / "recipe.yml").write_text(recipe.read_text())
    ties_dist.merge(tmp_path / "plain" / "recipe.yml", tmp_path / "out", overwrite=True)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        ".ties_dist", "README.md", "config.json", "model.safetensors", "ties_dist_recipe.yml",
    }  # fmt: skip


def test_a_router_has_modules_of_its_own(tmp_path: Path) -> None:
    models = embedding_models(1)
    for name, model in zip(("base", "expert-0"), models, strict=True):
        folder = tmp_path / name
        for route, at in (("query_0_Dense", "2_Dense"), ("document_0_Dense", "3_Dense")):
            write_checkpoint(folder / route, model[at], config={})
        (folder / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": "", "type": "x.Router"}]))
        routes = {"types": {"query_0_Dense": "x.Dense", "document_0_Dense": "x.Dense"}, "structure": {}}
        (folder / "router_config.json").write_text(json.dumps(routes))
        (folder / "config.json").write_text("{}")
        save_file({"shared": model["2_Dense"]["linear.weight"]}, folder / "model.safetensors")
    recipe = {"merge_method": "linear", "models": [{"model": str(tmp_path / n), "parameters": {"weight": 1.0}}
                                                   for n in ("base", "expert-0")]}  # fmt: skip
    ties_dist.merge(recipe, tmp_path / "out")
    found = load_file(tmp_path / "out" / "query_0_Dense" / "model.safetensors")["linear.weight"]
    one, other = (model["2_Dense"]["linear.weight"] for model in models)
    assert torch.equal(found, (one + other) / 2)


@pytest.mark.parametrize(
    ("modules", "said"),
    [
        ('[{"path": "../elsewhere"}]', "'../elsewhere' is no folder of this model"),
        ('[{"path": ""}, {"path": "a/../../b"}]', "'a/../../b' is no folder of this model"),
        ('{"path": ""}', "must be a list of modules with a `path` each"),
        ('[{"path": 1}]', "must be a list of modules with a `path` each"),
        ('[{"path": ', "modules.json: not valid JSON"),
    ],
)
def test_a_damaged_modules_file_is_refused(modules: str, said: str, tmp_path: Path) -> None:
    recipe = write_all(tmp_path, embedding_models(1))
    (tmp_path / "base" / "modules.json").write_text(modules)
    with pytest.raises(CheckpointError, match=said):
        ties_dist.plan(recipe)


def test_a_module_whose_weights_cannot_be_read_is_refused(tmp_path: Path) -> None:
    recipe = write_all(tmp_path, embedding_models(1))
    (tmp_path / "base" / "2_Dense" / "model.safetensors").rename(tmp_path / "base" / "2_Dense" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"2_Dense: pytorch_model\.bin: only safetensors are read"):
        ties_dist.plan(recipe)


def test_a_modules_weights_may_not_be_a_link_that_leaves_the_model(tmp_path: Path) -> None:
    recipe = write_all(tmp_path, embedding_models(1))
    file = tmp_path / "base" / "2_Dense" / "model.safetensors"
    file.rename(tmp_path / "away.safetensors")
    file.symlink_to(tmp_path / "away.safetensors")
    with pytest.raises(CheckpointError, match=r"is a link to .*away\.safetensors, outside of its folder"):
        ties_dist.plan(recipe)
