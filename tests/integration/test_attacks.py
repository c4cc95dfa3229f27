"""What an attacker of the engine once broke: each stays mended."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from safetensors.torch import load_file

import ties_dist
from tests import oracle
from tests.conftest import Checkpoints, random_models, write_checkpoint

SHAPES = {"a.weight": (1500, 1000), "b.weight": (1500, 1000)}


def edit_between_sampled_pages(folder: Path, tensors: dict[str, torch.Tensor], entries: int) -> None:
    """Double a run of entries, trying places until the checkpoint's identity does not change."""
    from ties_dist.checkpoints.catalogue import open_checkpoint
    from ties_dist.inputs.opening import identify
    from ties_dist.storage.readers import open_reader

    def identity() -> str:
        return identify(open_checkpoint(folder, name="x", reader=open_reader))

    before = identity()
    for start in range(0, tensors["a.weight"].numel() - entries, entries):
        edited = {name: t.clone() for name, t in tensors.items()}
        edited["a.weight"].view(-1)[start : start + entries] += 0.01
        write_checkpoint(folder, edited)
        if identity() == before:
            tensors.update(edited)
            return
    raise AssertionError("every place is sampled")


def test_a_stale_cache_does_not_move_the_cut_of_ties(merge_job: Checkpoints, tmp_path: Path) -> None:
    models = random_models(SHAPES, experts=2, dtype=torch.bfloat16)
    recipe = merge_job(models, options={"tie_policy": "exact_k"})
    ties_dist.merge(recipe, tmp_path / "before", cache_dir=tmp_path / "cache")
    edit_between_sampled_pages(tmp_path / "expert-0", models[1], 40_000)
    report = ties_dist.merge(recipe, tmp_path / "after", cache_dir=str(tmp_path / "cache"))
    base, *experts = [{n: oracle.from_torch(t) for n, t in model.items()} for model in models]
    expected = oracle.ties(base, experts, density=0.2, tie_policy="exact_k")
    written = {n: oracle.from_torch(t) for n, t in load_file(tmp_path / "after" / "model.safetensors").items()}
    assert oracle.same_bytes(written, expected.tensors) == []
    assert [e.kept_fraction for e in report.experts] == [int(3_000_000 * 0.2) / 3_000_000] * 2


def test_inputs_written_again_are_not_already_done(merge_job: Checkpoints, tmp_path: Path) -> None:
    models = random_models({"a.weight": (300, 1000)}, experts=1)
    recipe = merge_job(models)
    ties_dist.merge(recipe, tmp_path / "out")
    assert ties_dist.merge(recipe, tmp_path / "out").already_done
    file = tmp_path / "expert-0" / "model.safetensors"
    os.utime(file, ns=(1, 1))
    assert ties_dist.merge(recipe, tmp_path / "out").already_done
    edit_between_sampled_pages(tmp_path / "expert-0", models[1], 20_000)
    with pytest.raises(ties_dist.CheckpointError, match="made before these inputs were written again"):
        ties_dist.merge(recipe, tmp_path / "out")
    assert not ties_dist.merge(recipe, tmp_path / "out", fresh=True, overwrite=True).already_done


@pytest.mark.parametrize("companions", [["../victim"], None, 5, "README.md", [["README.md"]], ["/etc/hostname"]])
def test_a_damaged_manifest_removes_nothing_but_our_own(
    companions: object, merge_job: Checkpoints, tmp_path: Path
) -> None:
    recipe = merge_job(random_models({"a.weight": (30, 10)}, experts=1))
    out = tmp_path / "outs" / "out"
    ties_dist.merge(recipe, out)
    victim = tmp_path / "outs" / "victim"
    victim.write_text("precious")
    manifest = out / ".ties_dist" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "companions": companions}))
    other = json.loads(recipe.read_text()) | {"parameters": {"density": 0.5}}
    recipe.write_text(json.dumps(other))
    assert not ties_dist.merge(recipe, out, overwrite=True).already_done
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("text", ["[]", "null", "{", "{}"])
def test_an_unreadable_manifest_does_not_stop_an_overwrite(text: str, merge_job: Checkpoints, tmp_path: Path) -> None:
    recipe = merge_job(random_models({"a.weight": (30, 10)}, experts=1))
    digest = ties_dist.merge(recipe, tmp_path / "out").output_digest
    (tmp_path / "out" / ".ties_dist" / "manifest.json").write_text(text)
    assert ties_dist.merge(recipe, tmp_path / "out", overwrite=True).output_digest == digest


def test_an_input_file_inside_out_is_refused(merge_job: Checkpoints, tmp_path: Path) -> None:
    recipe = merge_job(random_models({"a.weight": (30, 10)}, experts=1))
    ties_dist.merge(recipe, tmp_path / "out")
    document = json.loads(recipe.read_text())
    document["models"][0]["model"] = "out/model.safetensors"
    recipe.write_text(json.dumps(document))
    with pytest.raises(ties_dist.OutputError, match=r"the input .* lies in OUT"):
        ties_dist.merge(recipe, tmp_path / "out", overwrite=True)


def test_a_cache_entry_with_an_impossible_bucket_is_counted_again(merge_job: Checkpoints, tmp_path: Path) -> None:
    recipe = merge_job(random_models({"a.weight": (300, 100)}, experts=1))
    cache = tmp_path / "cache"
    digest = ties_dist.merge(recipe, tmp_path / "one", cache_dir=cache).output_digest
    for entry in cache.glob("[0-9a-f]*"):
        group = zarr.open_group(entry, mode="r+")
        buckets = group["buckets"]
        buckets[:] = np.asarray(buckets[:]) + 99_999  # type: ignore[index]
    assert ties_dist.merge(recipe, tmp_path / "two", cache_dir=cache).output_digest == digest


def test_fresh_without_overwrite_keeps_what_it_may_not_replace(merge_job: Checkpoints, tmp_path: Path) -> None:
    recipe = merge_job(random_models({"a.weight": (30, 10)}, experts=1))
    ties_dist.merge(recipe, tmp_path / "out")
    unfinished = tmp_path / "out" / ".ties_dist" / ("0" * 32)
    unfinished.mkdir()
    recipe.write_text(json.dumps(json.loads(recipe.read_text()) | {"parameters": {"density": 0.5}}))
    with pytest.raises(ties_dist.OutputError, match="--overwrite"):
        ties_dist.merge(recipe, tmp_path / "out", fresh=True)
    assert unfinished.exists()


def test_the_public_functions_stay_functions(merge_job: Checkpoints) -> None:
    recipe = merge_job(random_models({"a.weight": (30, 10)}, experts=1))
    assert ties_dist.plan(recipe).elements == ties_dist.plan(str(recipe)).elements == 300


def test_as_many_expert_parameters_as_experts() -> None:
    model = {"a": torch.ones(3)}
    with pytest.raises(ties_dist.RecipeError, match="1 entries for 2 experts"):
        ties_dist.merge_state_dicts(model, [model, model], expert_parameters=[{}], parameters={"density": 0.2})
