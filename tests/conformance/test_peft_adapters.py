"""Adapters applied on the fly against peft's `merge_and_unload`, for each variant; peft writes the adapters.

On a float32 base both compute W + s * B A in float32, in another order of the sum over the rank: they agree within
a few ulp of |W| + s * |B| |A|. On a bfloat16 base peft rounds the sum to bfloat16, which is not done here.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import ties_dist
from tests.conftest import write_checkpoint

peft = pytest.importorskip("peft", reason="peft is not installed; it is a test-only dependency (pip install peft)")

ULP = 2.0**-23


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """peft warns of what it would like to have, and of models without a configuration."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Conv1D(nn.Module):
    """GPT-2's linear layer, stored (in, out); peft knows it by transformers' class alone, so that is used below."""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(24, 24)
        self.up_proj = nn.Linear(24, 40)
        self.down_proj = nn.Linear(40, 24, bias=False)
        self.norm = nn.LayerNorm(24)


class Model(nn.Module):
    def __init__(self, turned: bool) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(50, 24)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(24, 7)
        if turned:
            from transformers.pytorch_utils import Conv1D as Turned

            for layer in self.layers:
                layer.up_proj = Turned(40, 24)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer.norm(x + layer.down_proj(torch.relu(layer.up_proj(layer.q_proj(x)))))
        return self.head(x)


LORA: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"]}
VARIANTS: Mapping[str, Any] = {
    "plain": LORA,
    "patterns": LORA | {"rank_pattern": {"layers.1.q_proj": 9, "up_proj": 2}, "alpha_pattern": {"up_proj": 11}},
    "rslora": LORA | {"use_rslora": True},
    "dora": LORA | {"use_dora": True, "target_modules": ["q_proj", "up_proj", "down_proj"]},
    "rank-one": LORA | {"r": 1},
    "saved-modules": LORA | {"modules_to_save": ["head", "norm"]},
    "bias-all": LORA | {"bias": "all"},
    "bias-lora-only": LORA | {"bias": "lora_only"},
    "embedding": LORA | {"target_modules": ["embed_tokens", "q_proj"]},
    "turned": LORA | {"target_modules": ["up_proj"], "fan_in_fan_out": True},
    "turned-dora": LORA | {"target_modules": ["up_proj"], "fan_in_fan_out": True, "use_dora": True},
    "ia3": {"target_modules": ["q_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "ia3-turned": {"target_modules": ["up_proj"], "feedforward_modules": [], "fan_in_fan_out": True},
    "ia3-turned-inputs": {"target_modules": ["up_proj"], "feedforward_modules": ["up_proj"], "fan_in_fan_out": True},
    "ia3-saved": {"target_modules": ["q_proj"], "feedforward_modules": [], "modules_to_save": ["head"]},
}


def adapted(
    variant: str, root: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0, name: str = "adapter"
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Writes base and adapter; returns the base's tensors, and what peft merges them to."""
    given = VARIANTS[variant]
    torch.manual_seed(0)
    model = Model(turned="turned" in variant).to(dtype)
    base = {n: t.clone() for n, t in model.state_dict().items()}
    if not (root / "base").exists():
        write_checkpoint(root / "base", base, shards=2)
    config = peft.IA3Config(**given) if variant.startswith("ia3") else peft.LoraConfig(**given)
    wrapped = peft.get_peft_model(model, config)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                scale = 0.1 if "magnitude" in parameter_name or "ia3" in parameter_name else 0.3
                parameter += scale * torch.randn(parameter.shape, generator=draw).to(parameter.dtype)
    wrapped.save_pretrained(root / name)
    return base, {n: t.clone() for n, t in wrapped.merge_and_unload().state_dict().items()}


def ours(root: Path, model: str, **top: Any) -> dict[str, Tensor]:
    """Task arithmetic with one expert, lambda 1: base + (expert - base), in float32."""
    recipe = {
        "merge_method": "task_arithmetic", "base_model": str(root / "base"), "models": [{"model": model}],
        "out_dtype": "float32", **top,
    }  # fmt: skip
    path = root / "recipe.yml"
    path.write_text(json.dumps(recipe))
    ties_dist.merge(path, root / "out", overwrite=True)
    found: dict[str, Tensor] = {}
    for file in (root / "out").glob("*.safetensors"):
        found |= load_file(file)
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_adapter_is_the_expert_that_peft_merges(variant: str, tmp_path: Path) -> None:
    base, theirs = adapted(variant, tmp_path)
    found = ours(tmp_path, "adapter" if variant != "plain" else str(tmp_path / "base") + "+adapter")
    assert found.keys() == theirs.keys()
    changed = 0
    for name, expected in theirs.items():
        # Twice |W| + |W'|: each side rounds a sum whose terms are of about that size.
        slack = 16 * ULP * (base[name].abs() + expected.abs() + (expected - base[name]).abs() + 1e-3)
        assert ((found[name] - expected).abs() <= slack).all(), name
        changed += not torch.equal(expected, base[name])
    assert changed >= 2


@pytest.mark.parametrize("variant", ["plain", "ia3"])
def test_on_a_bfloat16_base_peft_rounds_and_we_do_not(variant: str, tmp_path: Path) -> None:
    _, theirs = adapted(variant, tmp_path, dtype=torch.bfloat16)
    found = ours(tmp_path, "adapter")
    for name, expected in theirs.items():
        half = 2.0**-8 * expected.float().abs() + 1e-6
        # peft rounds B A (LoRA) and then the sum, each by at most half a unit.
        assert ((found[name] - expected.float()).abs() <= 2 * half + 2.0**-8 * 0.5).all(), name
    assert any((found[n] != found[n].to(torch.bfloat16).float()).any() for n in found)


@pytest.mark.parametrize("kernel", ["compiled", "eager"])
def test_experts_that_are_adapters_are_merged_like_any_others(kernel: Any, tmp_path: Path) -> None:
    """Whole-model TIES of three adapters against TIES of the models that peft merged them to."""
    whole = []
    for i, variant in enumerate(["plain", "rslora", "ia3"]):
        _, theirs = adapted(variant, tmp_path, seed=i, name=f"a{i}")
        write_checkpoint(tmp_path / f"m{i}", theirs)
        whole.append(theirs)
    results = []
    for names in (["a0", "a1", "a2"], ["m0", "m1", "m2"]):
        recipe = {
            "merge_method": "ties", "base_model": "base", "models": [{"model": n} for n in names],
            "parameters": {"density": 0.9}, "ties_dist": {"density_of": "moved"},
        }  # fmt: skip
        (tmp_path / "recipe.yml").write_text(json.dumps(recipe))
        report = ties_dist.merge(tmp_path / "recipe.yml", tmp_path / f"out-{names[0]}", kernel=kernel)
        found: dict[str, Tensor] = {}
        for file in (tmp_path / f"out-{names[0]}").glob("*.safetensors"):
            found |= load_file(file)
        results.append((found, report))
    (one, _), (two, _) = results
    for name, expected in two.items():
        assert (~np.isclose(one[name], expected, rtol=1e-5, atol=1e-6)).mean() < 0.01, name  # ranks at the threshold
