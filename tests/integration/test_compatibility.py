"""Models whose tensors fit, and which still must not be merged without a word; rows that only some of them have."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import ties_dist
from tests import oracle
from tests.conftest import Checkpoints, random_models, write_checkpoint
from tests.integration.command import run

SHAPES = {"model.embed_tokens.weight": (30, 8), "layers.0.weight": (40, 8)}
CONFIG = {"model_type": "llama", "num_attention_heads": 8, "rope_theta": 10000.0, "vocab_size": 30}
WORDS = [f"w{i}" for i in range(30)]


def say(folder: Path, *, config: Mapping[str, object] | None = None, words: list[str] | None = None) -> None:
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if words is not None:
        (folder / "vocab.txt").write_text("\n".join(words))


def test_a_config_that_means_another_function_is_refused_until_its_word_is_said(
    merge_job: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = merge_job(random_models(SHAPES, experts=2), config=CONFIG), tmp_path / "out"
    say(tmp_path / "expert-1", config={**CONFIG, "num_attention_heads": 4})
    for command in (["plan", recipe], ["merge", recipe, out]):
        ended = run(capsys, *command)
        assert ended.status == 2
        assert "expert 'expert-1': num_attention_heads 4 (the base's: 8)" in ended.err
        assert "`ties_dist: {allow: [num_attention_heads]}`" in ended.err
    assert run(capsys, "merge", recipe, out, "--allow", "hidden_act").status == 2
    done = run(capsys, "merge", recipe, out, "--allow", "num_attention_heads")
    assert done.status == 0
    assert "expert 'expert-1': num_attention_heads 4 (the base's: 8); allowed" in done.err
    assert json.loads((out / "config.json").read_text()) == CONFIG
    assert run(capsys, "verify", out, "--sample", "1").status == 0  # the word is in OUT's recipe


def test_what_fine_tunes_change_is_said_and_refused_by_strict(
    merge_job: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = merge_job(random_models(SHAPES, experts=2), config=CONFIG)
    say(tmp_path / "expert-0", config={**CONFIG, "rope_theta": 1e6})
    line = "expert 'expert-0': config.json has rope_theta 1000000.0 (the base's: 10000.0); the base's is taken"
    done = run(capsys, "merge", recipe, tmp_path / "out")
    assert done.status == 0 and done.err.count("rope_theta") == 1 and line in done.err
    ended = run(capsys, "plan", recipe, "--strict")
    assert ended.status == 2 and "rope_theta" in ended.err
    assert run(capsys, "plan", recipe, "--strict", "--allow", "rope_theta").status == 0


def test_other_tokens_under_the_same_ids_are_refused_until_allowed(
    merge_job: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = merge_job(random_models(SHAPES, experts=2), config=CONFIG)
    for name in ("base", "expert-0", "expert-1"):
        say(tmp_path / name, words=WORDS)
    assert run(capsys, "plan", recipe).status == 0
    say(tmp_path / "expert-1", words=["other", *WORDS[1:]])
    ended = run(capsys, "plan", recipe)
    assert ended.status == 2
    assert (
        "expert 'expert-1': the tokenizer gives 1 of 30 ids to other tokens than the base's: 0 is 'other'" in ended.err
    )
    assert run(capsys, "plan", recipe, "--allow", "tokenizer").status == 0
    say(tmp_path / "expert-1", words=[*WORDS, "<new>"])
    assert run(capsys, "plan", recipe).status == 0


@pytest.mark.parametrize("expert_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 23, 37])
@pytest.mark.parametrize("options", [{}, {"trim_scope": "tensor"}])
def test_rows_that_an_expert_lacks_are_not_moved_and_rows_of_its_own_are_dropped(
    options: Mapping[str, object],
    rows: int,
    dtype: torch.dtype,
    expert_dtype: torch.dtype,
    merge_job: Checkpoints,
    tmp_path: Path,
) -> None:
    models = random_models(SHAPES, experts=2, dtype=dtype)
    models[2] = {name: tensor.to(expert_dtype) for name, tensor in models[2].items()}
    recipe = merge_job(models, options={"vocab": "base", **options})
    name = "model.embed_tokens.weight"
    wide = torch.cat([models[2][name], torch.full((9, 8), 7.0, dtype=expert_dtype)])
    write_checkpoint(tmp_path / "expert-1", {**models[2], name: wide[:rows]})
    ties_dist.merge(recipe, tmp_path / "out", unit_size=1 << 20)

    base, *experts = [{n: oracle.from_torch(t) for n, t in model.items()} for model in models]
    known = min(rows, 30)
    prolonged = np.concatenate(
        [oracle.from_torch(models[2][name].float())[:known], oracle.from_torch(models[0][name].float())[known:]]
    )
    expected = oracle.ties(base, [experts[0], {**experts[1], name: prolonged}], density=0.2, **options)
    written = {n: oracle.from_torch(t) for n, t in load_file(tmp_path / "out" / "model.safetensors").items()}
    assert oracle.same_bytes(written, expected.tensors) == []

    experts_in_memory = [models[1], {**models[2], name: wide[:rows]}]
    given = {"vocab": "base", **options}
    found = ties_dist.merge_state_dicts(models[0], experts_in_memory, parameters={"density": 0.2}, **given)  # type: ignore[arg-type]
    assert oracle.same_bytes({n: oracle.from_torch(t) for n, t in found.items()}, expected.tensors) == []


@pytest.mark.parametrize("rows", [20, 35])
def test_auto_takes_the_rows_that_both_have_where_the_tokenizers_agree(
    rows: int, merge_job: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = random_models(SHAPES, experts=1)
    recipe = merge_job(models)
    name = "model.embed_tokens.weight"
    wide = torch.cat([models[1][name], torch.zeros(9, 8)])[:rows]
    write_checkpoint(tmp_path / "expert-0", {**models[1], name: wide})

    ended = run(capsys, "plan", recipe)  # no tokenizer tells
    assert ended.status == 2 and "`vocab: base` merges the rows that both have" in ended.err
    recipe.write_text(json.dumps(json.loads(recipe.read_text()) | {"ties_dist": {"vocab": "base"}}))
    assert run(capsys, "plan", recipe).status == 0

    say(tmp_path / "base", words=WORDS)
    say(tmp_path / "expert-0", words=[*WORDS, "more"][:rows])
    for vocab, status in (("auto", 0), ("error", 2)):
        recipe.write_text(json.dumps(json.loads(recipe.read_text()) | {"ties_dist": {"vocab": vocab}}))
        assert run(capsys, "plan", recipe).status == status

    say(tmp_path / "expert-0", words=[w.upper() for w in WORDS])
    recipe.write_text(json.dumps(json.loads(recipe.read_text()) | {"ties_dist": {"vocab": "auto"}}))
    ended = run(capsys, "plan", recipe)
    assert ended.status == 2 and "its tokenizer gives the same ids to other tokens" in ended.err
    assert "vocab: base" not in ended.err  # it would be refused for its tokenizer


def test_another_hidden_size_is_explained_by_its_key_first(
    merge_job: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = merge_job(random_models(SHAPES, experts=1), config={"hidden_size": 8})
    other = random_models({name: (rows, 16) for name, (rows, _) in SHAPES.items()}, experts=0)[0]
    write_checkpoint(tmp_path / "expert-0", other, config={"hidden_size": 16})
    ended = run(capsys, "plan", recipe)
    assert ended.status == 2
    lines = ended.err.splitlines()
    at = next(i for i, line in enumerate(lines) if "do not match the base:" in line)
    assert lines[at + 1].strip() == "expert 'expert-0': config.json has hidden_size 16 (the base's: 8)"
    assert "vocab" not in ended.err and "exclude" not in ended.err
