"""Heads that a base ties and an expert does not: transformers computes with the result what a restatement says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import ties_dist
from tests import oracle

transformers = pytest.importorskip("transformers", reason="pip install 'ties-dist[test]'")

TINY = {
    "vocab_size": 40, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 16,
}  # fmt: skip
GPT2 = {
    "vocab_size": 40,
    "n_positions": 16,
    "n_embd": 8,
    "n_layer": 1,
    "n_head": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", TINY), "gpt2": ("GPT2LMHeadModel", GPT2)
}  # fmt: skip
HEAD = "lm_head.weight"


def made(family: str, *, tied: bool, seed: int) -> Any:
    name, values = FAMILIES[family]
    cls = getattr(transformers, name)
    torch.manual_seed(seed)
    model = cls(cls.config_class(**values, tie_word_embeddings=tied))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape)
    return model.eval()


def parameters(model: Any) -> dict[str, oracle.Array]:
    """As an untied model has them."""
    return {n: oracle.from_torch(t.detach()) for n, t in model.named_parameters(remove_duplicate=False)}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(12).reshape(1, 12)).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_expert_with_a_head_of_its_own_is_merged_as_the_remedy_says(family: str, tmp_path: Path) -> None:
    models = {"base": made(family, tied=True, seed=0), "own": made(family, tied=False, seed=1)}
    models["tied"] = made(family, tied=True, seed=2)
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    assert HEAD not in load_file(tmp_path / "base" / "model.safetensors")
    recipe: dict[str, Any] = {
        "merge_method": "ties", "base_model": str(tmp_path / "base"), "parameters": {"density": 0.5},
        "models": [{"model": str(tmp_path / name)} for name in ("own", "tied")],
    }  # fmt: skip
    with pytest.raises(
        ties_dist.CheckpointError, match=r"are one parameter in the base.*\n`tie_word_embeddings: false`"
    ):
        ties_dist.merge(recipe, tmp_path / "out")
    report = ties_dist.merge({**recipe, "ties_dist": {"tie_word_embeddings": False}}, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    base, *experts = (parameters(model) for model in models.values())
    expected = oracle.ties(base, experts, density=0.5).tensors
    assert report.elements == sum(array.size for array in expected.values())
    restated = made(family, tied=False, seed=3)
    restated.load_state_dict({n: oracle.to_torch(array) for n, array in expected.items()}, strict=True)
    loaded = getattr(transformers, FAMILIES[family][0]).from_pretrained(tmp_path / "out")
    assert oracle.same_bytes(parameters(loaded), expected) == []
    assert torch.equal(logits(loaded), logits(restated))
