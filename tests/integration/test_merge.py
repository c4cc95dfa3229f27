"""Merges end to end through the command line: what lies in OUT afterwards, against the NumPy oracle and by hand."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import ties_dist
from tests import oracle
from tests.conftest import Checkpoints, random_models, write_checkpoint
from tests.integration.command import SHAPES, Outcome, contents, readable_files, run
from ties_dist.cache import KERNELS

Model = dict[str, Tensor]
Run = Callable[..., Outcome]
INDEX = "model.safetensors.index.json"
SAID = {"kept_fraction": "kept_nonzero", "tie_fraction": "ties"}


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Run:
    """`ties-dist` that must succeed; returns what it left on the streams."""

    def succeed(*arguments: object) -> Outcome:
        ended = run(capsys, *arguments)
        assert ended.status == 0, ended.err
        return ended

    return succeed


def arrays(models: Sequence[Mapping[str, Tensor]]) -> list[dict[str, oracle.Array]]:
    return [{name: oracle.from_torch(tensor) for name, tensor in model.items()} for model in models]


def written(out: Path) -> dict[str, oracle.Array]:
    """Every tensor of OUT, as the safetensors library reads it."""
    files = sorted(out.glob("*.safetensors"))
    return {name: oracle.from_torch(tensor) for file in files for name, tensor in load_file(file).items()}


def assert_merged(out: Path, expected: Mapping[str, oracle.Array]) -> None:
    assert oracle.same_bytes(written(out), expected) == []


def coarse_models(experts: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Model]:
    """Multiples of 1/64: many ties at the threshold, many exact cancellations, many zero deltas."""
    draw = torch.Generator().manual_seed(seed)
    base = {name: torch.randint(-64, 65, shape, generator=draw) / 64 for name, shape in SHAPES.items()}
    models = [base]
    for _ in range(experts):
        models.append({n: t + torch.randint(-3, 4, t.shape, generator=draw) / 64 for n, t in base.items()})
    return [{name: tensor.to(dtype) for name, tensor in model.items()} for model in models]


# -- semantics --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("semantics", ["paper", "mergekit", "peft"])
def test_presets_give_the_oracles_bytes_and_counts(
    semantics: str, dtype: torch.dtype, merge_job: Checkpoints, tmp_path: Path, cli: Run
) -> None:
    models = coarse_models(3, dtype)
    given = [{"density": 0.2, "weight": 1.0}, {"density": 0.5, "weight": 0.3}, {"density": 1.0, "weight": 2.5}]
    recipe = merge_job(models, shards=2, parameters={"lambda": 1.3}, expert_parameters=given)
    report = cli("merge", recipe, tmp_path / "out", "--semantics", semantics, "--json").document

    base, *experts = arrays(models)
    expected = oracle.ties(
        base,
        experts,
        density=[g["density"] for g in given],
        weights=[g["weight"] for g in given],
        lam=1.3,
        semantics=semantics,  # type: ignore[arg-type]
    )
    assert_merged(tmp_path / "out", expected.tensors)
    statistics = expected.statistics
    assert report["semantics"] == semantics
    assert report["elements"] == statistics.elements
    assert report["conflict_fraction"] == statistics.conflicts / statistics.elements
    for said, counted in zip(report["experts"], statistics.experts, strict=True):
        for name, count in SAID.items():
            assert said[name] == getattr(counted, count) / statistics.elements, name
    if semantics == "paper":
        assert [e["threshold"] for e in report["experts"][:2]] == [e.threshold for e in statistics.experts[:2]]
        assert report["majority_sign"] == statistics.majority_sign
    else:
        assert [e["threshold"] for e in report["experts"]] == [None] * 3


@pytest.mark.parametrize(
    "options",
    [
        {"tie_policy": "exact_k"},
        {"tie_policy": "exact_k", "trim_scope": "tensor"},
        {"trim_scope": "tensor"},
        {"elect": "count", "zero_sign": "drop"},
        {"elect": "none", "aggregate": "max"},
        {"aggregate": "average", "weight_before_elect": False},
        {"aggregate": "sum", "zero_sign": "positive"},
    ],
    ids=lambda options: " ".join(f"{k}={v}" for k, v in options.items()),
)
def test_options_of_the_recipe_give_the_oracles_bytes(
    options: dict[str, str], merge_job: Checkpoints, tmp_path: Path, cli: Run
) -> None:
    models = coarse_models(3, seed=1)
    cli("merge", merge_job(models, parameters={"density": 0.3}, options=options), tmp_path / "out")
    base, *experts = arrays(models)
    assert_merged(tmp_path / "out", oracle.ties(base, experts, density=0.3, **options).tensors)  # type: ignore[arg-type]


def test_exact_k_keeps_exactly_k_of_the_whole_model(merge_job: Checkpoints, tmp_path: Path, cli: Run) -> None:
    models = coarse_models(2)
    recipe = merge_job(models, parameters={"density": 0.37}, options={"tie_policy": "exact_k"})
    report = cli("merge", recipe, tmp_path / "out", "--json").document
    d = 40 * 16 + 2 * 32 * 32 + 16
    assert [round(e["kept_fraction"] * d) for e in report["experts"]] == [int(d * 0.37)] * 2
    assert all(e["tie_fraction"] > 0.1 for e in report["experts"])  # the cut went through a large tie group


def test_signs_can_be_taken_from_another_model(merge_job: Checkpoints, tmp_path: Path, cli: Run) -> None:
    *models, chosen = coarse_models(3)
    write_checkpoint(tmp_path / "multitask", chosen)
    cli("merge", merge_job(models, options={"elect_from": "multitask"}), tmp_path / "out")
    base, *experts = arrays(models)
    expected = oracle.ties(base, experts, density=0.2, elect_from=arrays([chosen])[0])
    assert_merged(tmp_path / "out", expected.tensors)


def test_units_that_assumed_the_wrong_majority_are_redone(merge_job: Checkpoints, tmp_path: Path, cli: Run) -> None:
    """Two experts cancel exactly in "a" and agree on minus in "b": the sign of the cancellations is then minus."""
    base = {"a": torch.zeros(8), "b": torch.zeros(8)}
    one = {"a": torch.full((8,), 1.0), "b": torch.full((8,), -0.25)}
    two = {"a": torch.full((8,), -1.0), "b": torch.full((8,), -0.75)}
    recipe = merge_job([base, one, two], parameters={"density": 1.0})
    report = cli("merge", recipe, tmp_path / "out", "--json").document
    assert (report["majority_sign"], report["redone_units"]) == (-1, 1)
    assert report["conflict_fraction"] == 0.5
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert merged["a"].tolist() == [-1.0] * 8
    assert merged["b"].tolist() == [-0.5] * 8


def test_densities_may_vary_by_layer_and_by_name_where_each_tensor_is_trimmed(
    merge_job: Checkpoints, tmp_path: Path, cli: Run
) -> None:
    shapes = {f"model.layers.{i}.{part}.weight": (16, 20) for i in range(3) for part in ("attn", "mlp")}
    models = random_models(shapes, experts=2)
    density = [{"filter": "attn", "value": 0.9}, {"value": [0.2, 0.6]}]  # mlp: 0.2, 0.4, 0.6 over three layers
    recipe = merge_job(models, parameters={"density": density}, options={"trim_scope": "tensor"})
    cli("merge", recipe, tmp_path / "out")
    by_name = {name: 0.9 if "attn" in name else 0.2 + 0.2 * int(name.split(".")[2]) for name in shapes}
    base, *experts = arrays(models)
    expected = oracle.ties(base, experts, density=[by_name, by_name], trim_scope="tensor")
    assert_merged(tmp_path / "out", expected.tensors)


def test_task_arithmetic_gives_the_oracles_bytes(merge_job: Checkpoints, tmp_path: Path, cli: Run) -> None:
    models = random_models(SHAPES, experts=3, dtype=torch.bfloat16)
    weights = [1.0, -0.5, 0.25]
    recipe = merge_job(
        models,
        shards=2,
        method="task_arithmetic",
        parameters={"lambda": 0.4},
        expert_parameters=[{"weight": weight} for weight in weights],
    )
    report = cli("merge", recipe, tmp_path / "out", "--json").document
    base, *experts = arrays(models)
    assert_merged(tmp_path / "out", oracle.task_arithmetic(base, experts, weights=weights, lam=0.4))
    assert report["conflict_fraction"] is None
    assert [(e["weight"], e["density"], e["kept_fraction"]) for e in report["experts"]] == [
        (weight, None, None) for weight in weights
    ]


def test_averaging_needs_no_base(merge_job: Checkpoints, tmp_path: Path, cli: Run) -> None:
    models = random_models(SHAPES, experts=3)[1:]
    models[0]["position_ids"] = torch.arange(5)  # of the first model: it supplies what is not merged
    recipe = merge_job([models[0], *models], method="linear", config={"model_type": "llama"})
    document = json.loads(recipe.read_text())
    del document["base_model"]
    recipe.write_text(json.dumps(document))
    cli("merge", recipe, tmp_path / "out")
    assert_merged(tmp_path / "out", oracle.linear(arrays(models)))
    assert (tmp_path / "out" / "config.json").read_bytes() == (tmp_path / "expert-0" / "config.json").read_bytes()


def test_an_expert_listed_twice_counts_twice(merge_job: Checkpoints, tmp_path: Path, cli: Run) -> None:
    models = random_models(SHAPES, experts=2)
    recipe = merge_job(models)
    document = json.loads(recipe.read_text())
    document["models"].append(document["models"][0])
    recipe.write_text(json.dumps(document))
    cli("merge", recipe, tmp_path / "out")
    base, one, two = arrays(models)
    assert_merged(tmp_path / "out", oracle.ties(base, [one, two, one], density=0.2).tensors)


def test_files_and_tensors_in_memory_merge_to_the_same_bytes(merge_job: Checkpoints, tmp_path: Path, cli: Run) -> None:
    models = coarse_models(3, torch.bfloat16)
    cli("merge", merge_job(models), tmp_path / "out")
    in_memory = ties_dist.merge_state_dicts(models[0], models[1:], parameters={"density": 0.2})
    assert_merged(tmp_path / "out", {name: oracle.from_torch(tensor) for name, tensor in in_memory.items()})


# -- what is merged ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("top", "out_dtype"),
    [
        ({"out_dtype": "bfloat16"}, "bfloat16"),
        ({"out_dtype": "fp16"}, "float16"),
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "bfloat16", "out_dtype": "float32"}, "float32"),
    ],
    ids=json.dumps,
)
def test_dtype_and_out_dtype_set_the_output_type_alone(
    top: dict[str, str], out_dtype: str, merge_job: Checkpoints, tmp_path: Path, cli: Run
) -> None:
    models = random_models(SHAPES, experts=2, dtype=torch.float16)
    ended = cli("merge", merge_job(models, **top), tmp_path / "out")
    base, *experts = arrays(models)
    expected = oracle.ties(base, experts, density=0.2, out_dtype=out_dtype)
    assert_merged(tmp_path / "out", expected.tensors)
    assert ("arithmetic stays float32" in ended.err) == (top.get("dtype") == "bfloat16")


def test_storage_types_may_differ_between_models(merge_job: Checkpoints, tmp_path: Path, cli: Run) -> None:
    models = random_models(SHAPES, experts=2)
    models[0] = {name: tensor.to(torch.bfloat16) for name, tensor in models[0].items()}
    models[2] = {name: tensor.to(torch.float16) for name, tensor in models[2].items()}
    ended = cli("merge", merge_job(models), tmp_path / "out")
    base, *experts = arrays(models)
    assert_merged(tmp_path / "out", oracle.ties(base, experts, density=0.2).tensors)
    assert "4 tensors stored as F32, base BF16" in ended.err and "4 tensors stored as F16, base BF16" in ended.err


def test_excluded_tensors_are_the_bases_and_are_not_ranked(merge_job: Checkpoints, tmp_path: Path, cli: Run) -> None:
    models = random_models(SHAPES, experts=2)
    recipe = merge_job(models, options={"exclude": ["layers.0.*", "norm.weight"]})
    report = cli("merge", recipe, tmp_path / "out", "--json").document
    base, *experts = arrays(models)
    expected = oracle.ties(base, experts, density=0.2, exclude=["layers.0.*", "norm.weight"])
    assert_merged(tmp_path / "out", expected.tensors)
    assert report["elements"] == 40 * 16 + 32 * 32
    assert expected.tensors["layers.0.weight"].tobytes() == base["layers.0.weight"].tobytes()


def test_where_everything_is_excluded_the_base_is_copied(merge_job: Checkpoints, tmp_path: Path, cli: Run) -> None:
    models = random_models(SHAPES, experts=1)
    ended = cli("merge", merge_job(models, options={"exclude": ["*"]}), tmp_path / "out")
    assert "nothing to merge (d = 0)" in ended.err
    assert_merged(tmp_path / "out", arrays(models)[0])


def test_a_tied_head_is_the_embedding_and_counted_once(merge_job: Checkpoints, tmp_path: Path, cli: Run) -> None:
    models = random_models({"model.embed_tokens.weight": (30, 8), "model.norm.weight": (8,)}, experts=2)
    untied = arrays(models)
    for model in models:
        model["lm_head.weight"] = model["model.embed_tokens.weight"].clone()
    recipe = merge_job(models, shards=3, config={"tie_word_embeddings": True})
    ended = cli("merge", recipe, tmp_path / "out", "--json")
    expected = oracle.ties(untied[0], untied[1:], density=0.2).tensors
    assert_merged(tmp_path / "out", expected | {"lm_head.weight": expected["model.embed_tokens.weight"]})
    assert ended.document["elements"] == 30 * 8 + 8
    assert "lm_head.weight is tied to model.embed_tokens.weight and counted once" in ended.err


def test_untied_heads_are_merged_by_themselves(merge_job: Checkpoints, tmp_path: Path, cli: Run) -> None:
    models = random_models({"model.embed_tokens.weight": (30, 8), "lm_head.weight": (30, 8)}, experts=2)
    recipe = merge_job(models, config={"tie_word_embeddings": False})
    assert cli("merge", recipe, tmp_path / "out", "--json").document["elements"] == 2 * 30 * 8
    base, *experts = arrays(models)
    assert_merged(tmp_path / "out", oracle.ties(base, experts, density=0.2).tensors)


def test_tensors_that_are_not_floating_point_are_the_bases(merge_job: Checkpoints, tmp_path: Path, cli: Run) -> None:
    models = random_models(SHAPES, experts=2)
    plain = arrays(models)
    extra = {"position_ids": torch.arange(9), "mask": torch.tensor([True, False, True]), "empty": torch.zeros(0, 3)}
    models[0] |= extra
    models[1] |= extra
    models[2] |= {"empty": extra["empty"], "mask": ~extra["mask"]}  # position_ids absent: said, no error
    ended = cli("merge", merge_job(models, options={"non_float": "base"}), tmp_path / "out")
    expected = oracle.ties(plain[0], plain[1:], density=0.2).tensors
    assert_merged(tmp_path / "out", expected | arrays([extra])[0])
    assert "expert 'expert-1': 1 tensor absent, not floating point; the base's stay" in ended.err


def test_extra_vocabulary_rows_are_dropped_where_the_recipe_says_so(
    merge_job: Checkpoints, tmp_path: Path, cli: Run
) -> None:
    shapes = {"model.embed_tokens.weight": (30, 8), "lm_head.weight": (30, 8), "model.norm.weight": (8,)}
    models = random_models(shapes, experts=2)
    plain = arrays(models)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        models[2][name] = torch.cat([models[2][name], torch.full((3, 8), 100.0)])
    recipe = merge_job(models, options={"vocab": "base"}, config={"vocab_size": 30})
    (tmp_path / "base" / "tokenizer.json").write_text("the base's")
    (tmp_path / "expert-1" / "tokenizer.json").write_text("with three tokens more")
    ended = cli("merge", recipe, tmp_path / "out")
    assert_merged(tmp_path / "out", oracle.ties(plain[0], plain[1:], density=0.2).tensors)
    assert (
        "expert 'expert-1': 2 tensors have other rows than the base's: 3 rows that only it has are dropped" in ended.err
    )
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "the base's"


def test_models_may_be_single_files(merge_job: Checkpoints, tmp_path: Path, cli: Run) -> None:
    models = random_models(SHAPES, experts=2)
    recipe = merge_job(models)
    text = recipe.read_text()
    for name in ("base", "expert-0", "expert-1"):
        (tmp_path / name / "model.safetensors").rename(tmp_path / f"{name}.safetensors")
        text = text.replace(f'"{name}"', f'"{name}.safetensors"')
    recipe.write_text(text)
    cli("merge", recipe, tmp_path / "out")
    base, *experts = arrays(models)
    assert_merged(tmp_path / "out", oracle.ties(base, experts, density=0.2).tensors)
    assert readable_files(tmp_path / "out") == ["model.safetensors"]


def test_an_expert_may_be_split_otherwise_than_the_base(merge_job: Checkpoints, tmp_path: Path, cli: Run) -> None:
    models = random_models(SHAPES, experts=2)
    recipe = merge_job(models, shards=2)
    shutil.rmtree(tmp_path / "expert-1")
    write_checkpoint(tmp_path / "expert-1", models[2], shards=4)
    cli("merge", recipe, tmp_path / "out")
    base, *experts = arrays(models)
    assert_merged(tmp_path / "out", oracle.ties(base, experts, density=0.2).tensors)


# -- shards and index -------------------------------------------------------------------------------------------------


def test_the_output_is_split_as_the_base_is(merge_job: Checkpoints, tmp_path: Path, cli: Run) -> None:
    models = random_models(SHAPES, experts=2)
    cli("merge", merge_job(models, shards=3), tmp_path / "out")
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    theirs = json.loads((tmp_path / "base" / INDEX).read_text())
    assert index == theirs
    for file in set(index["weight_map"].values()):
        with safe_open(tmp_path / "out" / file, "pt") as opened:
            assert {name for name, shard in index["weight_map"].items() if shard == file} == set(opened.keys())
            assert opened.metadata() == {"format": "pt"}


def test_max_shard_size_cuts_the_output_anew(merge_job: Checkpoints, tmp_path: Path, cli: Run) -> None:
    shapes = {"a": (700,), "b": (300,), "c": (250,), "d": (250,), "e": (10,)}  # bytes: 2800, 1200, 1000, 1000, 40
    models = random_models(shapes, experts=2)
    recipe = merge_job(models)
    base, *experts = arrays(models)
    expected = oracle.ties(base, experts, density=0.2).tensors

    cli("merge", recipe, tmp_path / "out", "--max-shard-size", "2200B")
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    first, second, third = (f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3))
    assert index["weight_map"] == {"a": first, "b": second, "c": second, "d": third, "e": third}
    assert index["metadata"]["total_size"] == 4 * (700 + 300 + 250 + 250 + 10)
    assert_merged(tmp_path / "out", expected)

    one = merge_job(models, shards=3)
    cli("merge", one, tmp_path / "single", "--max-shard-size", "1GiB")
    assert readable_files(tmp_path / "single") == ["model.safetensors"]
    assert_merged(tmp_path / "single", expected)


# -- companions, card and recipe --------------------------------------------------------------------------------------

COPIED = {
    "generation_config.json": '{"eos_token_id": 2}',
    "tokenizer.json": '{"version": "1.0"}',
    "tokenizer_config.json": "{}",
    "tokenizer.model": "\x00\x01",
    "special_tokens_map.json": "{}",
    "vocab.txt": "a\r\nb\r\n",
    "merges.txt": "a b",
    "chat_template.jinja": "{{ messages }}",
    "preprocessor_config.json": "{}",
    "modeling_custom.py": "x = 1\n",
    "LICENSE": "Apache",
    "NOTICE.txt": "notice",
    "USE_POLICY.md": "be kind",
}
LEFT = ("training_args.bin", "optimizer.pt", "pytorch_model.bin", "trainer_state.json", "model.onnx", ".gitattributes")
CONFIG = (
    b'{ "torch_dtype" : "float32",\r\n\t"rms_norm_eps": 1.0e-05, "name": "\\u00e9t\xc3\xa9",\n'
    b'  "kv_cache_dtype": "auto",\n  "vision_config": {"dtype": "torch.float32"}, "beta": 1e-5}'
)


def test_companions_of_the_base_are_copied_byte_for_byte(merge_job: Checkpoints, tmp_path: Path, cli: Run) -> None:
    recipe = merge_job(random_models(SHAPES, experts=2), shards=2)
    for name, text in COPIED.items():
        (tmp_path / "base" / name).write_bytes(text.encode())
        (tmp_path / "expert-0" / name).write_text("an expert's")
    for name in (*LEFT, "README.md"):
        (tmp_path / "base" / name).write_text("the base's")
    (tmp_path / "base" / "config.json").write_bytes(CONFIG)
    cli("merge", recipe, tmp_path / "out")
    found = {name: content for name, content in contents(tmp_path / "out").items() if ".ties_dist" not in name}
    weights = {f"model-0000{i}-of-00002.safetensors" for i in (1, 2)} | {INDEX}
    assert found.keys() == {*COPIED, *weights, "config.json", "README.md", "ties_dist_recipe.yml"}
    assert {name: found[name] for name in COPIED} == {name: text.encode() for name, text in COPIED.items()}
    assert found["config.json"] == CONFIG
    assert b"the base's" not in found["README.md"]


def test_config_follows_the_output_dtype_and_nothing_else_in_it_changes(
    merge_job: Checkpoints, tmp_path: Path, cli: Run
) -> None:
    recipe = merge_job(random_models(SHAPES, experts=2), out_dtype="bfloat16")
    (tmp_path / "base" / "config.json").write_bytes(CONFIG)
    cli("merge", recipe, tmp_path / "out")
    expected = CONFIG.replace(b'"float32"', b'"bfloat16"').replace(b'"torch.float32"', b'"bfloat16"')
    assert (tmp_path / "out" / "config.json").read_bytes() == expected


def test_the_model_card_has_the_hubs_front_matter(merge_job: Checkpoints, tmp_path: Path, cli: Run) -> None:
    recipe = merge_job(random_models(SHAPES, experts=2))
    report = cli("merge", recipe, tmp_path / "out", "--json").document
    card = huggingface_hub.ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model == ["base", "expert-0", "expert-1"]
    assert card.data.library_name == "transformers"
    assert "merge" in (card.data.tags or [])
    assert report["output_digest"] in card.text and "merge_method: ties" in card.text
    assert str(tmp_path) not in card.content


def test_nothing_in_out_names_a_path_of_this_machine(merge_job: Checkpoints, tmp_path: Path, cli: Run) -> None:
    recipe = merge_job(random_models(SHAPES, experts=2), shards=2)
    cli("merge", recipe, tmp_path / "out")
    for name, content in contents(tmp_path / "out").items():
        assert str(tmp_path).encode() not in content, name


def test_the_resolved_recipe_spells_out_the_preset_and_merges_to_the_same_digest(
    merge_job: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Run
) -> None:
    recipe = merge_job(
        coarse_models(2),
        parameters={"density": 0.3, "int8_mask": True},
        expert_parameters=[{"weight": 0.5}, {"weight": 0.25, "density": 0.6}],
        options={"exclude": ["norm.*"]},
        out_dtype="bf16",
    )
    first = cli("merge", recipe, tmp_path / "out", "--semantics", "mergekit", "--json").document
    resolved = yaml.safe_load((tmp_path / "out" / "ties_dist_recipe.yml").read_text())
    assert resolved["merge_method"] == "ties"
    assert resolved["models"] == [
        {"model": "expert-0", "parameters": {"density": 0.3, "weight": 0.5}},
        {"model": "expert-1", "parameters": {"density": 0.6, "weight": 0.25}},
    ]
    assert resolved["out_dtype"] == "bfloat16"
    block = resolved["ties_dist"]
    assert (block["semantics"], block["trim_scope"], block["tie_policy"]) == ("mergekit", "tensor", "exact_k")
    assert block["exclude"] == ["norm.*"]

    monkeypatch.chdir(tmp_path)  # models are written as they were given: relative to the recipe, or to here
    again = cli("merge", tmp_path / "out" / "ties_dist_recipe.yml", tmp_path / "again", "--json").document
    assert again["output_digest"] == first["output_digest"]
    assert again["fingerprint"] == first["fingerprint"]


# -- the same OUT again -----------------------------------------------------------------------------------------------


def stamps(out: Path) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in out.glob("*") if p.is_file()}


def test_a_finished_merge_is_already_done(merge_job: Checkpoints, tmp_path: Path, cli: Run) -> None:
    recipe, out = merge_job(random_models(SHAPES, experts=2), shards=2), tmp_path / "out"
    first = cli("merge", recipe, out, "--json").document
    before, files = stamps(out), contents(out)
    # Budget, unit size and threads are no part of what a merge is.
    ended = cli("merge", recipe, out, "--unit-size", "2MiB", "--threads", "1", "--overwrite")
    assert f"already done: {out} holds this merge (digest {first['output_digest']})" in ended.out
    assert stamps(out) == before and contents(out) == files
    again = cli("merge", recipe, out, "--json").document
    assert again == first | {"already_done": True}


def test_a_report_with_fields_of_a_later_version_is_still_one(merge_job: Checkpoints, tmp_path: Path, cli: Run) -> None:
    recipe, out = merge_job(random_models(SHAPES, experts=2)), tmp_path / "out"
    report = cli("merge", recipe, out, "--json").document
    report |= {"novelty": 1, "experts": [expert | {"novelty": 2} for expert in report["experts"]]}
    (out / ".ties_dist" / "report.json").write_text(json.dumps(report))
    assert "already done" in cli("merge", recipe, out).out


def test_overwrite_leaves_nothing_of_the_older_model(merge_job: Checkpoints, tmp_path: Path, cli: Run) -> None:
    out = tmp_path / "out"
    older = merge_job(random_models(SHAPES, experts=2), shards=3, folder=tmp_path / "older")
    (tmp_path / "older" / "base" / "tokenizer.json").write_text("older")
    cli("merge", older, out)
    assert INDEX in readable_files(out)

    models = random_models({"w": (9, 5)}, experts=2)
    recipe = merge_job(models, folder=tmp_path / "newer")
    cli("merge", recipe, out, "--overwrite")
    base, *experts = arrays(models)
    assert_merged(out, oracle.ties(base, experts, density=0.2).tensors)
    assert readable_files(out) == ["model.safetensors"]
    assert not (out / "tokenizer.json").exists()
    assert sorted(p.name for p in (out / ".ties_dist").iterdir()) == ["lock.guard", "manifest.json", "report.json"]


def test_fresh_and_overwrite_merge_a_finished_output_again(merge_job: Checkpoints, tmp_path: Path, cli: Run) -> None:
    recipe, out = merge_job(random_models(SHAPES, experts=2)), tmp_path / "out"
    first = cli("merge", recipe, out, "--json").document
    os.truncate(out / "model.safetensors", 5000)
    again = cli("merge", recipe, out, "--fresh", "--overwrite", "--json").document
    assert again["output_digest"] == first["output_digest"] and not again["already_done"]
    cli("verify", out, "--sample", "1")


def test_a_damaged_output_is_not_taken_for_done(
    merge_job: Checkpoints, tmp_path: Path, cli: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = merge_job(random_models(SHAPES, experts=2)), tmp_path / "out"
    cli("merge", recipe, out)
    os.truncate(out / "model.safetensors", 5000)
    ended = run(capsys, "merge", recipe, out)
    assert ended.status == 2 and "--overwrite" in ended.err
    cli("merge", recipe, out, "--overwrite")
    cli("verify", out, "--sample", "1")


# -- cached statistics ------------------------------------------------------------------------------------------------


def test_cached_statistics_serve_another_lambda_without_a_scan(
    merge_job: Checkpoints, tmp_path: Path, cli: Run
) -> None:
    models = random_models(SHAPES, experts=2)
    cache = ("--cache-dir", tmp_path / "cache")
    first = cli("merge", merge_job(models), tmp_path / "one", *cache, "--json").document
    recipe = merge_job(models, parameters={"density": 0.2, "lambda": 0.5})
    second = cli("merge", recipe, tmp_path / "two", *cache, "--json").document
    assert (first["thresholds_from"], second["thresholds_from"]) == ("scan", "cache")
    assert second["bytes_read"] == 3 * 4 * (40 * 16 + 2 * 32 * 32 + 16)  # one read of three models
    base, *experts = arrays(models)
    assert_merged(tmp_path / "two", oracle.ties(base, experts, density=0.2, lam=0.5).tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cached_statistics_serve_other_densities(
    dtype: torch.dtype, merge_job: Checkpoints, tmp_path: Path, cli: Run
) -> None:
    models = coarse_models(2, dtype)
    base, *experts = arrays(models)
    cache = ("--cache-dir", tmp_path / "cache")
    sources = []
    for i, density in enumerate((0.2, 0.5, 0.2, 0.7, 0.5)):
        recipe = merge_job(models, parameters={"density": density})
        report = cli("merge", recipe, tmp_path / f"out-{i}", *cache, "--json").document
        sources.append(report["thresholds_from"])
        assert_merged(tmp_path / f"out-{i}", oracle.ties(base, experts, density=density).tensors)
    if dtype == torch.float32:  # of 16-bit models a sample predicts the thresholds, and nothing is scanned
        assert sources[0] == "scan" and sources[2] == sources[4] == "cache"


def test_a_cache_entry_that_is_not_of_these_models_is_found_out_and_repaired(
    merge_job: Checkpoints, tmp_path: Path, cli: Run
) -> None:
    """The entries of two experts are swapped: whole and consistent each, and wrong."""
    models = random_models(SHAPES, experts=2)
    models[2] = {name: models[0][name] + 5 * (t - models[0][name]) for name, t in models[2].items()}
    recipe, cache = merge_job(models), tmp_path / "cache"
    cli("merge", recipe, tmp_path / "one", "--cache-dir", cache)
    one, two = sorted(p for p in cache.iterdir() if p.name != KERNELS)
    one.rename(cache / "aside")
    two.rename(one)
    (cache / "aside").rename(two)

    base, *experts = arrays(models)
    expected = oracle.ties(base, experts, density=0.2).tensors
    report = cli("merge", recipe, tmp_path / "two", "--cache-dir", cache, "--json").document
    assert_merged(tmp_path / "two", expected)
    assert report["redone_units"] == report["units"] == 1
    assert cli("merge", recipe, tmp_path / "three", "--cache-dir", cache, "--json").document["redone_units"] == 0
    assert_merged(tmp_path / "three", expected)


@pytest.mark.parametrize("damage", ["truncated", "emptied", "a_file"])
def test_a_broken_cache_is_counted_anew(damage: str, merge_job: Checkpoints, tmp_path: Path, cli: Run) -> None:
    models = random_models(SHAPES, experts=1)
    recipe, cache = merge_job(models), tmp_path / "cache"
    cli("merge", recipe, tmp_path / "one", "--cache-dir", cache)
    for entry in cache.glob("[0-9a-f]*"):
        if damage == "a_file":
            shutil.rmtree(entry)
            entry.write_text("what?")
        for file in [p for p in entry.rglob("*") if p.is_file()] if entry.is_dir() else []:
            os.truncate(file, 0 if damage == "emptied" else file.stat().st_size // 2)
    report = cli("merge", recipe, tmp_path / "two", "--cache-dir", cache, "--json").document
    assert report["thresholds_from"] == "scan"
    assert_merged(tmp_path / "two", written(tmp_path / "one"))


def test_a_cache_that_cannot_be_written_is_no_error(merge_job: Checkpoints, tmp_path: Path, cli: Run) -> None:
    (tmp_path / "file").write_text("in the way")
    cli("merge", merge_job(random_models(SHAPES, experts=1)), tmp_path / "out", "--cache-dir", tmp_path / "file" / "c")
