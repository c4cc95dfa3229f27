"""Adapters merged into an adapter against peft's `add_weighted_adapter`, and loaded by peft from what was written.

Compared are the deltas that peft makes of both, scaling * B A or l: where all adapters have one scaling it stays in our
adapter_config.json, and peft puts its root into A and B. Float32 in other orders: a few ulp of the largest entry.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import ties_dist
from tests.conformance.test_peft_adapters import LORA, Model

peft = pytest.importorskip("peft", reason="peft is not installed; it is a test-only dependency (pip install peft)")

NAMES = ("one", "two", "three")
TOLERANCE = 1e-6  # of the largest entry
Config = Mapping[str, Any]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def trained(configs: Sequence[Config], root: Path) -> Any:
    """A peft model that holds every adapter under a name of NAMES; they are written to root/NAME."""
    torch.manual_seed(0)
    kinds = [peft.IA3Config if "feedforward_modules" in c else peft.LoraConfig for c in configs]
    wrapped = None
    for number, (kind, config) in enumerate(zip(kinds, configs, strict=True)):
        if wrapped is None:
            wrapped = peft.get_peft_model(Model(turned=False), kind(**config), adapter_name=NAMES[0])
        else:
            wrapped.add_adapter(NAMES[number], kind(**config))
    assert wrapped is not None
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(wrapped.named_parameters()):
            if "lora_" in name or "ia3_l" in name:
                scale = 0.1 if "ia3_l" in name else 0.3
                parameter += scale * torch.randn(parameter.shape, generator=draw)
    wrapped.save_pretrained(root, selected_adapters=list(NAMES[: len(configs)]))
    return wrapped


def merged(root: Path, count: int, method: str, weights: Sequence[float], **recipe: Any) -> Path:
    """Our merge, in root/out."""
    block = {"output": "adapter", **recipe.pop("ties_dist", {})}
    models = [
        {"model": str(root / NAMES[i]), "parameters": {"weight": weights[i], **recipe.get("each", {})}}
        for i in range(count)
    ]
    recipe.pop("each", None)
    document = {"merge_method": method, "models": models, "ties_dist": block, **recipe}
    (root / "recipe.yml").write_text(json.dumps(document))
    ties_dist.merge(root / "recipe.yml", root / "out", overwrite=True)
    return root / "out"


def deltas(wrapped: Any, adapter: str) -> dict[str, Tensor]:
    """What one of a model's adapters does: per module, scaling * B A or l."""
    found = {}
    for name, module in wrapped.named_modules():
        if adapter in getattr(module, "lora_A", {}) or adapter in getattr(module, "lora_embedding_A", {}):
            found[name] = module.get_delta_weight(adapter).detach().clone()
        elif adapter in getattr(module, "ia3_l", {}):
            found[name] = module.ia3_l[adapter].detach().clone()
    return found


def assert_same(wrapped: Any, out: Path, factor: float = 1.0) -> None:
    """peft's own merge under the name of 'theirs', times a factor, and ours as peft reads it."""
    wrapped.load_adapter(str(out), "ours")
    theirs, ours = deltas(wrapped, "theirs"), deltas(wrapped, "ours")
    assert theirs.keys() == ours.keys() and theirs
    for name, expected in theirs.items():
        error = (ours[name] - factor * expected).abs().max()
        assert error <= TOLERANCE * factor * expected.abs().max(), name
        assert expected.abs().max() > 0.01, name


SETS: Mapping[str, Sequence[Config]] = {
    "alike": [LORA] * 3,
    "patterns": [LORA | {"rank_pattern": {"up_proj": 2}, "alpha_pattern": {"layers.1.up_proj": 11}}] * 2,
    "rslora": [LORA | {"use_rslora": True}] * 2,
    "embedding": [LORA | {"target_modules": ["embed_tokens", "q_proj"]}] * 2,
    "other-modules": [LORA, LORA | {"target_modules": ["q_proj", "down_proj"]}],
}
OTHER_SCALINGS = [LORA, LORA | {"lora_alpha": 16}, LORA | {"lora_alpha": 3, "use_rslora": True}]
METHODS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "linear": ("task_arithmetic", {}),
    "ties": ("ties", {"each": {"density": 0.4}, "ties_dist": {"semantics": "peft"}}),
    "dare_linear": ("dare_linear", {"each": {"density": 1.0}}),
    "dare_ties": ("dare_ties", {"each": {"density": 1.0}, "parameters": {"normalize": True}}),
}


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("variant", SETS)
def test_lora_merges_as_peft_does(variant: str, kind: str, tmp_path: Path) -> None:
    configs = SETS[variant]
    wrapped = trained(configs, tmp_path)
    method, recipe = METHODS[kind]
    # dare_ties divides by the weights that agree, peft by their number: the same where they are one.
    weights = [1.0] * len(configs) if kind == "dare_ties" else [0.7, 1.0, 0.4][: len(configs)]
    density = {"ties": 0.4, "linear": None}.get(kind, 1.0)
    names = list(NAMES[: len(configs)])
    wrapped.add_weighted_adapter(names, weights, "theirs", combination_type=kind, density=density)
    # peft keeps use_rslora beside lora_alpha = r, so that what it merged counts sqrt(r) times.
    factor = 0.5 if variant == "rslora" else 1.0
    assert_same(wrapped, merged(tmp_path, len(configs), method, weights, **recipe), factor)


