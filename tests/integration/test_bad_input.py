"""Whatever is wrong, the command line says so in words, exits 2, loses nothing and leaves nothing that looks merged.

Everything goes through `ties-dist` itself. `refused` merges twice: into a new OUT, and over a finished older model that
must stay as it is, byte for byte.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

import ties_dist
from tests.conftest import Checkpoints, random_models, write_checkpoint, write_job
from tests.integration.command import SHAPES, Outcome, contents, finish, readable_files, run, start
from ties_dist.errors import OutputError, StoppedError
from ties_dist.output.lock import RunLock
from ties_dist.storage.local import LocalWriter
from ties_dist.storage.local_place import LocalPlace

Model = dict[str, Tensor]
Refused = Callable[..., str]
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def older_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OUT of a finished merge of something else."""
    root = tmp_path_factory.mktemp("older")
    for name, model in zip(("base", "expert"), random_models({"w": (5, 7)}, experts=1, seed=9), strict=True):
        write_checkpoint(root / name, model)
    recipe = {"merge_method": "task_arithmetic", "base_model": str(root / "base"), "models": [{"model": "expert"}]}
    (root / "recipe.yml").write_text(json.dumps(recipe))
    ties_dist.merge(root / "recipe.yml", root / "out", cache_dir=root / "cache")
    return root / "out"


