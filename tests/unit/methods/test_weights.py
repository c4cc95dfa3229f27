"""NearSwap and passthrough by hand, on numbers that float32 holds exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import ties_dist
from tests.conftest import Checkpoints


def test_nearswap_takes_what_is_near_and_a_part_of_what_is_far() -> None:
    base = {"w": torch.tensor([1.0, 1.0, 1.0, 1.0, -2.0])}
    other = {"w": torch.tensor([1.25, 1.5, 2.0, 1.0, 2.0])}
    merged = ties_dist.merge_state_dicts(base, [other], method="nearswap", parameters={"t": 0.5})
    # Differences 1/4, 1/2, 1, 0, 4: shares 1, 1, 1/2, 1, 1/8.
    assert merged["w"].tolist() == [1.25, 1.5, 1.5, 1.0, -1.5]


def test_nearswap_with_a_t_of_zero_or_less_is_the_base() -> None:
    base, other = {"w": torch.tensor([1.0, 3.0])}, {"w": torch.tensor([2.0, -3.0])}
    for t in (0.0, -4.0):
        merged = ties_dist.merge_state_dicts(base, [other], method="nearswap", parameters={"t": t})
        assert merged["w"].tolist() == [1.0, 3.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_passthrough_is_the_model_bit_for_bit(dtype: torch.dtype) -> None:
    model = {"w": torch.tensor([0.0, -0.0, 1.5, -3.25, 6e-8, 1e-5], dtype=dtype)}
    merged = ties_dist.merge_state_dicts(None, [model], method="passthrough")
    assert merged["w"].view(torch.uint8).tolist() == model["w"].view(torch.uint8).tolist()
    halved = ties_dist.merge_state_dicts(None, [model], method="passthrough", parameters={"scale": -0.5})
    assert halved["w"][2:4].tolist() == [-0.75, 1.625]


def test_both_are_merged_from_files_whatever_the_units(merge_job: Checkpoints, tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(3)
    base, other = ({"w": torch.randn(1000, 1100, generator=draw)} for _ in range(2))
    for method, parameters in (("nearswap", {"t": 0.5}), ("passthrough", {"scale": 0.5})):
        recipe = merge_job([base, other], folder=tmp_path / method, method=method, parameters=parameters)
        outs = [tmp_path / f"{method}-{unit}" for unit in (1 << 20, 8 << 20)]
        digests = {
            ties_dist.merge(recipe, out, unit_size=unit).output_digest
            for out, unit in zip(outs, (1 << 20, 8 << 20), strict=True)
        }
        assert len(digests) == 1
        in_memory = ties_dist.merge_state_dicts(base, [other], method=method, parameters=parameters)
        assert load_file(next(outs[0].glob("*.safetensors")))["w"].equal(in_memory["w"])


def test_dare_with_a_density_of_zero_changes_nothing() -> None:
    base = {"layers.0.w": torch.arange(8.0), "layers.1.w": torch.arange(8.0)}
    expert = {name: values + 1 for name, values in base.items()}
    merged = ties_dist.merge_state_dicts(base, [expert], method="dare_linear", parameters={"density": [0, 1]})
    assert merged["layers.0.w"].tolist() == base["layers.0.w"].tolist()
    assert merged["layers.1.w"].tolist() == expert["layers.1.w"].tolist()


@pytest.mark.parametrize("options", [{}, {"tie_policy": "exact_k"}])
def test_ties_with_a_density_of_zero_keeps_nothing_of_a_tensor(options: dict[str, object]) -> None:
    base = {"layers.0.w": torch.zeros(4), "layers.1.w": torch.zeros(4)}
    expert = {name: torch.tensor([1.0, 2.0, 3.0, 4.0]) for name in base}
    merged = ties_dist.merge_state_dicts(base, [expert], method="ties", parameters={"density": [0, 1]}, **options)
    assert merged["layers.0.w"].tolist() == [0.0] * 4
    assert merged["layers.1.w"].tolist() == [1.0, 2.0, 3.0, 4.0]
