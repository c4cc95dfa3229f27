"""Adapters as experts: by hand, in any cut, resumed, through the command line, and everything that is refused."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import ties_dist
from tests.conftest import random_models, write_checkpoint
from tests.integration.command import run
from ties_dist.adapters.low_rank import LowRank
from ties_dist.adapters.peft import adapt, read_adapter
from ties_dist.analysis.page import page
from ties_dist.checkpoints.catalogue import open_checkpoint
from ties_dist.compiler.slices import decoded
from ties_dist.errors import CheckpointError, RecipeError
from ties_dist.planning.prepare import prepare
from ties_dist.statistics.counts import StatisticsStore
from ties_dist.storage.readers import open_reader
from ties_dist.thresholds import ZEROS, Histogram

SHAPES = {
    "layers.0.q.weight": (40, 24),
    "layers.0.q.bias": (40,),
    "layers.1.q.weight": (24, 40),
    "head.weight": (9, 24),
}


def write_adapter(folder: Path, tensors: Mapping[str, Tensor], **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    document = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "fan_in_fan_out": False, "bias": "none"} | config
    (folder / "adapter_config.json").write_text(json.dumps(document))
    save_file(
        {f"base_model.model.{n}": t.contiguous() for n, t in tensors.items()}, folder / "adapter_model.safetensors"
    )
    return folder


def lora(module: str, outputs: int, inputs: int, rank: int = 2, *, seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        f"{module}.lora_A.weight": torch.randn(rank, inputs, generator=draw),
        f"{module}.lora_B.weight": torch.randn(outputs, rank, generator=draw),
    }


def both(seed: int = 0) -> dict[str, Tensor]:
    return lora("layers.0.q", 40, 24, seed=seed) | lora("layers.1.q", 24, 40, seed=seed + 1)


@pytest.fixture
def base(tmp_path: Path) -> dict[str, Tensor]:
    tensors = random_models(SHAPES, experts=0, dtype=torch.bfloat16)[0]
    write_checkpoint(tmp_path / "base", tensors, shards=2)
    return tensors


def write_recipe(root: Path, *models: str, method: str = "task_arithmetic", **top: Any) -> Path:
    document = {"merge_method": method, "base_model": "base", "models": [{"model": m} for m in models], **top}
    path = root / "recipe.yml"
    path.write_text(json.dumps({k: v for k, v in document.items() if v is not None}))
    return path


def merged(out: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in out.glob("*.safetensors"):
        found |= load_file(file)
    return found


def test_a_small_one_by_hand(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "base", {"q.weight": torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])})
    a, b = torch.tensor([[1.0, 0.0, -1.0]]), torch.tensor([[2.0], [0.5]])
    write_adapter(tmp_path / "lora", {"q.lora_A.weight": a, "q.lora_B.weight": b}, r=1, lora_alpha=3)
    ties_dist.merge(write_recipe(tmp_path, "lora"), tmp_path / "out")
    # scaling 3 / 1: 3 * [[2, 0, -2], [0.5, 0, -0.5]]
    assert merged(tmp_path / "out")["q.weight"].tolist() == [[7.0, 2.0, -3.0], [5.5, 5.0, 4.5]]


def test_dora_by_hand(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "base", {"q.weight": torch.tensor([[3.0, 3.0], [0.0, 1.0]])})
    tensors = {
        "q.lora_A.weight": torch.tensor([[0.0, 1.0]]),
        "q.lora_B.weight": torch.tensor([[1.0], [0.0]]),
        "q.lora_magnitude_vector": torch.tensor([10.0, 4.0]),
    }
    write_adapter(tmp_path / "dora", tensors, r=1, lora_alpha=1, use_dora=True)
    ties_dist.merge(write_recipe(tmp_path, "dora"), tmp_path / "out")
    # W + B A = [[3, 4], [0, 1]], of norms 5 and 1, rescaled to 10 and 4.
    assert merged(tmp_path / "out")["q.weight"].tolist() == [[6.0, 8.0], [0.0, 4.0]]


def test_ia3_by_hand(tmp_path: Path) -> None:
    tensors = {"q.weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "q.bias": torch.tensor([5.0, 6.0])}
    write_checkpoint(tmp_path / "base", tensors | {"f.weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]])})
    factors = {"q.ia3_l": torch.tensor([[2.0], [10.0]]), "f.ia3_l": torch.tensor([[2.0, 10.0]])}
    write_adapter(tmp_path / "ia3", factors, peft_type="IA3")
    ties_dist.merge(write_recipe(tmp_path, "ia3"), tmp_path / "out")
    found = merged(tmp_path / "out")
    assert found["q.weight"].tolist() == [[2.0, 4.0], [30.0, 40.0]]
    assert found["q.bias"].tolist() == [10.0, 60.0]
    assert found["f.weight"].tolist() == [[2.0, 20.0], [6.0, 40.0]]


VARIANTS: Mapping[str, tuple[dict[str, Tensor], dict[str, Any]]] = {
    "lora": (both(), {}),
    "dora": (both() | {"layers.0.q.lora_magnitude_vector": torch.rand(40) + 1}, {"use_dora": True}),
    "turned": (
        lora("layers.0.q", 24, 40) | {"layers.0.q.lora_magnitude_vector": torch.rand(24)},
        {"fan_in_fan_out": True},
    ),
    "ia3": ({"layers.0.q.ia3_l": torch.rand(40, 1), "layers.1.q.ia3_l": torch.rand(1, 40)}, {"peft_type": "IA3"}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_any_cut_reads_the_same_bytes(variant: str, base: dict[str, Tensor], tmp_path: Path) -> None:
    tensors, config = VARIANTS[variant]
    adapter = read_adapter(write_adapter(tmp_path / "a", tensors, **config), "a", open_reader)
    catalogue = adapt(open_checkpoint(tmp_path / "base", name="base", reader=open_reader), adapter, "a")
    parameter = catalogue.parameters["layers.0.q.weight"]
    assert parameter.dtype == "F32"

    def read(start: int, stop: int) -> bytes:
        operand = parameter.view.read(catalogue.opened, start, stop)
        return decoded(operand, 0, stop - start).tobytes()

    whole = read(0, 40 * 24)
    assert len(whole) == 4 * 40 * 24

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.integers(0, 40 * 24), max_size=6))
    def check(cuts: list[int]) -> None:
        bounds = [0, *sorted(cuts), 40 * 24]
        assert b"".join(read(a, b) for a, b in pairwise(bounds)) == whole
        operand = parameter.view.read(catalogue.opened, 0, 40 * 24)
        assert b"".join(decoded(operand, a, b).tobytes() for a, b in pairwise(bounds)) == whole

    check()


@pytest.mark.parametrize(("method", "parameters"), [("ties", {"density": 0.2}), ("model_stock", {})])
def test_the_bytes_do_not_depend_on_how_the_work_is_cut(
    method: str, parameters: dict[str, float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shapes = {"a.weight": (1500, 900), "b.weight": (900, 1500), "c": (400, 300)}
    write_checkpoint(tmp_path / "base", random_models(shapes, experts=0, dtype=torch.bfloat16)[0], shards=2)
    scaled = {n: t * 0.02 for n, t in (lora("a", 1500, 900, 8) | lora("b", 900, 1500, 8)).items()}
    write_adapter(tmp_path / "one", scaled, r=8)
    dora = lora("a", 1500, 900, 4, seed=5) | {"a.lora_magnitude_vector": torch.rand(1500)}
    write_adapter(tmp_path / "two", dora, use_dora=True)
    recipe = write_recipe(tmp_path, "one", "base+two", method=method, parameters=parameters)
    digests = set()
    for i, options in enumerate(
        [
            {"threads": 1, "unit_size": 1 << 20, "read_backend": "mmap"},
            {"threads": 2, "unit_size": 4 << 20, "kernel": "eager", "read_backend": "direct"},
            {"threads": 2, "threshold_pass": "speculate", "read_backend": "pread"},
        ]
    ):
        digests.add(ties_dist.merge(recipe, tmp_path / f"out{i}", **options).output_digest)  # type: ignore[arg-type]
    assert len(digests) == 1
    shown = run(capsys, "verify", tmp_path / "out0", "--sample", "1")
    assert shown.status == 0 and "merged again: the same bytes" in shown.out


def test_a_model_may_be_named_in_every_way(base: dict[str, Tensor], tmp_path: Path) -> None:
    write_adapter(tmp_path / "lo+ra", both())
    names = ["lo+ra", "base+lo+ra", str(tmp_path / "lo+ra"), "lo+ra/adapter_model.safetensors"]
    names += [f"{tmp_path / 'base'}+{tmp_path / 'lo+ra'}"]
    fingerprints = {ties_dist.plan(write_recipe(tmp_path, name)).fingerprint for name in names}
    assert len(fingerprints) == 1
    assert ties_dist.plan(write_recipe(tmp_path, "lo+ra")).experts == ("lo+ra",)


def test_an_adapter_of_another_model_than_the_base_is_an_expert(base: dict[str, Tensor], tmp_path: Path) -> None:
    other = {n: (t.float() + 1).to(torch.bfloat16) for n, t in base.items()}
    write_checkpoint(tmp_path / "tuned", other)
    write_adapter(tmp_path / "lora", lora("head", 9, 24))
    ties_dist.merge(write_recipe(tmp_path, "tuned+lora", out_dtype="float32"), tmp_path / "out")
    found = merged(tmp_path / "out")
    a, b = (lora("head", 9, 24)[f"head.lora_{x}.weight"] for x in "AB")
    np.testing.assert_allclose(found["head.weight"], other["head.weight"].float() + 2 * (b @ a), rtol=1e-5, atol=1e-5)
    assert torch.equal(found["layers.0.q.weight"], other["layers.0.q.weight"].float())


def test_a_plain_mean_of_adapters_has_the_base_s_types(base: dict[str, Tensor], tmp_path: Path) -> None:
    write_adapter(tmp_path / "one", both(0))
    write_adapter(tmp_path / "two", both(5))
    recipe = write_recipe(tmp_path, "base+one", "base+two", method="linear", base_model=None)
    ties_dist.merge(recipe, tmp_path / "out")
    assert {t.dtype for t in merged(tmp_path / "out").values()} == {torch.bfloat16}


def test_an_adapter_that_changed_is_another_merge(base: dict[str, Tensor], tmp_path: Path) -> None:
    write_adapter(tmp_path / "lora", both())
    recipe = write_recipe(tmp_path, "lora")
    before = ties_dist.plan(recipe).fingerprint
    write_adapter(tmp_path / "lora", both(), lora_alpha=5)
    changed = ties_dist.plan(recipe).fingerprint
    write_adapter(tmp_path / "lora", both(7))
    assert len({before, changed, ties_dist.plan(recipe).fingerprint}) == 3


def test_patterns_are_matched_as_whole_names_behind_a_dot(base: dict[str, Tensor], tmp_path: Path) -> None:
    write_adapter(tmp_path / "one", both(), alpha_pattern={r"layers\.0\.q": 8, "q": 2, "0.q": 99})
    catalogue = adapt(
        open_checkpoint(tmp_path / "base", name="base", reader=open_reader),
        read_adapter(tmp_path / "one", "one", open_reader),
        "one",
    )
    views = [catalogue.parameters[name].view for name in ("layers.0.q.weight", "layers.1.q.weight")]
    assert [view.scaling for view in views if isinstance(view, LowRank)] == [4.0, 1.0]


BAD: Mapping[str, tuple[dict[str, Tensor], dict[str, Any], str]] = {
    "another kind": (both(), {"peft_type": "VERA"}, r"peft_type 'VERA': LoRA and \(IA\)3 are supported"),
    "a bias of B": (both(), {"lora_bias": True}, r"lora_bias: a bias of its own in lora_B is not supported"),
    "bare parameters": (both(), {"target_parameters": ["w"]}, r"target_parameters: LoRA on bare parameters is not"),
    "no such tensor": (lora("layers.7.q", 4, 4), {}, r"the base has no tensor .?layers.7.q.weight"),
    "half a pair": ({"head.lora_A.weight": torch.ones(2, 24)}, {}, r"head.weight.*half of a pair is missing: lora_A"),
    "other shapes": (
        lora("head", 9, 25),
        {},
        r"head.weight.* \(9, 24\): A has shape \(2, 25\) and B \(9, 2\), which do not",
    ),
    "no matrix": (lora("layers.0.q.bias", 1, 1), {}, r"the base has no tensor"),
    "a saved module of another shape": (
        {"head.weight": torch.ones(8, 24)},
        {},
        r"saved with shape \(8, 24\), the base's is \(9, 24\)",
    ),
    "nothing": ({}, {}, r"changes nothing"),
    "LoRA that says it is IA3": (both(), {"peft_type": "IA3"}, r"is adapted by lora_A, lora_B, but peft_type is IA3"),
    "IA3 that says it is LoRA": ({"head.ia3_l": torch.ones(9, 1)}, {}, r"half of a pair is missing: ia3_l"),
    "rank 0": (
        {"head.lora_A.weight": torch.ones(0, 24), "head.lora_B.weight": torch.ones(9, 0)},
        {},
        r"A has shape \(0, 24\) and B \(9, 0\), which do not multiply",
    ),
    "no alpha": (both(), {"lora_alpha": None}, r"alpha None is no number"),
    "float64": ({n: t.double() for n, t in both().items()}, {}, r"F64 in it or its adapter; only F32, F16 and BF16"),
    "factors of another shape": ({"head.ia3_l": torch.ones(3, 1)}, {"peft_type": "IA3"}, r"l has shape \(3, 1\)"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_applied_is_refused(
    what: str, base: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors, config, message = BAD[what]
    write_adapter(tmp_path / "a", tensors, **config)
    with pytest.raises(CheckpointError, match=message):
        ties_dist.plan(write_recipe(tmp_path, "a"))
    shown = run(capsys, "merge", tmp_path / "recipe.yml", tmp_path / "out")
    assert shown.status == 2 and "Traceback" not in shown.err and not (tmp_path / "out").exists()


def test_all_problems_of_an_adapter_are_told_at_once(base: dict[str, Tensor], tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", lora("head", 9, 25) | lora("layers.7.q", 4, 4) | lora("layers.0.q", 3, 24))
    with pytest.raises(
        CheckpointError, match=r"(?s)(?=.*head\.weight)(?=.*layers\.7\.q\.weight).*layers\.0\.q\.weight"
    ):
        ties_dist.plan(write_recipe(tmp_path, "a"))


def test_a_base_with_an_adapter_is_written_first_as_the_message_says(base: dict[str, Tensor], tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 5)):
        write_adapter(tmp_path / name, both(seed))
    wrong = write_recipe(tmp_path, "base+b", base_model="base+a")
    with pytest.raises(
        RecipeError, match=r"`merge_method: linear` whose one model it is \(weight 1\), and name its out"
    ):
        ties_dist.plan(wrong)
    first = {"merge_method": "linear", "models": [{"model": "base+a", "parameters": {"weight": 1}}]}
    (tmp_path / "first.yml").write_text(json.dumps(first))
    ties_dist.merge(tmp_path / "first.yml", tmp_path / "written")
    assert not torch.equal(merged(tmp_path / "written")["layers.0.q.weight"], base["layers.0.q.weight"])
    ties_dist.merge(write_recipe(tmp_path, "base+b", base_model="written"), tmp_path / "out")


def test_a_config_left_beside_a_whole_model_makes_it_no_adapter(base: dict[str, Tensor], tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "whole", random_models(SHAPES, experts=1, dtype=torch.bfloat16)[1])
    (tmp_path / "whole" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    ties_dist.merge(write_recipe(tmp_path, "whole"), tmp_path / "out")
    assert not torch.equal(merged(tmp_path / "out")["head.weight"], base["head.weight"])


def test_an_adapter_as_base_is_told_whose_it_is(base: dict[str, Tensor], tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", both(), base_model_name_or_path="base")
    write_adapter(tmp_path / "b", both())
    with pytest.raises(RecipeError, match=r"name the model that it adapts: 'base', by its adapter_config\.json"):
        ties_dist.plan(write_recipe(tmp_path, "b", base_model="a"))
    ties_dist.plan(write_recipe(tmp_path, "a", base_model="base"))


def test_adapters_in_the_wrong_place_are_refused(base: dict[str, Tensor], tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", both())
    for models, top, message in (
        (["base+a"], {"base_model": "a"}, "base_model: 'a' is an adapter; name the model that it adapts"),
        (["a"], {"base_model": "base+a"}, r"base_model: 'base\+a': a base is a plain model\. Write it first"),
        (["a"], {"base_model": None}, "name its base_model, or write it as model"),
        (["base+base"], {}, "'base' is no PEFT adapter"),
        (["a+a"], {}, "an adapter of an adapter"),
        (["base+nowhere/x y"], {}, r"is read as model\+adapter, but 'nowhere/x y' is not there"),
    ):
        method = "linear" if top.get("base_model", "") is None else "task_arithmetic"
        with pytest.raises(RecipeError, match=message):
            ties_dist.plan(write_recipe(tmp_path, *models, method=method, **top))


def test_an_adapter_without_safetensors_or_config_is_refused(base: dict[str, Tensor], tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", both())
    (tmp_path / "a" / "adapter_model.safetensors").rename(tmp_path / "a" / "adapter_model.bin")
    with pytest.raises(
        CheckpointError, match=r"missing \(found adapter_model.bin\): save the adapter with safetensors"
    ):
        ties_dist.plan(write_recipe(tmp_path, "a"))
    (tmp_path / "a" / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json cannot be read"):
        ties_dist.plan(write_recipe(tmp_path, "a"))


@pytest.mark.parametrize(("expression", "refused"), [("(a|aa)+$", True), ("(a+)+$", False), ("(.*.*)*x", False)])
def test_an_expression_that_would_match_for_years_ends_in_seconds(
    expression: str, refused: bool, base: dict[str, Tensor], tmp_path: Path
) -> None:
    name = "a" * 60
    write_checkpoint(tmp_path / "base", base | {f"{name}!.weight": torch.zeros(8, 6)})
    write_adapter(tmp_path / "a", lora(f"{name}!", 8, 6), alpha_pattern={expression: 8})
    began = time.monotonic()
    if refused:
        with pytest.raises(CheckpointError, match=r"adapter_config\.json: the expression .* takes too long to match"):
            ties_dist.plan(write_recipe(tmp_path, "a"))
    else:  # the package sees at once that it does not fit
        ties_dist.plan(write_recipe(tmp_path, "a"))
    assert time.monotonic() - began < 10


def test_the_command_line_knows_adapters(
    base: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_adapter(tmp_path / "a", both())
    shown = run(capsys, "inspect", tmp_path / "a")
    assert shown.status == 0 and "a PEFT adapter" in shown.out and "4 tensors" in shown.out
    recipe = write_recipe(tmp_path, "a")
    shown = run(capsys, "plan", recipe, tmp_path / "out")
    assert shown.status == 0 and "LORA applied to 2 tensors of 'base', in float32" in shown.err
    assert run(capsys, "merge", recipe, tmp_path / "out").status == 0
    assert run(capsys, "verify", tmp_path / "out", "--sample", "1").status == 0
    assert (
        "already done"
        in run(capsys, "merge", recipe, tmp_path / "out").err + run(capsys, "merge", recipe, tmp_path / "out").out
    )


# --- merged with each other, into an adapter


def write_merge(root: Path, *models: str, method: str = "ties", **top: Any) -> Path:
    block = {"output": "adapter"} | top.pop("ties_dist", {})
    document = {"merge_method": method, "models": [{"model": m} for m in models], "ties_dist": block, **top}
    path = root / "recipe.yml"
    path.write_text(json.dumps(document))
    return path


def test_ia3_ties_by_hand(tmp_path: Path) -> None:
    """Deltas to ones, in eighths: (4, -2, 1, 0) and (-2, -4, 1, 1). At density 1/4 the third smallest of all four
    is the threshold, 2 in both, whatever the tensor: (4, -2, 0, 0) and (-2, -4, 0, 0) are kept. The sums are 2 and -6:
    + elects 4, - the mean of -2 and -4."""
    for name, deltas in (("one", [4, -2, 1, 0]), ("two", [-2, -4, 1, 1])):
        factors = 1 + torch.tensor(deltas) / 8
        tensors = {"k.ia3_l": factors[:2].reshape(2, 1), "v.ia3_l": factors[2:].reshape(2, 1)}
        write_adapter(tmp_path / name, tensors, peft_type="IA3", target_modules=["k", "v"], feedforward_modules=[])
    path = write_merge(tmp_path, "one", "two", parameters={"density": 0.25})
    report = ties_dist.merge(path, tmp_path / "out")
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert found["base_model.model.k.ia3_l"].flatten().tolist() == [1 + 4 / 8, 1 - 3 / 8]
    assert found["base_model.model.v.ia3_l"].flatten().tolist() == [1, 1]
    assert [e.threshold for e in report.experts] == [2 / 8, 2 / 8]


def test_lora_means_by_hand_where_scalings_differ(tmp_path: Path) -> None:
    """alpha / r is 4 and 1, so A and B count double in the first; the scaling of the output is 1."""
    for name, alpha, value in (("one", 8, 1.0), ("two", 2, 3.0)):
        tensors = {"q.lora_A.weight": torch.full((2, 3), value), "q.lora_B.weight": torch.full((4, 2), -value)}
        write_adapter(tmp_path / name, tensors, lora_alpha=alpha, target_modules=["q"])
    ties_dist.merge(write_merge(tmp_path, "one", "two", method="linear"), tmp_path / "out")
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert found["base_model.model.q.lora_A.weight"].tolist() == [[2.5] * 3] * 2  # (2 * 1 + 1 * 3) / 2
    assert found["base_model.model.q.lora_B.weight"].tolist() == [[-2.5] * 2] * 4
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (2, 2, "q")


def test_ties_of_lora_against_plain_torch(tmp_path: Path) -> None:
    """The whole of A and B is one vector; bfloat16 adapters of two scalings."""
    for i, name in enumerate(("one", "two")):
        tensors = {n: t.bfloat16() for n, t in both(i).items()}
        write_adapter(tmp_path / name, tensors, target_modules=["q"], lora_alpha=(4, 9)[i])
    ties_dist.merge(write_merge(tmp_path, "one", "two", parameters={"density": 0.5}), tmp_path / "out")
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")

    trimmed = []
    for name, scaling in (("one", 4 / 2), ("two", 9 / 2)):
        stored = load_file(tmp_path / name / "adapter_model.safetensors")
        delta = torch.cat([stored[n].float().flatten() for n in sorted(stored)]) * np.float32(scaling**0.5)
        threshold = delta.abs().kthvalue(len(delta) - len(delta) // 2).values
        trimmed.append(torch.where(delta.abs() >= threshold, delta, 0))
    mass = trimmed[0] + trimmed[1]
    majority = 1.0 if torch.sign(mass).sum() > 0 else -1.0
    sign = torch.where(mass == 0, majority, torch.sign(mass))
    agreeing = [torch.where(t * sign > 0, t, 0) for t in trimmed]
    divisor = torch.stack([a != 0 for a in agreeing]).sum(0).clamp(min=1)
    expected = ((agreeing[0] + agreeing[1]) / divisor).bfloat16()
    assert torch.equal(torch.cat([found[n].flatten() for n in sorted(found)]), expected)


def test_one_setting_is_kept_and_so_are_the_stored_bytes(tmp_path: Path) -> None:
    write_adapter(tmp_path / "one", both(), target_modules=["q"], lora_alpha=7)
    ties_dist.merge(write_merge(tmp_path, "one", method="linear"), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["lora_alpha"], config["target_modules"]) == (7, ["q"])
    for name, tensor in load_file(tmp_path / "one" / "adapter_model.safetensors").items():
        assert torch.equal(load_file(tmp_path / "out" / "adapter_model.safetensors")[name], tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_constants_have_every_type(dtype: torch.dtype, tmp_path: Path) -> None:
    """A mean with an adapter that lacks a module: half of it, and ones where (IA)3 has nothing."""
    one, two = torch.full((4, 1), 1.5, dtype=dtype), torch.full((3, 1), 0.5, dtype=dtype)
    write_adapter(tmp_path / "one", {"k.ia3_l": one}, peft_type="IA3", target_modules=["k"], feedforward_modules=[])
    write_adapter(tmp_path / "two", {"v.ia3_l": two}, peft_type="IA3", target_modules=["v"], feedforward_modules=[])
    ties_dist.merge(write_merge(tmp_path, "one", "two", method="linear"), tmp_path / "out")
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert found["base_model.model.k.ia3_l"].dtype == dtype
    assert found["base_model.model.k.ia3_l"].flatten().tolist() == [1.25] * 4
    assert found["base_model.model.v.ia3_l"].flatten().tolist() == [0.75] * 3
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["target_modules"] == "k|v"


def test_a_recipe_of_a_model_merge_needs_one_key_more(base: dict[str, Tensor], tmp_path: Path) -> None:
    """base_model and model+adapter may stay; the base is not even opened."""
    for i, name in enumerate(("one", "two")):
        write_adapter(tmp_path / name, both(i), target_modules=["q"])
    outs = []
    for named in (("one", "two"), ("base+one", "base+two"), ("base", "one", "two")):
        path = write_merge(tmp_path, *named, base_model="base", parameters={"density": 0.5})
        outs.append(ties_dist.merge(path, tmp_path / f"out-{len(outs)}"))
    assert len({out.output_digest for out in outs}) == 1
    write_merge(tmp_path, "one", "two", base_model="org/nowhere", parameters={"density": 0.5})
    assert ties_dist.merge(tmp_path / "recipe.yml", tmp_path / "out-3").output_digest == outs[0].output_digest
    card = (tmp_path / "out-0" / "README.md").read_text()
    assert "library_name: peft" in card


def test_a_merged_adapter_is_an_expert_and_is_verified(
    base: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i, name in enumerate(("one", "two")):
        write_adapter(tmp_path / name, both(i), target_modules=["q"])
    path = write_merge(tmp_path, "one", "two", parameters={"density": 0.5})
    assert run(capsys, "plan", path).status == 0
    assert run(capsys, "analyze", path, "--json").document["experts"]
    assert run(capsys, "merge", path, tmp_path / "out").status == 0
    assert run(capsys, "verify", tmp_path / "out", "--sample", "1.0").status == 0
    assert run(capsys, "merge", path, tmp_path / "out", "--json").status == 0
    ties_dist.merge(write_recipe(tmp_path, "out"), tmp_path / "model")
    assert merged(tmp_path / "model").keys() == base.keys()


def test_adapter_merges_do_not_depend_on_the_cut(tmp_path: Path) -> None:
    for i, name in enumerate(("one", "two", "three")):
        write_adapter(
            tmp_path / name,
            lora("q", 2048, 1024, 128, seed=i),
            lora_alpha=4 if i else 9,
            r=128,
            target_modules=["q"],
        )
    path = write_merge(tmp_path, "one", "two", "three", parameters={"density": 0.3})
    digests = {
        ties_dist.merge(
            path, tmp_path / "out", threads=threads, unit_size=unit, kernel=kernel, fresh=True
        ).output_digest
        for threads, unit, kernel in ((1, 1 << 20, "eager"), (2, 1 << 20, "auto"), (2, None, "auto"))
    }
    assert len(digests) == 1


UNMERGEABLE: Mapping[str, tuple[dict[str, Any], str]] = {
    "kind": ({"tensors": {"layers.0.q.ia3_l": torch.ones(40, 1)}, "peft_type": "IA3"}, "one is LORA, two is IA3"),
    "dora": ({"tensors": both(1), "use_dora": True}, "it is a DoRA"),
    "saved": ({"tensors": both(1) | {"head.weight": torch.ones(9, 24)}}, "head.weight"),
    "rank": ({"tensors": lora("layers.0.q", 40, 24, 3)}, "(2, 24) in 'one', (3, 24) in 'two'"),
    "type": ({"tensors": {n: t.double() for n, t in both(1).items()}}, "F64"),
    "half": ({"tensors": {n: t for n, t in both(1).items() if "lora_A" in n}}, "layers.0.q has lora_A and no lora_B"),
    "magnitudes": ({"tensors": both(1) | {"layers.0.q.lora_magnitude_vector": torch.ones(40)}}, "magnitudes"),
    "vector in LoRA": ({"tensors": both(1) | {"k.ia3_l": torch.ones(4, 1)}}, "peft_type is LORA"),
    "empty": ({"tensors": {}}, "it has no tensors"),
    "changed base": ({"tensors": both(1), "init_lora_weights": "pissa_niter_4"}, "changes the base"),
    "pattern": ({"tensors": both(1), "alpha_pattern": ["q"]}, "must be a mapping"),
    "alpha": ({"tensors": both(1), "lora_alpha": 10**400}, "is no number"),
    "not a number": ({"tensors": both(1), "lora_alpha": float("nan")}, "alpha nan is no number"),
    "names": ({"tensors": both(1), "target_modules": ["q", 3]}, "must be names, or a pattern"),
}


@pytest.mark.parametrize("what", UNMERGEABLE)
def test_adapters_that_do_not_fit_together_are_refused(what: str, tmp_path: Path) -> None:
    config, message = UNMERGEABLE[what]
    write_adapter(tmp_path / "one", both(), target_modules=["q"])
    write_adapter(tmp_path / "two", **config)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        ties_dist.merge(write_merge(tmp_path, "one", "two", parameters={"density": 0.5}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_old_and_mixed_names_are_the_same_tensors(tmp_path: Path) -> None:
    """Without PEFT's prefix, without `.weight`: one set of tensors, named as PEFT does today."""
    write_adapter(tmp_path / "one", both(), target_modules=["q"])
    folder = write_adapter(tmp_path / "two", both(), target_modules=["q"])
    old = {n.removesuffix(".weight"): t for n, t in both().items()}
    save_file(old, folder / "adapter_model.safetensors")
    ties_dist.merge(write_merge(tmp_path, "one", "two", method="linear"), tmp_path / "out")
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert found.keys() == {f"base_model.model.{n}" for n in both()}
    assert all(torch.equal(found[f"base_model.model.{n}"], t) for n, t in both().items())