def test_an_rslora_alone_is_itself(tmp_path: Path) -> None:
    wrapped = trained(SETS["rslora"], tmp_path)
    wrapped.load_adapter(str(merged(tmp_path, 1, "task_arithmetic", [1.0])), "ours")
    own, ours = deltas(wrapped, "one"), deltas(wrapped, "ours")
    assert own and all(torch.equal(ours[name], delta) for name, delta in own.items())


def test_scalings_that_differ_are_brought_to_one(tmp_path: Path) -> None:
    wrapped = trained(OTHER_SCALINGS, tmp_path)
    weights = [0.5, 0.3, 1.2]
    wrapped.add_weighted_adapter(["one", "two", "three"], weights, "theirs", combination_type="linear")
    out = merged(tmp_path, 3, "task_arithmetic", weights)
    assert_same(wrapped, out)
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 4, False)


def test_a_negative_weight_turns_the_delta_round(tmp_path: Path) -> None:
    wrapped = trained([LORA] * 2, tmp_path)
    wrapped.add_weighted_adapter(["one", "two"], [1.0, -0.5], "theirs", combination_type="linear")
    assert_same(wrapped, merged(tmp_path, 2, "task_arithmetic", [1.0, -0.5]))


def test_lambda_scales_the_delta(tmp_path: Path) -> None:
    """lambda 0.25 on one adapter is peft's weight 0.25."""
    wrapped = trained([LORA] * 2, tmp_path)
    wrapped.add_weighted_adapter(["one"], [0.25], "theirs", combination_type="linear")
    assert_same(wrapped, merged(tmp_path, 1, "task_arithmetic", [1.0], parameters={"lambda": 0.25}))


def test_ia3_merges_as_peft_does(tmp_path: Path) -> None:
    wrapped = trained([IA3] * 2, tmp_path)
    wrapped.add_weighted_adapter(["one", "two"], [0.6, 0.5], "theirs")
    assert_same(wrapped, merged(tmp_path, 2, "linear", [0.6, 0.5], parameters={"normalize": False}))


IA3 = {"target_modules": ["q_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
OTHERWISE: Mapping[str, Sequence[Config]] = {
    "layers": [LORA | {"layers_to_transform": [i], "layers_pattern": "layers"} for i in range(2)],
    "excluded": [LORA, LORA | {"exclude_modules": ["layers.0.q_proj"]}],
    "endings": [LORA | {"target_modules": ["head", "layers.0.up_proj"]}, LORA | {"target_modules": ["q_proj"]}],
    "ranks": [
        LORA | {"rank_pattern": {"layers.0.up_proj": 7}},
        LORA | {"rank_pattern": {"layers.0.up_proj": 7}, "target_modules": ["up_proj"]},
    ],
}


@pytest.mark.parametrize("what", OTHERWISE)
def test_adapters_with_other_settings_are_loaded_whole(what: str, tmp_path: Path) -> None:
    wrapped = trained(OTHERWISE[what], tmp_path)
    wrapped.add_weighted_adapter(["one", "two"], [0.7, 1.1], "theirs", combination_type="linear")
    out = merged(tmp_path, 2, "task_arithmetic", [0.7, 1.1])
    assert_loads_whole(out)
    if what != "layers":  # peft's own has the first adapter's layers only
        assert_same(wrapped, out)


@pytest.mark.parametrize(
    "order", [["q_proj", "down_proj"], ["down_proj", "q_proj"], ["q_proj", "down_proj", "up_proj"]]
)
def test_ia3_settings_are_sets(order: list[str], tmp_path: Path) -> None:
    """peft writes sets in an order of its own."""
    wrapped = trained([IA3, IA3 | {"target_modules": order}], tmp_path)
    file = tmp_path / "two" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"target_modules": order}))
    wrapped.add_weighted_adapter(["one", "two"], [0.6, 0.5], "theirs")
    out = merged(tmp_path, 2, "linear", [0.6, 0.5], parameters={"normalize": False})
    assert_loads_whole(out)
    if len(order) == 2:  # where one lacks a module, peft leaves it out of the sum and we count ones
        assert_same(wrapped, out)


def assert_loads_whole(out: Path) -> None:
    """On a fresh model, peft finds a place for every tensor, and a tensor for every place."""
    model = peft.get_peft_model(Model(turned=False), peft.PeftConfig.from_pretrained(str(out)))
    assert set(peft.get_peft_model_state_dict(model)) == set(load_file(out / "adapter_model.safetensors"))


def test_bfloat16_adapters_stay_bfloat16(tmp_path: Path) -> None:
    """One adapter alone is its own mean, byte for byte."""
    trained([LORA], tmp_path)
    file = tmp_path / "one" / "adapter_model.safetensors"
    save_file({n: t.bfloat16() for n, t in load_file(file).items()}, file)
    out = merged(tmp_path, 1, "linear", [1.0])
    found, expected = load_file(out / "adapter_model.safetensors"), load_file(file)
    assert {n: t.dtype for n, t in found.items()} == dict.fromkeys(expected, torch.bfloat16)
    assert all(torch.equal(found[n], t) for n, t in expected.items())