@pytest.fixture
def refused(tmp_path: Path, older_model: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Asserts that a merge is refused as it must be, and returns the message.

    created: OUT may be there afterwards, without a model.
    """

    def check(recipe: Path, *words: str, options: Sequence[object] = (), created: bool = False) -> str:
        out = tmp_path / "out"
        ended = run(capsys, "merge", recipe, out, *options)
        assert_says(ended, *words)
        assert created or not out.exists()
        assert readable_files(out) == []

        replaced = tmp_path / "replaced"
        shutil.copytree(older_model, replaced)
        before = contents(replaced)
        assert_says(run(capsys, "merge", recipe, replaced, "--overwrite", *options), *words)
        now = contents(replaced)
        assert {name: now.get(name) for name in before} == before
        return ended.err

    return check


def assert_says(ended: Outcome, *words: str) -> None:
    """Exit status 2, nothing on standard output, and a message with these words and no traceback."""
    assert ended.status == 2, ended.err
    assert ended.out == ""
    assert "Traceback" not in ended.err
    for word in words:
        assert word in ended.err
    assert "/.." not in ended.err and ended.err.count("\n") < 40


def two_experts(seed: int = 0) -> list[Model]:
    return random_models(SHAPES, experts=2, seed=seed)


def with_value(model: Model, name: str, index: int, value: float) -> Model:
    changed = model[name].clone()
    changed.view(-1)[index] = value
    return {**model, name: changed}


# -- malformed checkpoints --------------------------------------------------------------------------------------------


def rewrite_header(file: Path, change: Callable[[dict[str, dict[str, list[int]]]], str | None]) -> None:
    """Change a file's header in place, or replace its text by what `change` returns; the tensors' bytes stay."""
    raw = file.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:end])
    text = (change(header) or json.dumps(header)).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[end:])


def shift(tensor: str, start: int, stop: int) -> Callable[[dict[str, dict[str, list[int]]]], None]:
    def change(header: dict[str, dict[str, list[int]]]) -> None:
        begin, end = header[tensor]["data_offsets"]
        header[tensor]["data_offsets"] = [begin + start, end + stop]

    return change


def rewrite_index(expert: Path, tensor: str, shard: str) -> None:
    index = json.loads((expert / INDEX).read_text())
    index["weight_map"][tensor] = shard
    (expert / INDEX).write_text(json.dumps(index))


def cut_tail(expert: Path) -> None:
    raw = (expert / SECOND).read_bytes()
    (expert / SECOND).write_bytes(raw[:-5])


def cut_inside_the_header(expert: Path) -> None:
    raw = (expert / FIRST).read_bytes()
    (expert / FIRST).write_bytes(raw[:50])


def leave_nothing(expert: Path) -> None:
    (expert / FIRST).write_bytes(b"")


def claim_a_huge_header(expert: Path) -> None:
    with open(expert / FIRST, "r+b") as file:
        file.write((100_000_001).to_bytes(8, "little"))
        file.truncate(100_000_100)  # sparse: long enough for what it claims


def overlap(expert: Path) -> None:
    rewrite_header(expert / FIRST, shift("layers.0.weight", -4, -4))


def leave_a_gap(expert: Path) -> None:
    rewrite_header(expert / FIRST, shift("layers.0.weight", 4, 4))
    with open(expert / FIRST, "ab") as file:
        file.write(bytes(4))


def append_bytes(expert: Path) -> None:
    with open(expert / FIRST, "ab") as file:
        file.write(b"trailing")


def repeat_a_key(expert: Path) -> None:
    rewrite_header(expert / SECOND, lambda h: json.dumps(h)[:-1] + f', "norm.weight": {json.dumps(h["norm.weight"])}}}')


def repeat_an_index_key(expert: Path) -> None:
    text = (expert / INDEX).read_text()
    (expert / INDEX).write_text(text.replace('"norm.weight"', f'"norm.weight": "{FIRST}", "norm.weight"'))


def remove_a_shard(expert: Path) -> None:
    (expert / SECOND).unlink()


def leave_the_directory(expert: Path) -> None:
    """The file is there, and whole: it must be refused all the same."""
    rewrite_index(expert, "norm.weight", f"../base/{SECOND}")


def leave_by_an_absolute_path(expert: Path) -> None:
    rewrite_index(expert, "norm.weight", str((expert / SECOND).resolve()))


def name_a_tensor_that_is_not_there(expert: Path) -> None:
    rewrite_index(expert, "lm_head.weight", SECOND)


def write_an_lfs_pointer(expert: Path) -> None:
    (expert / FIRST).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut_tail, (SECOND, "truncated: the tensors end at byte")),
        (cut_inside_the_header, (FIRST, "truncated: header ends at byte")),
        (leave_nothing, (FIRST, "0 bytes, too short")),
        (claim_a_huge_header, (FIRST, "header of 100,000,001 bytes, at most 100,000,000 are allowed")),
        (overlap, (FIRST, "layers.0.weight: overlaps the tensor before")),
        (leave_a_gap, (FIRST, "layers.0.weight: leaves a gap after the tensor before")),
        (append_bytes, (FIRST, "trailing bytes")),
        (repeat_a_key, (SECOND, "key norm.weight appears twice in the header")),
        (repeat_an_index_key, (INDEX, "key norm.weight appears twice")),
        (remove_a_shard, (SECOND, "is named in the index but missing")),
        (leave_the_directory, (INDEX, f"'../base/{SECOND}' is not the plain name of a .safetensors file")),
        (leave_by_an_absolute_path, (INDEX, "is not the plain name of a .safetensors file in this directory")),
        (name_a_tensor_that_is_not_there, (SECOND, "lm_head.weight should be here", "no shard has it")),
        (write_an_lfs_pointer, (FIRST, "git-lfs pointer", "git lfs pull")),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_malformed_checkpoint_is_refused_before_anything_is_written(
    damage: Callable[[Path], None], words: Sequence[str], merge_job: Checkpoints, refused: Refused
) -> None:
    recipe = merge_job(two_experts(), shards=2)
    damage(recipe.parent / "expert-1")
    refused(recipe, "CheckpointError", "expert-1", *words)


def test_all_malformed_files_of_all_models_are_reported_together(merge_job: Checkpoints, refused: Refused) -> None:
    recipe = merge_job(two_experts(), shards=2)
    cut_tail(recipe.parent / "base")
    append_bytes(recipe.parent / "base")
    remove_a_shard(recipe.parent / "expert-1")
    refused(recipe, "checkpoint 'base'", "2 problems", "truncated", "trailing", "checkpoint 'expert-1'", "missing")


# -- models that do not fit together ----------------------------------------------------------------------------------


def test_a_tensor_missing_in_one_expert_is_refused(merge_job: Checkpoints, refused: Refused) -> None:
    models = two_experts()
    del models[2]["layers.1.weight"]
    refused(merge_job(models), "layers.1.weight", "missing in expert 'expert-1'", "Name the base")


def test_a_tensor_that_only_an_expert_has_is_refused(merge_job: Checkpoints, refused: Refused) -> None:
    models = two_experts()
    models[1]["adapter.weight"] = torch.zeros(3)
    refused(merge_job(models), "adapter.weight", "extra in expert 'expert-0'", "exclude")


def test_shape_mismatches_are_reported_together(merge_job: Checkpoints, refused: Refused) -> None:
    models = two_experts()
    models[1]["embed.weight"] = torch.zeros(41, 16)
    models[2]["norm.weight"] = torch.zeros(4, 4)
    refused(
        merge_job(models),
        "2 of 4 tensors do not match the base",
        "expert 'expert-0' has shape (41, 16), base (40, 16)",
        "expert 'expert-1' has shape (4, 4), base (16,)",
    )


def test_non_float_tensors_that_differ_are_refused_with_the_way_out(merge_job: Checkpoints, refused: Refused) -> None:
    models = two_experts()
    for i, model in enumerate(models):
        model["position_ids"] = torch.arange(4) + (i == 2)
    refused(merge_job(models), "position_ids", "expert 'expert-1' differs from the base", "non_float: base")


def test_a_tied_head_that_differs_from_the_embedding_is_refused(merge_job: Checkpoints, refused: Refused) -> None:
    models = two_experts()
    for model in models:
        model["model.embed_tokens.weight"] = model.pop("embed.weight")
        model["lm_head.weight"] = model["model.embed_tokens.weight"].clone()
    models[1]["lm_head.weight"][0, 0] += 1
    refused(merge_job(models, config={"tie_word_embeddings": True}), "expert 'expert-0'", "lm_head.weight", "differ")


# -- NaN and Inf ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("method", "options"),
    [("ties", {}), ("ties", {"trim_scope": "tensor"}), ("task_arithmetic", {}), ("linear", {})],
    ids=["ties_in_the_scan", "ties_per_tensor", "task_arithmetic_in_the_merge", "linear_in_the_merge"],
)
def test_nan_or_inf_in_an_expert_is_refused_naming_tensor_and_expert(
    bad: float, method: str, options: dict[str, str], merge_job: Checkpoints, refused: Refused
) -> None:
    models = two_experts()
    models[2] = with_value(models[2], "layers.1.weight", 17, bad)
    recipe = merge_job(models, method=method, options=options)
    said = refused(recipe, "NumericError", "layers.1.weight: 1 NaN or Inf in 'expert-1'", created=True)
    assert "in 'expert-0'" not in said and "in 'base'" not in said


def test_nan_is_found_where_thresholds_are_predicted_from_a_sample(merge_job: Checkpoints, refused: Refused) -> None:
    """Few distinct deltas, as 16-bit fine-tunes have them: there may be no scan that could meet it."""
    draw = torch.Generator().manual_seed(0)
    base = {name: torch.randint(-64, 65, shape, generator=draw) / 64 for name, shape in SHAPES.items()}
    expert = {name: t + torch.randint(-3, 4, t.shape, generator=draw) / 64 for name, t in base.items()}
    models = [{name: t.to(torch.bfloat16) for name, t in model.items()} for model in (base, expert)]
    models[1] = with_value(models[1], "norm.weight", 2, float("nan"))
    refused(merge_job(models), "norm.weight: 1 NaN or Inf in 'expert-0'", created=True)


@pytest.mark.parametrize("method", ["ties", "task_arithmetic"])
def test_nan_in_the_base_is_not_blamed_on_the_experts(method: str, merge_job: Checkpoints, refused: Refused) -> None:
    models = two_experts()
    models[0] = with_value(with_value(models[0], "norm.weight", 3, float("nan")), "norm.weight", 5, float("nan"))
    said = refused(merge_job(models, method=method), "norm.weight: 2 NaN or Inf in 'base'", created=True)
    assert "expert-0" not in said


def test_finite_weights_whose_difference_overflows_are_refused(merge_job: Checkpoints, refused: Refused) -> None:
    models = two_experts()
    models[0] = with_value(models[0], "norm.weight", 0, -3e38)
    models[1] = with_value(models[1], "norm.weight", 0, 3e38)
    refused(merge_job(models), "norm.weight", "expert 'expert-0' minus the base overflows", created=True)


def test_nan_in_an_excluded_tensor_is_nobodys_business(
    merge_job: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = two_experts()
    models[2] = with_value(models[2], "norm.weight", 0, float("nan"))
    recipe = merge_job(models, options={"exclude": ["norm.*"]})
    assert run(capsys, "merge", recipe, tmp_path / "out").status == 0


@pytest.mark.parametrize("options", [{}, {"trim_scope": "tensor"}], ids=["model", "tensor"])
def test_a_repaired_expert_is_merged_by_the_same_command(
    options: dict[str, str], merge_job: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = two_experts()
    bad = [*models[:2], with_value(models[2], "norm.weight", 0, float("nan"))]
    recipe = merge_job(bad, options=options)
    assert_says(run(capsys, "merge", recipe, tmp_path / "out"), "norm.weight")
    merge_job(models, options=options)
    assert run(capsys, "merge", recipe, tmp_path / "out").status == 0


@pytest.mark.parametrize(
    ("out_dtype", "largest", "words"),
    [
        ("float16", 60000.0, ("overflows F16", "out_dtype: float32", "smaller lambda")),
        ("bfloat16", 3.0e38, ("overflows BF16", "out_dtype: float32", "smaller lambda")),
        ("float32", 3.0e38, ("overflows F32", "smaller lambda")),
    ],
)
@pytest.mark.parametrize("method", ["ties", "task_arithmetic"])
def test_an_output_that_overflows_its_dtype_is_refused(
    method: str, out_dtype: str, largest: float, words: Sequence[str], merge_job: Checkpoints, refused: Refused
) -> None:
    models = two_experts()
    models[1] = with_value(models[1], "layers.0.weight", 5, largest)  # finite; four times it is beyond every type here
    parameters = {"lambda": 4.0} | ({"density": 0.2} if method == "ties" else {})
    recipe = merge_job(models, method=method, parameters=parameters, out_dtype=out_dtype)
    said = refused(recipe, "layers.0.weight: the result", "in 1 of 1,024 entries", *words, created=True)
    assert ("out_dtype: float32" in said) == (out_dtype != "float32")


# -- recipes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("models", [[], None, [{"model": "base"}]], ids=["empty", "absent", "the_base_alone"])
def test_a_recipe_without_experts_is_refused(models: object, merge_job: Checkpoints, refused: Refused) -> None:
    recipe = merge_job(two_experts())
    document = json.loads(recipe.read_text()) | {"models": models}
    recipe.write_text(json.dumps(document))
    refused(recipe, "RecipeError", "models: no experts to merge; list at least one")


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.system ['touch MARK']", "!!python/name:os.system", "!!python/object/new:int [7]"]
)
def test_yaml_tags_are_refused_and_never_run(
    tag: str, merge_job: Checkpoints, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = merge_job(two_experts())
    recipe.write_text(f"merge_method: ties\nbase_model: base\nmodels: {tag}\n")
    refused(recipe, "RecipeError", "line 3", "tags are refused and never run")
    assert not (tmp_path / "MARK").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"parameters": {"density": 20}}, ("parameters.density", "20", "0.2")),
        ({"parameters": {"density": 0}}, ("parameters.density", "0")),
        ({"parameters": {"densty": 0.2}}, ("parameters.densty: unknown key; did you mean 'density'?",)),
        ({"merge_methode": "ties"}, ("merge_methode: unknown key; did you mean 'merge_method'?",)),
        ({"merge_method": "tie"}, ("no method 'tie'; did you mean 'ties'?",)),
        ({"merge_method": "della"}, ("della", "mergekit", "does not support yet")),
        ({"tokenizer_source": "union"}, ("tokenizer_source", "does not support yet")),
        ({"ties_dist": {"trim_scop": "model"}}, ("ties_dist.trim_scop: unknown key; did you mean 'trim_scope'?",)),
        ({"ties_dist": {"elect": "mas"}}, ("ties_dist.elect: no value 'mas'; did you mean 'mass'?",)),
        ({"dtype": "float8"}, ("dtype: no dtype 'float8'",)),
        ({"base_model": "bse"}, ("base_model: 'bse' is not there",)),
        (
            {"parameters": {"density": [0.1, 0.3]}, "ties_dist": {"trim_scope": "model"}},
            ("varies inside the model", "trim_scope: tensor"),
        ),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_a_wrong_recipe_is_refused_with_the_nearest_valid_thing(
    change: dict[str, object], words: Sequence[str], merge_job: Checkpoints, refused: Refused
) -> None:
    recipe = merge_job(two_experts())
    recipe.write_text(json.dumps(json.loads(recipe.read_text()) | change))
    refused(recipe, "RecipeError", *words)


def test_a_recipe_that_is_not_there_is_refused(tmp_path: Path, refused: Refused) -> None:
    refused(tmp_path / "recipe.yaml", "RecipeError", "recipe.yaml' does not exist")


def test_a_checkpoint_in_the_place_of_the_recipe_is_refused(merge_job: Checkpoints, refused: Refused) -> None:
    recipe = merge_job(two_experts())
    refused(recipe.parent / "base" / "model.safetensors", "RecipeError", "is a checkpoint; the recipe is a YAML file")


# -- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--memory-budget", "1MiB"), ("PlanError", "--memory-budget 1MiB is too small", "Raise --memory-budget")),
        (("--unit-size", "512KiB"), ("PlanError", "--unit-size 512KiB is too small", "1MiB or more")),
        (("--unit-size", "1MB"), ("PlanError", "--unit-size", "too small", "1MiB or more")),
        (("--unit-size", "a lot"), ("'a lot' is not a size",)),
        (("--memory-budget", "-1"), ("-1",)),
        (("--executor", "ray", "--address", "ray://head:10001"), ("ties-dist submit RECIPE OUT --address http://",)),
        (("--executor", "ray", "--worker-resource", "spot"), ("'spot' is not NAME=NUMBER",)),
        (("--workers", "4"), ("--workers", "go with --executor ray")),
        (("--worker-timeout", "5"), ("--worker-timeout", "go with --executor ray")),
        (("--executor", "local", "--node-label", "a=b"), ("--node-label", "go with --executor ray")),
        (("--executor", "dask"), ("dask", "auto", "local", "ray")),
        (("--semantics", "papr"), ("--semantics: no semantics 'papr'; did you mean 'paper'?",)),
        (("--unknown",), ("No such option",)),
    ],
    ids=lambda value: " ".join(value) if str(value[0]).startswith("--") else "",
)
def test_an_option_that_cannot_be_had_is_refused(
    options: Sequence[str], words: Sequence[str], merge_job: Checkpoints, refused: Refused
) -> None:
    refused(merge_job(two_experts()), *words, options=options)


def test_the_budget_that_is_named_as_enough_is_enough(
    merge_job: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = merge_job(two_experts())
    ended = run(capsys, "merge", recipe, tmp_path / "out", "--memory-budget", "2MiB")
    assert_says(ended, "to at least")
    found = re.search(r"at least (\S+?)\.?$", ended.err, re.MULTILINE)
    assert found is not None
    assert run(capsys, "merge", recipe, tmp_path / "out", "--memory-budget", found[1]).status == 0


# -- OUT --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "out", ["expert-0", "expert-0/", "base/../expert-0", "link", "expert-0/merged", "base/a/b", "link/merged"]
)
def test_out_in_an_input_is_refused(out: str, merge_job: Checkpoints, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = merge_job(two_experts())
    (recipe.parent / "link").symlink_to("expert-0")
    before = contents(recipe.parent)
    ended = run(capsys, "merge", recipe, f"{recipe.parent}/{out}", "--overwrite", "--fresh")
    assert ended.status == 2
    assert "OutputError" in ended.err and "lies inside the input" in ended.err and "Traceback" not in ended.err
    assert contents(recipe.parent) == before


@pytest.mark.parametrize("out", ["adapter", "adapter/merged", "."])
def test_an_adapter_is_an_input_as_any_other(
    out: str, merge_job: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = two_experts()
    recipe = merge_job(models)
    adapter = tmp_path / "adapter"
    rows, columns = models[0]["layers.1.weight"].shape
    lora = {"lora_A.weight": torch.zeros(2, columns), "lora_B.weight": torch.zeros(rows, 2)}
    write_checkpoint(adapter, {f"base_model.model.layers.1.{name}": t for name, t in lora.items()})
    (adapter / "model.safetensors").rename(adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["layers.1"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    (adapter / ".ties_dist").mkdir()  # as if it had been merged here
    (tmp_path / ".ties_dist").mkdir()
    document = yaml.safe_load(recipe.read_text())
    document["models"][0]["model"] = "adapter"
    recipe.write_text(yaml.safe_dump(document))
    before = contents(adapter)
    said = "lies in OUT" if out == "." else f"lies inside the input {adapter}"
    assert_says(run(capsys, "merge", recipe, tmp_path / out, "--overwrite", "--fresh"), said)
    assert contents(adapter) == before


@pytest.mark.parametrize("linked", [False, True])
def test_an_input_in_out_is_refused(
    linked: bool, merge_job: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Named as a file, or a link in a folder of its own: what replaces OUT's model would replace the input."""
    recipe = merge_job(two_experts())
    assert run(capsys, "merge", recipe, tmp_path / "out").status == 0
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "model.safetensors").symlink_to(tmp_path / "out" / "model.safetensors")
    document = yaml.safe_load(recipe.read_text())
    document["models"][0]["model"] = str(tmp_path / ("linked" if linked else "out/model.safetensors"))
    recipe.write_text(yaml.safe_dump(document))
    before = contents(tmp_path / "out")
    said = "outside of its folder" if linked else "lies in OUT"
    assert_says(run(capsys, "merge", recipe, tmp_path / "out", "--overwrite"), said)
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("options", [(), ("--overwrite",), ("--fresh", "--overwrite")], ids=" ".join)
def test_a_folder_that_is_not_ours_is_refused_and_kept(
    options: Sequence[str], merge_job: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = merge_job(two_experts())
    write_checkpoint(tmp_path / "theirs", two_experts()[0])
    before = contents(tmp_path)
    assert_says(run(capsys, "merge", recipe, tmp_path / "theirs", *options), "not empty and was not written by ties_")
    assert contents(tmp_path) == before


def test_an_empty_folder_is_taken(merge_job: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = merge_job(two_experts())
    (tmp_path / "out").mkdir()
    assert run(capsys, "merge", recipe, tmp_path / "out").status == 0


@pytest.mark.parametrize("out", ["file", "file/below"])
def test_out_that_is_a_file_is_refused_and_kept(
    out: str, merge_job: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = merge_job(two_experts())
    (tmp_path / "file").write_text("mine")
    assert_says(run(capsys, "merge", recipe, tmp_path / out, "--overwrite"), "OutputError", "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_the_finished_model_of_another_merge_is_kept_without_overwrite(
    merge_job: Checkpoints, tmp_path: Path, older_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = merge_job(two_experts())
    shutil.copytree(older_model, tmp_path / "out")
    before = contents(tmp_path / "out")
    assert_says(run(capsys, "merge", recipe, tmp_path / "out"), "finished model of another merge", "--overwrite")
    assert_says(run(capsys, "merge", recipe, tmp_path / "out", "--fresh"), "finished model of another", "--overwrite")
    assert contents(tmp_path / "out") == before


@pytest.fixture
def read_only_folder(tmp_path: Path) -> Iterator[Path]:
    """A real read-only file system (root ignores permissions); skipped where nothing may be mounted."""
    folder = tmp_path / "read-only"
    folder.mkdir()
    yield from _mounted(folder, ["-t", "tmpfs", "-o", "size=4m,ro", "tmpfs"])


def _mounted(folder: Path, how: Sequence[str]) -> Iterator[Path]:
    try:
        subprocess.run(["mount", *how, str(folder)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("file systems cannot be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True, capture_output=True)


@pytest.mark.parametrize("out", [".", "below/out"])
def test_a_read_only_file_system_is_refused(
    out: str, merge_job: Checkpoints, read_only_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = merge_job(two_experts())
    ended = run(capsys, "merge", recipe, read_only_folder / out)
    assert_says(ended, "OutputError: cannot write", str(read_only_folder), "the file system is read-only")


def test_a_folder_without_permission_is_refused(
    merge_job: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = merge_job(two_experts())
    (tmp_path / "locked").mkdir(mode=0o555)
    if os.access(tmp_path / "locked", os.W_OK):
        pytest.skip("root may write everywhere")
    assert_says(run(capsys, "merge", recipe, tmp_path / "locked" / "out"), "permission denied", "choose another OUT")


# -- a disk that fills up ---------------------------------------------------------------------------------------------


def many_units() -> list[Model]:
    """5 MiB: with units of 1 MiB there is something to resume."""
    return random_models({"a.weight": (1024, 640), "b.weight": (1024, 640)}, experts=2)


def digest_of_an_undisturbed_merge(recipe: Path, capsys: pytest.CaptureFixture[str]) -> str:
    done = run(capsys, "merge", recipe, recipe.parent / "undisturbed", "--json")
    return str(done.document["output_digest"])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    yield from _mounted(folder, ["-t", "tmpfs", "-o", "size=96m", "tmpfs"])


def fill(disk: Path) -> None:
    """Take whatever is free."""
    with open(disk / "filler", "wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(1 << 16))


def on_write(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[], None]) -> None:
    """Call `act` before the `number`-th range of an output is written, and before every later one."""
    write, taken, written = LocalWriter.write, threading.Lock(), [0]

    def counted(self: LocalWriter, name: str, start: int, block: memoryview) -> None:
        with taken:
            written[0] += 1
            if written[0] >= number:
                act()
        write(self, name, start, block)

    monkeypatch.setattr(LocalWriter, "write", counted)
    monkeypatch.setattr("ties_dist.engine.passes.COMMIT_SECONDS", 0.0)  # what is written is journalled at once


def test_a_disk_that_fills_up_is_said_and_the_merge_resumes_after_space_is_freed(
    merge_job: Checkpoints, small_disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = merge_job(many_units())
    expected = digest_of_an_undisturbed_merge(recipe, capsys)
    out = small_disk / "out"
    with monkeypatch.context() as patched:
        on_write(patched, 5, lambda: fill(small_disk))
        ended = run(capsys, "merge", recipe, out, "--unit-size", "1MiB")
    assert_says(ended, "OutputError: cannot write", "the disk is full. Free some space and run the same command again")
    assert readable_files(out) == []

    assert_says(run(capsys, "merge", recipe, out, "--unit-size", "1MiB"), "free")  # still full

    (small_disk / "filler").unlink()
    resumed = run(capsys, "merge", recipe, out, "--unit-size", "1MiB", "--json").document
    assert resumed["output_digest"] == expected
    assert resumed["resumed_units"] >= 1


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "the disk is full. Free some space and run the same command again"),
        (errno.EDQUOT, "the disk quota is used up"),
        (errno.EROFS, "the file system is read-only"),
        (errno.EIO, "Input/output error"),
    ],
    ids=["ENOSPC", "EDQUOT", "EROFS", "EIO"],
)
def test_a_write_that_fails_is_said_and_the_merge_resumes(
    number: int,
    words: str,
    merge_job: Checkpoints,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = merge_job(many_units())
    expected = digest_of_an_undisturbed_merge(recipe, capsys)
    write, calls = os.pwrite, [0]

    def failing(file: int, block: memoryview, start: int) -> int:
        calls[0] += 1
        if calls[0] >= 3:
            raise OSError(number, os.strerror(number))
        return write(file, block, start)

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", failing)
        assert_says(run(capsys, "merge", recipe, tmp_path / "out", "--unit-size", "1MiB"), "cannot write", words)
    assert readable_files(tmp_path / "out") == []
    done = run(capsys, "merge", recipe, tmp_path / "out", "--json").document
    assert done["output_digest"] == expected
    assert done["resumed_units"] >= 1


def test_a_disk_without_room_is_refused_before_the_work_starts(
    merge_job: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = merge_job(many_units())
    disk = tmp_path / "disk"
    disk.mkdir()
    for folder in _mounted(disk, ["-t", "tmpfs", "-o", "size=4m", "tmpfs"]):
        ended = run(capsys, "merge", recipe, folder / "out")
        assert_says(ended, "PlanError", str(folder), "free", "choose another OUT")
        assert readable_files(folder / "out") == []


# -- inputs that change -----------------------------------------------------------------------------------------------


def interrupt(recipe: Path, out: Path, monkeypatch: pytest.MonkeyPatch, **options: object) -> None:
    """Leave an unfinished merge behind, with a few finished ranges."""
    stop = threading.Event()
    with monkeypatch.context() as patched:
        on_write(patched, 3, stop.set)
        with pytest.raises(StoppedError, match="Run the same command again to resume"):
            ties_dist.merge(recipe, out, unit_size=1 << 20, stop=stop, **options)  # type: ignore[arg-type]


def change_one_value(file: Path) -> None:
    with open(file, "r+b") as opened:
        opened.seek(-4, os.SEEK_END)
        opened.write(b"\x00\x00\x80\x3f")
    stamp = file.stat().st_mtime_ns + 1_000_000_000
    os.utime(file, ns=(stamp, stamp))


@pytest.mark.parametrize("model", ["base", "expert-1"])
def test_inputs_changed_since_an_interruption_are_refused(
    model: str,
    merge_job: Checkpoints,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe, out = merge_job(many_units()), tmp_path / "out"
    interrupt(recipe, out, monkeypatch)
    kept = {name: content for name, content in contents(out).items() if "parts" in name}
    change_one_value(recipe.parent / model / "model.safetensors")
    ended = run(capsys, "merge", recipe, out)
    assert_says(
        ended, "inputs changed since the interrupted merge", f"{model}/model.safetensors", "Restore them", "--fresh"
    )
    assert readable_files(out) == []
    assert {name: content for name, content in contents(out).items() if "parts" in name} == kept

    done = run(capsys, "merge", recipe, out, "--fresh", "--json").document
    assert done["output_digest"] == digest_of_an_undisturbed_merge(recipe, capsys)
    assert done["resumed_units"] == 0


def test_inputs_that_change_while_they_are_merged_are_not_published(
    merge_job: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = merge_job(many_units(), method="task_arithmetic"), tmp_path / "out"
    with monkeypatch.context() as patched:
        on_write(patched, 3, lambda: change_one_value(recipe.parent / "expert-0" / "model.safetensors"))
        ended = run(capsys, "merge", recipe, out, "--unit-size", "1MiB")
    assert_says(ended, "inputs were changed while they were merged", "expert-0/model.safetensors", "Run again")
    assert readable_files(out) == []
    done = run(capsys, "merge", recipe, out, "--json").document
    assert done["output_digest"] == digest_of_an_undisturbed_merge(recipe, capsys)


def halve(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


@pytest.mark.parametrize("backend", ["mmap", "pread", "direct"])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (halve, ("truncated, or was replaced while it was read",)),
        (Path.unlink, ("'expert-0': model.safetensors cannot be read: No such file or directory",)),
    ],
    ids=["truncated", "removed"],
)
def test_a_shard_lost_between_plan_and_merge_is_an_error_not_a_crash(
    damage: Callable[[Path], None],
    words: Sequence[str],
    backend: str,
    merge_job: Checkpoints,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe, out = merge_job(many_units()), tmp_path / "out"
    acquire, file = RunLock.acquire, recipe.parent / "expert-0" / "model.safetensors"

    def late(self: RunLock, **options: bool) -> None:
        damage(file)
        acquire(self, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(RunLock, "acquire", late)
    ended = run(capsys, "merge", recipe, out, "--read-backend", backend)
    assert_says(ended, "CheckpointError", "model.safetensors", "Restore the file and run again", *words)
    assert readable_files(out) == []


@pytest.mark.parametrize("options", [(), ("--overwrite",)], ids=" ".join)
def test_an_unfinished_merge_of_another_recipe_is_kept(
    options: Sequence[str],
    merge_job: Checkpoints,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe, out = merge_job(many_units()), tmp_path / "out"
    interrupt(recipe, out, monkeypatch)
    kept = {name: content for name, content in contents(out).items() if "parts" in name}
    merge_job(many_units(), parameters={"density": 0.4})
    ended = run(capsys, "merge", recipe, out, *options)
    assert_says(ended, "an unfinished merge of another recipe", "Finish it with its own command", "--fresh")
    assert {name: content for name, content in contents(out).items() if "parts" in name} == kept
    assert run(capsys, "merge", recipe, out, "--fresh").status == 0


# -- two at once ------------------------------------------------------------------------------------------------------


def test_a_second_merge_on_one_out_is_refused_naming_the_holder(
    merge_job: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = merge_job(two_experts()), tmp_path / "out"
    lock = RunLock(LocalPlace(out))
    lock.acquire()
    try:
        ended = run(capsys, "merge", recipe, out)
        assert_says(ended, "LockedError: another run is merging into", f"process {os.getpid()} on", "--wait")
        assert lock.holder() == lock.me
    finally:
        lock.release()
    assert run(capsys, "merge", recipe, out).status == 0


GATE = """
import pathlib, sys, time
from ties_dist.storage.local import LocalWriter
write, gate = LocalWriter.write, pathlib.Path(sys.argv.pop(1))
def slow(self, *arguments):
    gate.with_suffix(".reached").touch()
    while not gate.exists():
        time.sleep(0.02)
    write(self, *arguments)
LocalWriter.write = slow
"""
"""Holds a merge before its first write until a file, the first argument, exists."""


@pytest.mark.slow
def test_of_two_processes_one_merges_one_is_refused_and_one_waits_for_the_result(
    merge_job: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out, gate = merge_job(two_experts()), tmp_path / "out", tmp_path / "gate"
    first = start(gate, "merge", recipe, out, "--json", code=GATE)
    try:
        while not gate.with_suffix(".reached").exists():
            assert first.poll() is None, finish(first).err
            threading.Event().wait(0.02)
        assert_says(run(capsys, "merge", recipe, out), "LockedError", f"process {first.pid} on", "--wait")
        assert readable_files(out) == []
        opener = threading.Timer(0.5, gate.touch)
        opener.start()
        waited = run(capsys, "merge", recipe, out, "--wait")
        opener.join()
        ended = finish(first)
    finally:
        gate.touch()
        first.wait()
    assert ended.status == 0, ended.err
    assert waited.status == 0, waited.err
    assert "already done" in waited.out and ended.document["output_digest"] in waited.out


# -- as a process, and what is allowed --------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_process_that_is_refused_exits_2_with_one_message_and_no_traceback(
    merge_job: Checkpoints, tmp_path: Path
) -> None:
    recipe = merge_job(two_experts(), shards=2)
    cut_tail(recipe.parent / "expert-0")
    ended = finish(start("merge", recipe, tmp_path / "out", "--json"))
    assert_says(ended, "CheckpointError: checkpoint 'expert-0'", "truncated")
    assert not (tmp_path / "out").exists()


def test_the_same_expert_twice_is_allowed_and_said(
    merge_job: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = merge_job(two_experts())
    document = json.loads(recipe.read_text())
    document["models"].append(document["models"][0])
    recipe.write_text(json.dumps(document))
    ended = run(capsys, "merge", recipe, tmp_path / "out")
    assert ended.status == 0
    assert "models[2]: the same expert as models[0]; it counts once more" in ended.err


def test_a_copy_of_an_expert_is_allowed_and_said(
    merge_job: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = two_experts()
    ended = run(capsys, "merge", merge_job([*models, models[1]]), tmp_path / "out")
    assert ended.status == 0
    assert "experts 'expert-0' and 'expert-2' look equal" in ended.err


def test_an_expert_equal_to_the_base_is_allowed_and_said(
    merge_job: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = two_experts()
    ended = run(capsys, "merge", merge_job([models[0], models[0], models[1]]), tmp_path / "out")
    assert ended.status == 0
    assert "expert 'expert-0' looks equal to the base" in ended.err


# -- names that a terminal obeys ---------------------------------------------------------------------------------------

CODES = "\x1b[2J\x1b]0;owned\x07\u202e"
ESCAPED = "\\x1b[2J\\x1b]0;owned\\x07\\u202e"


def test_no_name_reaches_terminal_log_or_card_with_its_control_codes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = random_models({f"layer{CODES}.weight": (40, 30)}, experts=1)
    recipe = write_job(tmp_path / f"job{CODES}", models)
    (recipe.parent / "expert-0").rename(recipe.parent / f"expert{CODES}")
    document = json.loads(recipe.read_text())
    document["models"][0]["model"] = f"expert{CODES}"
    recipe.write_text(json.dumps(document))
    out = tmp_path / f"out{CODES}"
    shown = [run(capsys, *words) for words in (
        ("merge", recipe, out, "-v"), ("merge", recipe, out), ("plan", recipe, out), ("analyze", recipe),
        ("inspect", recipe.parent / "base"), ("status", out), ("verify", out, "--sha256"), ("merge", out, out),
        ("sweep", recipe, tmp_path / f"sweep{CODES}", "--lambda", "1,2"),
    )]  # fmt: skip
    text = "".join(each.out + each.err for each in shown) + (out / "README.md").read_text()
    assert ESCAPED in text
    assert [c for c in text if not c.isprintable() and c != "\n"] == []


def test_an_error_is_printable_wherever_it_is_shown() -> None:
    error = OutputError(f"{CODES}\ud800\nnext\tline \u00a0 é")
    assert str(error) == f"{ESCAPED}\\ud800\nnext\tline \u00a0 é"
    assert error.args == (f"{CODES}\ud800\nnext\tline \u00a0 é",)