def test_how_a_setting_is_spelt_does_not_matter(tmp_path: Path) -> None:
    """A pattern for a list, and rank 2 as a pattern: the same adapters, and the same bytes."""
    tensors = lora("layers.0.q", 40, 24) | lora("layers.1.q", 24, 40, 4)
    digests = set()
    for spelt in (
        {"target_modules": ["q"], "r": 2, "rank_pattern": {"layers.1.q": 4}},
        {"target_modules": r"layers\.\d\.q", "r": 4, "rank_pattern": {"layers.0.q": 2}},
    ):
        write_adapter(tmp_path / "one", tensors, **spelt)
        write_adapter(
            tmp_path / "two", {n: -t for n, t in tensors.items()}, target_modules=["q"], rank_pattern={"1.q": 4}
        )
        path = write_merge(tmp_path, "one", "two", parameters={"density": 0.3})
        ties_dist.merge(path, tmp_path / "out", overwrite=True)
        digests.add((tmp_path / "out" / "adapter_model.safetensors").read_bytes())
    assert len(digests) == 1


def test_the_first_pattern_that_matches_is_the_one(tmp_path: Path) -> None:
    """The same patterns in another order: alpha / r of layers.0.q is 8 and 1, so that A counts sqrt(8) and 1 times."""
    for name, pattern in (("one", {"layers.0.q": 16, "q": 2}), ("two", {"q": 2, "layers.0.q": 16})):
        write_adapter(tmp_path / name, both(), target_modules=["q"], alpha_pattern=pattern)
    ties_dist.merge(write_merge(tmp_path, "one", "two", method="linear"), tmp_path / "out")
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for name, tensor in both().items():
        first = np.float32(8**0.5) if "layers.0" in name else np.float32(1)
        assert torch.equal(found[f"base_model.model.{name}"], (tensor * first + tensor) / 2), name


