"""Merges of many families, as transformers 4.57 and 5 save them, against a restatement over the loaded models.

transformers decides what a parameter is: each of `named_parameters` once, and the stored floating-point buffers. A
model is stored as it was saved, with every name of every parameter, and without a word of tying in config.json.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from torch import Tensor

import ties_dist
from tests import oracle
from tests.conftest import write_checkpoint
from tests.families.loaded import config_of, load, parameters, shared_names, tensors, ties_by_default

STORED = ("as-saved", "twice", "silent")


def written(folder: Path, saved: Path, how: str, seed: int) -> Path:
    """The saved model, or a fine-tune of it: equal tensors stay equal."""
    config, stored = config_of(saved), tensors(saved)
    if how == "silent":
        config.pop("tie_word_embeddings", None)
    if how == "twice":
        for group in shared_names(saved, saved.name):
            copies = [stored[name] for name in group if name in stored]
            stored |= {name: copies[0].clone() for name in group if name not in stored and copies}
    moved = {name: moved_by(seed, tensor) if seed else tensor for name, tensor in stored.items()}
    return write_checkpoint(folder, moved, shards=1 if how == "twice" else 3, config=config)


def moved_by(seed: int, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    content = hashlib.sha256(tensor.numpy().tobytes() + bytes([seed])).digest()
    draw = torch.Generator().manual_seed(int.from_bytes(content[:7], "little"))
    return tensor + 0.01 * torch.randn(tensor.shape, generator=draw)


@pytest.mark.parametrize("how", STORED)
def test_a_merge_is_that_of_the_loaded_models_parameters(saved: Path, how: str, tmp_path: Path) -> None:
    family = saved.name
    said = config_of(saved).get("tie_word_embeddings")
    if how == "silent" and said is not None and said != ties_by_default(family):
        pytest.skip("nobody writes it: without the key the class would tie otherwise")
    base, *experts = (written(tmp_path / f"m{seed}", saved, how, seed) for seed in range(3))
    recipe = {
        "merge_method": "ties", "base_model": str(base), "models": [{"model": str(e)} for e in experts],
        "parameters": {"density": 0.2},
    }  # fmt: skip
    report = ties_dist.merge(recipe, tmp_path / "out")
    models = [parameters(folder, family) for folder in (base, *experts)]
    assert report.elements == sum(array.size for array in models[0].values())
    expected = oracle.ties(models[0], models[1:], density=0.2).tensors
    assert oracle.same_bytes(parameters(tmp_path / "out", family), expected) == []
    assert tensors(tmp_path / "out").keys() == tensors(base).keys()
    assert load(tmp_path / "out", family).config.to_dict().keys() == load(base, family).config.to_dict().keys()
