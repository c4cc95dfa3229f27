"""Heads that a base ties and an expert does not: transformers computes with the result what a restatement says."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
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


# -- adapters ----------------------------------------------------------------------------------------------------------

EMBEDDINGS = {"llama": "embed_tokens", "gpt2": "wte"}
VARIANTS: Mapping[str, dict[str, list[str]]] = {
    "lora-embedding": {"target_modules": ["EMBEDDING"]},
    "lora-head": {"target_modules": ["lm_head"]},
    "lora-both": {"target_modules": ["EMBEDDING", "lm_head"]},
    "saved-embedding": {"modules_to_save": ["EMBEDDING"]},
    "saved-head": {"modules_to_save": ["lm_head"]},
    "saved-both": {"modules_to_save": ["EMBEDDING", "lm_head"]},
}
TIED = [("llama", variant) for variant in ("lora-embedding", "lora-both", "saved-embedding", "saved-both")]
TIED += [("gpt2", "lora-both"), ("gpt2", "saved-both")]
"""With `ensure_weight_tying`, which peft does nothing about where GPT-2's embedding is adapted alone."""


@pytest.fixture
def quiet() -> Iterator[None]:
    """peft warns of layers that are tied, which is what these tests are about."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def adapted(family: str, options: Mapping[str, list[str]], root: Path, *, tied: bool = False) -> Any:
    """Writes base and adapter; returns the model as peft runs it, not merged."""
    peft = pytest.importorskip("peft", reason="pip install 'ties-dist[test]'")
    made(family, tied=True, seed=0).save_pretrained(root / "base")
    named = {k: [EMBEDDINGS[family] if n == "EMBEDDING" else n for n in v] for k, v in options.items()}
    given = {"target_modules": ["up_proj" if family == "llama" else "c_fc"], **named}
    config = peft.LoraConfig(r=2, **given, fan_in_fan_out=family == "gpt2", ensure_weight_tying=tied)
    model = peft.get_peft_model(made(family, tied=True, seed=0), config)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=draw)
    model.save_pretrained(root / "adapter")
    return model.eval()


def merged(family: str, root: Path, **options: object) -> Any:
    recipe = {
        "merge_method": "task_arithmetic", "base_model": str(root / "base"), "ties_dist": options,
        "models": [{"model": f"{root / 'base'}+{root / 'adapter'}"}],
    }  # fmt: skip
    ties_dist.merge(recipe, root / "out")
    return getattr(transformers, FAMILIES[family][0]).from_pretrained(root / "out")


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_on_one_side_of_a_pair_leaves_the_other_alone(family: str, variant: str, tmp_path: Path) -> None:
    model = adapted(family, VARIANTS[variant], tmp_path)
    with pytest.raises(
        ties_dist.CheckpointError, match=r"are one parameter in the base.*\n`tie_word_embeddings: false`"
    ):
        merged(family, tmp_path)
    found = merged(family, tmp_path, tie_word_embeddings=False)
    torch.testing.assert_close(logits(found), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize(("family", "variant"), TIED)
def test_an_adapter_that_keeps_a_pair_tied_moves_one_parameter(family: str, variant: str, tmp_path: Path) -> None:
    model = adapted(family, VARIANTS[variant], tmp_path, tied=True)
    found = merged(family, tmp_path)
    assert HEAD not in load_file(tmp_path / "out" / "model.safetensors")
    torch.testing.assert_close(logits(found), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("quiet")
def test_where_the_heads_name_is_not_known_the_model_that_peft_merges_is_taken(tmp_path: Path) -> None:
    model = adapted("llama", VARIANTS["lora-embedding"], tmp_path)
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "architectures": ["OddForCausalLM"]}))
    settings = tmp_path / "adapter" / "adapter_config.json"
    settings.write_text(
        json.dumps({**json.loads(settings.read_text()), "task_type": "CAUSAL_LM", "auto_mapping": None})
    )
    with pytest.raises(
        ties_dist.CheckpointError, match=r"model\.embed_tokens\.weight, which .* a head of unknown name"
    ):
        merged("llama", tmp_path, tie_word_embeddings=False)
    whole = model.merge_and_unload()
    whole.save_pretrained(tmp_path / "whole")
    recipe = {"merge_method": "task_arithmetic", "base_model": str(tmp_path / "base")}
    ties_dist.merge({**recipe, "models": [{"model": str(tmp_path / "whole")}]}, tmp_path / "out")
    found = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(found), logits(whole), rtol=1e-5, atol=1e-5)