def test_counts_of_scaled_and_of_stored_tensors_are_kept_apart(tmp_path: Path) -> None:
    """One adapter, merged with another of its scaling and then with one of another: its thresholds differ."""
    for i, alpha in enumerate((4, 4, 9)):
        write_adapter(tmp_path / f"{i}", lora("q", 512, 512, 8, seed=i), lora_alpha=alpha, r=8, target_modules=["q"])
    found = []
    for cache in ("shared", "shared", "fresh"):
        pair = ("0", "1") if not found else ("0", "2")
        path = write_merge(tmp_path, *pair, parameters={"density": 0.5})
        report = ties_dist.merge(path, tmp_path / f"out-{len(found)}", cache_dir=tmp_path / cache)
        found.append(report)
    assert found[0].experts[0].threshold != found[1].experts[0].threshold
    assert found[1].experts[0].threshold == found[2].experts[0].threshold
    assert found[1].mispredicted == found[2].mispredicted


def test_signs_of_another_adapter_bring_no_modules(tmp_path: Path) -> None:
    write_adapter(tmp_path / "one", lora("q", 8, 8), target_modules=["q"])
    write_adapter(tmp_path / "signs", lora("q", 8, 8) | lora("k", 8, 8), target_modules=["q", "k"], lora_alpha=9)
    path = write_merge(tmp_path, "one", parameters={"density": 1.0}, ties_dist={"elect_from": "signs"})
    ties_dist.merge(path, tmp_path / "out")
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(torch.equal(found[f"base_model.model.{n}"], t) for n, t in lora("q", 8, 8).items())
    assert len(found) == 2
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["target_modules"] == ["q"]


