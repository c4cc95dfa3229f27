"""Which of several files a folder's model is: transformers decides, so that a merge reads what everybody loads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import ties_dist

transformers = pytest.importorskip("transformers")


def tiny(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=31, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=12,
    )  # fmt: skip
    return transformers.BertModel(config)  # type: ignore[no-any-return]


@pytest.mark.parametrize("sharded_last", [True, False])
def test_of_a_single_file_and_shards_the_merge_reads_what_transformers_loads(
    sharded_last: bool, tmp_path: Path
) -> None:
    saves = [(tiny(1), {"max_shard_size": "8KB"}), (tiny(2), {})]
    (tmp_path / "both").mkdir()
    for i, (model, options) in enumerate(reversed(saves) if sharded_last else saves):
        model.save_pretrained(tmp_path / str(i), **options)  # type: ignore[operator]
        for file in (tmp_path / str(i)).iterdir():  # a second save into one folder would tidy up
            file.replace(tmp_path / "both" / file.name)
    names = sorted(p.name for p in (tmp_path / "both").glob("*.safetensors*"))
    assert "model.safetensors" in names and "model.safetensors.index.json" in names
    loaded = transformers.BertModel.from_pretrained(tmp_path / "both").state_dict()
    recipe = {"merge_method": "linear", "models": [{"model": str(tmp_path / "both"), "parameters": {"weight": 1.0}}]}
    ties_dist.merge(json.dumps(recipe) + "\n", tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert {n: t for n, t in loaded.items() if n in merged}.keys() == merged.keys()
    assert all(torch.equal(loaded[name], merged[name]) for name in merged)