def test_only_adapters_are_merged_into_an_adapter(base: dict[str, Tensor], tmp_path: Path) -> None:
    write_adapter(tmp_path / "one", both())
    with pytest.raises(RecipeError, match=r"models\[1\].*'base' is no PEFT adapter"):
        ties_dist.merge(write_merge(tmp_path, "one", "base", parameters={"density": 0.5}), tmp_path / "out")
    with pytest.raises(RecipeError, match="fisher needs statistics of models; adapters have none"):
        ties_dist.merge(write_merge(tmp_path, "one", method="fisher"), tmp_path / "out")
    with pytest.raises(RecipeError, match=r"output.*adaptor.*adapter"):
        path = write_merge(tmp_path, "one", ties_dist={"output": "adaptor"})
        ties_dist.merge(path, tmp_path / "out")


# -- density_of -------------------------------------------------------------------------------------------------------


def two_of_many(tmp_path: Path) -> Path:
    """A base of 12,000 entries, of which two adapters change 1,200 each: a tenth. TIES at density 0.2."""
    shapes = {"layers.0.q.weight": (40, 30), "layers.1.q.weight": (40, 30), "embed.weight": (96, 100)}
    write_checkpoint(tmp_path / "base", random_models(shapes, experts=0, dtype=torch.bfloat16)[0], shards=2)
    for i in range(2):
        write_adapter(tmp_path / f"a{i}", lora(f"layers.{i}.q", 40, 30, seed=i))
    return write_recipe(tmp_path, "a0", "a1", method="ties", parameters={"density": 0.2})


def by_numpy(tmp_path: Path, kept: int) -> tuple[dict[str, np.ndarray], list[float]]:
    """What TIES gives where each adapter keeps its so many largest entries, and the thresholds: nothing overlaps."""
    base, expected, thresholds = merged(tmp_path / "base"), {}, []
    for name, values in base.items():
        expected[name] = values.float().numpy()
    for i in range(2):
        name = f"layers.{i}.q"
        parts = load_file(tmp_path / f"a{i}" / "adapter_model.safetensors")
        a, b = (parts[f"base_model.model.{name}.lora_{part}.weight"].numpy() for part in "AB")
        before = expected[f"{name}.weight"]
        delta = (before + np.float32(2) * (b @ a)) - before
        thresholds.append(float(np.sort(np.abs(delta).ravel())[-kept]))
        expected[f"{name}.weight"] = before + np.where(np.abs(delta) >= thresholds[-1], delta, 0)
    return expected, thresholds


def test_an_adapter_keeps_its_density_of_what_it_changes(tmp_path: Path) -> None:
    """A fifth of the whole model is twice what it changes: the threshold was 0, "100 % kept"."""
    recipe = two_of_many(tmp_path)
    report = ties_dist.merge(recipe, tmp_path / "out")
    kept = int(1200 * 0.2) + 1  # the published rule keeps k + 1
    expected, thresholds = by_numpy(tmp_path, kept)
    found = merged(tmp_path / "out")
    for name, values in expected.items():
        np.testing.assert_allclose(found[name].float().numpy(), values, rtol=1e-2, atol=1e-6)
    for expert, threshold in zip(report.experts, thresholds, strict=True):
        assert expert.threshold == pytest.approx(threshold, rel=1e-5)
        assert (expert.moved_fraction, expert.kept_fraction) == (pytest.approx(0.1), kept / 12_000)
    assert any("the density of 'a0', 'a1' is a share of the entries that an adapter changes" in n for n in report.notes)


@pytest.mark.parametrize("options", [{"density_of": "moved"}, {"density_of": "moved", "tie_policy": "exact_k"}])
@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_the_advice_about_a_threshold_of_zero_helps(
    options: dict[str, str], scope: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = two_of_many(tmp_path)
    document = json.loads(recipe.read_text())

    def merge(**given: str) -> tuple[str, list[dict[str, Any]]]:
        recipe.write_text(json.dumps({**document, "ties_dist": {"trim_scope": scope, **given}}))
        shown = run(capsys, "merge", recipe, tmp_path / "out", "--overwrite", "--fresh")
        assert shown.status == 0, shown.err
        return shown.out, json.loads((tmp_path / "out" / ".ties_dist" / "report.json").read_text())["experts"]

    if scope == "model":
        said, experts = merge(density_of="all")
        assert "a0: its threshold is 0: only 10.00% of its entries differ from the base, less than density 0.2" in said
        assert "`density_of: moved` keeps that share" in said and "exact_k" not in said
        assert [(e["threshold"], e["kept_fraction"]) for e in experts] == [(0.0, 0.1)] * 2
    said, experts = merge(**options)
    assert "threshold is 0" not in said and "20.0% of what differs" in said
    kept = 240 + (options.get("tie_policy") is None)
    assert [e["kept_fraction"] for e in experts] == [pytest.approx(kept / 12_000)] * 2


def test_tensors_with_a_threshold_of_zero_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All of one row differ, a fortieth of the tensor."""
    shapes = {"a.weight": (40, 30), "b.weight": (40, 30)}
    base = random_models(shapes, experts=0)[0]
    write_checkpoint(tmp_path / "base", base)
    write_checkpoint(tmp_path / "m", {n: torch.cat([t[:1] + 1, t[1:]]) for n, t in base.items()})
    recipe = write_recipe(tmp_path, "m", method="ties", parameters={"density": 0.2}, ties_dist={"trim_scope": "tensor"})
    shown = run(capsys, "merge", recipe, tmp_path / "out")
    assert "m: its threshold is 0 in 2 tensors: few of their entries differ from the base" in shown.out


def test_what_density_is_a_share_of_is_part_of_the_merge(tmp_path: Path) -> None:
    recipe = two_of_many(tmp_path)
    document = json.loads(recipe.read_text())

    def fingerprint(**options: str) -> str:
        recipe.write_text(json.dumps({**document, "ties_dist": options}))
        return ties_dist.plan(recipe).fingerprint

    auto = fingerprint()
    assert auto == fingerprint(density_of="auto") == fingerprint(density_of="moved") != fingerprint(density_of="all")
    mergekit = {"semantics": "mergekit"}
    document["parameters"]["weight"] = 1
    assert fingerprint(**mergekit) == fingerprint(**mergekit, density_of="all")
    assert fingerprint(**mergekit) != fingerprint(**mergekit, density_of="moved")


def test_a_full_model_with_an_adapter_is_no_adapter(tmp_path: Path) -> None:
    """It differs from the base everywhere, so its density is a share of all."""
    recipe = two_of_many(tmp_path)
    base = merged(tmp_path / "base")
    write_checkpoint(tmp_path / "tuned", {n: t + torch.randn(t.shape) for n, t in base.items()})
    write_recipe(tmp_path, "tuned+a0", "a1", method="ties", parameters={"density": 0.2})
    first, second = ties_dist.merge(recipe, tmp_path / "out").experts
    assert first.moved_fraction is None and first.kept_fraction == pytest.approx(0.2, abs=1e-4)
    assert second.moved_fraction == pytest.approx(0.1)


def test_an_adapter_that_changes_nothing_trims_nothing(tmp_path: Path) -> None:
    recipe = two_of_many(tmp_path)
    still = {n: torch.zeros_like(t) if "lora_B" in n else t for n, t in lora("layers.0.q", 40, 30).items()}
    write_adapter(tmp_path / "a0", still)
    first, second = ties_dist.merge(recipe, tmp_path / "out").experts
    assert (first.moved_fraction, first.kept_fraction, first.threshold) == (0, 0, None)
    assert second.kept_fraction == 241 / 12_000


def test_a_known_count_of_zeros_saves_the_scan_and_a_sweep_counts_it_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = two_of_many(tmp_path)
    first = ties_dist.merge(recipe, tmp_path / "one")
    again = ties_dist.merge(recipe, tmp_path / "two")
    assert (first.thresholds_from, again.thresholds_from) == ("scan", "cache")
    assert first.output_digest == again.output_digest
    other = json.loads(recipe.read_text()) | {"parameters": {"density": 0.5}}
    recipe.write_text(json.dumps(other))
    own = ties_dist.merge(recipe, tmp_path / "three")
    swept = ties_dist.sweep(recipe, tmp_path / "sweep", density=[0.2, 0.5])
    assert [each.report.output_digest for each in swept] == [first.output_digest, own.output_digest]
    assert run(capsys, "verify", tmp_path / "three", "--sample", "1").status == 0


def test_a_wrong_count_of_zeros_is_found_and_repaired(tmp_path: Path, statistics_cache: Path) -> None:
    """Its histogram adds up, the threshold is a magnitude that exists: only the merge's own zeros contradict."""
    recipe = two_of_many(tmp_path)
    expected = ties_dist.merge(recipe, tmp_path / "one").output_digest
    plan, store = prepare(recipe).plan, StatisticsStore(statistics_cache)
    for expert in plan.experts:
        key = store.key(plan.base, expert, plan.sizes)
        known = store.load(key, plan.elements)
        assert known is not None and known.zeros is not None
        histogram = Histogram(ZEROS, known.coarse, known.fine[0].copy())
        histogram.fine[:2] += [-5, 5]
        store.save(key, histogram)
    report = ties_dist.merge(recipe, tmp_path / "two")
    assert (report.mispredicted, report.thresholds_from, report.output_digest) == (True, "scan", expected)


def test_an_analysis_trims_an_adapter_as_its_merge_does(tmp_path: Path) -> None:
    recipe = two_of_many(tmp_path)
    report = ties_dist.merge(recipe, tmp_path / "out")
    found, sampled = ties_dist.analyze(recipe), ties_dist.analyze(recipe, cache_dir=tmp_path / "none")
    assert (found.run.thresholds_from, sampled.run.thresholds_from) == ("cache and sample", "sample")
    for one in (found, sampled):
        assert not {"ties", "untrimmed"} & {each.kind for each in one.warnings}
        for expert, said in zip(one.experts, report.experts, strict=True):
            trim = next(t for t in expert.trims if t.density == 0.2)
            assert expert.of_moved and trim.rank == 241 and trim.asked_fraction == pytest.approx(0.02)
            assert said.kept_fraction / 2 < trim.kept_fraction < said.kept_fraction * 2  # 4,800 entries were sampled
            assert next(t for t in expert.trims if t.density == 1.0).kept == 1200
    for expert, said in zip(found.experts, report.experts, strict=True):
        trim = next(t for t in expert.trims if t.density == 0.2)
        assert trim.exact and (trim.threshold, trim.kept_fraction) == (said.threshold, said.kept_fraction)


def test_an_analysis_says_that_nothing_is_trimmed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = two_of_many(tmp_path)
    document = json.loads(recipe.read_text()) | {"ties_dist": {"density_of": "all"}}
    recipe.write_text(json.dumps(document))
    ties_dist.merge(recipe, tmp_path / "out")
    found = ties_dist.analyze(recipe)
    assert [each.subjects for each in found.warnings if each.kind in ("ties", "untrimmed")] == [("a0", "a1")]
    trim = next(t for t in found.experts[0].trims if t.density == 0.2)
    assert (trim.threshold, trim.exact, trim.kept, trim.kept_fraction) == (0, True, 1200, 0.1)
    for group in found.tensors:
        assert [e.kept for e in group.experts] == [group.elements - e.zeros for e in group.experts]
    text = page(found)
    assert "<b>No trim.</b> The threshold of <code>a0</code>, <code>a1</code> is 0" in text
    assert "each delta keeps 10.0% of its entries" in text
    shown = run(capsys, "analyze", recipe)
    assert "warning: Density 0.2 trims nothing of 'a0', 'a1'" in shown.out
